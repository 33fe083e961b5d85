"""Tokens without their text: packed on one machine, read on another."""

import dataclasses
import json
import shutil
import tarfile

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import check_data, heldout_batches, open_data, pack, train_batches
from moe_jax.data.corpora import open_corpus
from moe_jax.data.train_tokenizer import train

FRACTION = 0.1


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A corpus of two domains, a tokenizer, and three quarters of its tokens, packed."""
    root = tmp_path_factory.mktemp("pack")
    (root / "corpus").mkdir()
    for domain, word in (("a", "apple"), ("b", "berry")):
        texts = [f"{word} {number} is {word} {number * 7}. " * 8 for number in range(60)]
        lines = [json.dumps({"id": f"{domain}{n}", "text": text}) for n, text in enumerate(texts)]
        (root / f"corpus/{domain}.jsonl").write_text("\n".join(lines))
    corpus, model = f"jsonl:{root / 'corpus'}", root / "bpe.model"
    train(open_corpus(corpus), str(model), vocab_size=320, heldout_fraction=FRACTION)
    config = DataConfig(
        corpus=corpus, tokenizer=f"sentencepiece:{model}", heldout_fraction=FRACTION,
        sequence_length=16, cache_dir=str(root / "cache"),
    )  # fmt: skip
    data = open_data(config)
    total = sum(count.tokens for count in data.files.counts["train"].values())
    kept = pack.pack(data, root / "out", max_tokens=total * 3 // 4, tokenizer=model)
    assert 0.6 * total < kept <= 0.75 * total
    return root, data


def config_of(root, **changes):
    settings = {
        "corpus": f"packed:{root / 'out'}", "tokenizer": f"sentencepiece:{root / 'out/bpe.model'}",
        "heldout_fraction": FRACTION, "sequence_length": 16, "cache_dir": str(root / "elsewhere"),
    }  # fmt: skip
    return DataConfig(**{**settings, **changes})


def test_the_held_out_split_is_whole_and_training_is_the_beginning_of_every_domain(packed):
    root, whole = packed
    data = open_data(config_of(root))
    assert data.domains == whole.domains == ("a", "b")
    for domain in data.domains:
        ours, theirs = (np.load(d.files.tokens_path("train", domain)) for d in (data, whole))
        assert 0 < len(ours) < len(theirs) and (ours == theirs[: len(ours)]).all()
        offsets = np.load(data.files.offsets_path("train", domain))
        assert offsets[-1] == len(ours) and ours[-1] == whole.tokenizer.eos_id
        assert data.files.counts["train"][domain].tokens == len(ours)
    batches = [heldout_batches(d, batch_size=2, max_batches=None) for d in (data, whole)]
    for a, b in zip(*batches, strict=True):
        assert all((a[name] == b[name]).all() for name in a)
    assert next(train_batches(data, global_batch_size=2))["inputs"].shape == (2, 16)


def test_its_checksum_is_its_own_and_the_same_wherever_it_lies(packed):
    root, whole = packed
    data = open_data(config_of(root))
    assert data.fingerprints["corpus"] != whole.fingerprints["corpus"]
    assert data.fingerprints["tokenizer"] == whole.fingerprints["tokenizer"]
    moved = root / "moved"
    moved.mkdir()
    for path in (root / "out").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    there = open_data(config_of(root, corpus=f"packed:{moved}"))
    assert there.fingerprints == data.fingerprints


def test_what_does_not_fit_is_refused(packed, tmp_path):
    root, whole = packed
    with pytest.raises(
        ValueError, match=r"packed tokens must match the run's heldout_fraction: .*0.2"
    ):
        _ = open_data(config_of(root, heldout_fraction=0.2)).files
    with pytest.raises(ValueError, match=r"packed tokens must match the run's tokenizer"):
        _ = open_data(config_of(root, tokenizer="byte")).files
    with pytest.raises(
        ValueError, match=r"A packed corpus has manifest.json, which must be a file"
    ):
        open_data(config_of(root, corpus=f"packed:{tmp_path}"))
    with pytest.raises(ValueError, match="A packed corpus has only tokens"):
        next(open_corpus(f"packed:{root / 'out'}").documents("a", 0.1))
    with pytest.raises(ValueError, match="Output must go to a new directory"):
        pack.pack(whole, root / "out", max_tokens=10, tokenizer=root / "bpe.model")
    with pytest.raises(ValueError, match=r"--max_tokens must be above 0: --max_tokens=0"):
        pack.pack(whole, tmp_path / "x", max_tokens=0, tokenizer=root / "bpe.model")
    short = r"keep a document to train on: the first of 'a' has [\d,]+ tokens, its share .* is 5\."
    with pytest.raises(ValueError, match=short):
        pack.pack(whole, tmp_path / "x", max_tokens=11, tokenizer=root / "bpe.model")
    assert list(tmp_path.iterdir()) == []


def test_the_command_packs_at_most_max_tokens_and_says_what_it_left_out(
    packed, tmp_path, monkeypatch, capsys
):
    root, whole = packed
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    total = sum(count.tokens for count in whole.files.counts["train"].values())
    for most, name in ((total // 2, "half"), (10**9, "all")):
        code = pack.command(
            [f"--corpus=jsonl:{root / 'corpus'}", f"--tokenizer=sentencepiece:{root / 'bpe.model'}",
             f"--heldout_fraction={FRACTION}", f"--max_tokens={most}", f"--out={tmp_path / name}"]
        )  # fmt: skip
        assert code == 0
    half, left_out, everything = capsys.readouterr().out.splitlines()
    kept, left = (int(line.split()[0].replace(",", "")) for line in (half, left_out))
    assert kept + left == total and f"were left out: --max_tokens={total // 2}," in left_out
    assert everything.startswith(f"{total:,} of {total:,} training tokens in ")


def test_the_command_names_fields_and_tokens_as_a_run_does(tmp_path, packed, monkeypatch, capsys):
    """Without the flags, such a corpus can neither be packed nor read with its own tokens."""
    root, _ = packed
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [json.dumps({"content": f"apple {n} " * 9}) + "\n" for n in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    model = f"sentencepiece:{root / 'bpe.model'}"
    command = [f"--corpus={tmp_path / 'd.jsonl'}", f"--tokenizer={model}",
               f"--heldout_fraction={FRACTION}", f"--out={tmp_path / 'out'}"]  # fmt: skip
    with pytest.raises(SystemExit):
        pack.command(command)
    assert "Set --text_field, here to one of ['content']" in capsys.readouterr().err
    assert pack.command([*command, "--text_field=content", "--eos_token=<s>"]) == 0
    settings = {"corpus": f"packed:{tmp_path / 'out'}", "tokenizer": model}
    data = open_data(config_of(root, **settings, eos_token="<s>"))
    [domain] = data.domains
    tokens = np.load(data.files.tokens_path("train", domain))
    assert tokens[-1] == data.tokenizer.eos_id == data.tokenizer.bos_id


def test_tokens_of_another_folder_and_a_lack_of_held_out_text_are_named(packed, tmp_path):
    root, whole = packed
    texts = {"few": 3, "more": 30}
    for name, count in texts.items():
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"text": f"{name} {n} " * 9}) + "\n" for n in range(count)]
        (folder / "d.jsonl").write_text("".join(lines))
        config = dataclasses.replace(
            whole.config, corpus=str(folder), heldout_fraction=1e-9 if name == "few" else FRACTION
        )
        pack.pack(open_data(config), folder / "out", max_tokens=10**6, tokenizer=root / "bpe.model")
    (tmp_path / "more/out/tokens.tar.xz").replace(tmp_path / "tokens.tar.xz")
    shutil.copyfile(root / "out/tokens.tar.xz", tmp_path / "more/out/tokens.tar.xz")
    config = config_of(root, corpus=f"packed:{tmp_path}/more/out", cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"the tokens that its manifest names: 'packed.* others"):
        _ = open_data(config).files
    (tmp_path / "tokens.tar.xz").replace(tmp_path / "more/out/tokens.tar.xz")
    assert open_data(config).files.counts, "with its own tokens it is whole"
    few = config_of(root, corpus=f"packed:{tmp_path}/few/out", heldout_fraction=1e-9)
    with pytest.raises(ValueError, match="Pack it again with a larger --heldout_fraction, and set"):
        check_data(open_data(few))


def test_damage_is_found(packed, tmp_path):
    root, _ = packed
    for path in (root / "out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = config_of(root, corpus=f"packed:{tmp_path}", cache_dir=str(tmp_path / "cache"))
    files = open_data(config).files
    path = files.tokens_path("train", "a")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    again = open_data(config).files  # unpacked again
    assert np.load(again.tokens_path("train", "a"))[-1] != 0
    archive = tmp_path / "tokens.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-200])
    cold = config_of(root, corpus=f"packed:{tmp_path}", cache_dir=str(tmp_path / "cold"))
    with pytest.raises(ValueError, match="An archive of tokens must be as it was written"):
        _ = open_data(cold).files
    whole_archive = bytearray((root / "out/tokens.tar.xz").read_bytes())
    whole_archive[len(whole_archive) // 2] ^= 0xFF
    archive.write_bytes(whole_archive)
    with pytest.raises(ValueError, match="An archive of tokens must be as it was written"):
        _ = open_data(cold).files
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest of a packed corpus must be as it was written"):
        open_data(config)
    with tarfile.open(root / "out/tokens.tar.xz") as whole:
        assert len(whole.getnames()) == 8  # two files per domain and split
