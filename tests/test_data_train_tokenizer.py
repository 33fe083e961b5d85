"""The command that trains a tokenizer."""

import re
import subprocess
import sys

import pytest

from moe_jax.data import corpora, tokenizers, train_tokenizer


def train(path, **changes):
    options = {"vocab_size": 1000, "heldout_fraction": 0.03, "max_bytes": 60_000} | changes
    return train_tokenizer.train(corpora.EmbeddedCorpus(), str(path), **options)


def test_training_is_reproducible(tmp_path):
    train(tmp_path / "a.model")
    train(tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_domains_share_the_bytes_equally_and_heldout_text_is_not_seen():
    corpus = corpora.EmbeddedCorpus()
    texts = list(train_tokenizer._balanced_texts(corpus, 0.03, 60_000))
    assert 59_000 < sum(len(text.encode()) for text in texts) <= 60_000
    heldout = {
        document.text
        for domain in corpus.domains()
        for split, document in corpus.documents(domain, 0.03)
        if split == "heldout"
    }
    assert not heldout & set(texts)


@pytest.mark.parametrize("vocab_size", [299, 65_537])
def test_a_vocabulary_out_of_range_is_refused(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=rf"\[300, 65536\]: got {vocab_size}"):
        train(tmp_path / "a.model", vocab_size=vocab_size)


@pytest.mark.parametrize(("vocab_size", "fix"), [(350, "more than"), (60_000, "at most")])
def test_a_vocabulary_that_does_not_fit_the_text_is_refused(tmp_path, vocab_size, fix):
    used = r"60000 bytes of 'embedded'"
    fix = rf"Set --vocab_size to {fix} (\d+), or [^<(:]*\.$"
    with pytest.raises(ValueError, match=rf"--vocab_size={vocab_size}, {used}\. {fix}") as refused:
        train(tmp_path / "a.model", vocab_size=vocab_size)
    limit = int(re.search(fix, str(refused.value))[1])
    train(tmp_path / "fits.model", vocab_size=limit + (vocab_size == 350))
    (tmp_path / "fits.model").unlink()
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_training_that_a_document_or_a_person_stops(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    (tmp_path / "corpus.jsonl").write_text('{"text": null}\n')
    corpus = corpora.open_corpus(str(tmp_path / "corpus.jsonl"))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="has null"):
        train_tokenizer.train(corpus, f"{out}/a.model", vocab_size=1000, heldout_fraction=0.03)
    monkeypatch.setattr(train_tokenizer, "_balanced_texts", stop)
    with pytest.raises(KeyboardInterrupt):
        train(out / "a.model")
    assert not out.exists()


@pytest.mark.parametrize("name", ["mine.txt", "a.model"])
def test_a_file_that_is_there_is_neither_read_as_text_nor_replaced(tmp_path, capsys, name):
    file = tmp_path / name
    file.write_text("a text of mine\n" * 2000)
    with pytest.raises(SystemExit):
        train_tokenizer.command([f"--corpus={file}", "--vocab_size=300", f"--out={file}"])
    assert f"--out is a new file: --out={file} is another. Name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.read_text() == "a text of mine\n" * 2000


def test_the_command_writes_a_model(tmp_path):
    out = tmp_path / "new" / "bpe.model"
    command = [sys.executable, "-W", "error", "-m", "moe_jax.data.train_tokenizer"]
    flags = ["--vocab_size=1000", "--max_mb=0.06", f"--out={out}"]
    done = subprocess.run(command + flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "held-out bytes per token" in done.stdout
    assert tokenizers.open_tokenizer(f"sentencepiece:{out}").vocab_size == 1000


def test_a_corpus_without_text_is_named(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    given = [f"--corpus={tmp_path / 'empty.txt'}", f"--out={tmp_path / 'a.model'}"]
    with pytest.raises(SystemExit):
        train_tokenizer.command(given)
    said = capsys.readouterr().err
    assert "needs text to train on" in said and "empty.txt" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_the_command_asks_for_out():
    command = [sys.executable, "-m", "moe_jax.data.train_tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--out must be given" in done.stdout + done.stderr


def test_what_a_user_can_put_right_is_one_line(tmp_path):
    command = [sys.executable, "-m", "moe_jax.data.train_tokenizer", f"--out={tmp_path}/a.model"]
    done = subprocess.run([*command, f"--corpus={tmp_path}/no"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: A corpus must be 'embedded', the path of")
    assert "Correct --corpus" in said
