"""Token files: contents, cache keys, and leftovers of a kill or a second builder."""

import errno
import itertools
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from moe_jax.data import corpora, token_files, tokenizers
from moe_jax.data.documents import split_of

BYTE = tokenizers.ByteTokenizer()


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for domain in ("one", "two"):
        lines = [json.dumps({"id": f"{i}", "text": f"{domain} é {i}"}) for i in range(100)]
        (directory / f"{domain}.jsonl").write_text("\n".join(lines))
    return corpora.open_corpus(f"jsonl:{directory}")


def prepare(corpus, cache, fraction=0.2, tokenizer=BYTE):
    return token_files.prepare_token_files(
        corpus, tokenizer, heldout_fraction=fraction, cache_dir=str(cache)
    )


def test_documents_are_stored_in_order_with_their_offsets(corpus, tmp_path):
    files = prepare(corpus, tmp_path / "cache")
    for split in ("train", "heldout"):
        tokens = np.load(files.tokens_path(split, "two"), mmap_mode="r")
        offsets = np.load(files.offsets_path(split, "two"))
        assert (tokens.dtype, offsets.dtype) == (np.uint16, np.int64)
        assert (offsets[0], offsets[-1]) == (0, len(tokens))
        stored = [BYTE.decode(tokens[a:b]) for a, b in itertools.pairwise(offsets)]
        expected = [d.text for s, d in corpus.documents("two", 0.2) if s == split]
        assert stored == expected
        assert tokens[0] == BYTE.bos_id
        assert tokens[offsets[1] - 1] == BYTE.eos_id


def test_the_manifest_says_what_the_files_were_made_from(corpus, tmp_path):
    files = prepare(corpus, tmp_path / "cache")
    manifest = json.loads((files.directory / "manifest.json").read_text())
    assert manifest["corpus"] == corpus.name
    assert manifest["corpus_sha256"] == corpus.fingerprint()
    assert manifest["tokenizer"] == "byte"
    counts = [files.counts[split]["one"] for split in ("train", "heldout")]
    assert sum(c.documents for c in counts) == 100
    assert sum(c.bytes for c in counts) == sum(len(f"one é {i}".encode()) for i in range(100))
    assert all(c.tokens == c.bytes + 2 * c.documents for c in counts)


def test_files_are_made_once_and_anew_when_anything_changes(corpus, tmp_path):
    first = prepare(corpus, tmp_path / "cache")
    stamp = (first.directory / "manifest.json").stat().st_mtime_ns
    again = prepare(corpus, tmp_path / "cache")
    assert again == first
    assert (again.directory / "manifest.json").stat().st_mtime_ns == stamp
    assert prepare(corpus, tmp_path / "cache", fraction=0.1).directory != first.directory


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_files.default_cache_dir() == tmp_path / "moe_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_files.default_cache_dir() == tmp_path / ".cache" / "moe_jax"


KILLED_BUILDER = """
    import os, signal, sys
    from moe_jax.data import corpora, token_files, tokenizers

    class Killed(corpora.FileCorpus):
        def documents(self, domain, heldout_fraction):
            for number, item in enumerate(super().documents(domain, heldout_fraction)):
                self.passes = getattr(self, "passes", 0) + (number == 0)
                if (self.passes, number) == (4, 50):  # of two domains, the second time
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

    token_files.prepare_token_files(
        Killed(f"jsonl:{sys.argv[1]}", sys.argv[1]), tokenizers.ByteTokenizer(),
        heldout_fraction=0.2, cache_dir=sys.argv[2],
    )
"""


def test_a_kill_leaves_no_half_cache_and_the_next_start_repairs(corpus, tmp_path):
    cache = tmp_path / "cache"
    directory = corpus.name.removeprefix("jsonl:")
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_BUILDER), directory, str(cache)]
    )
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in cache.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].endswith(".partial")

    files = prepare(corpus, cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == [files.directory]
    whole = prepare(corpus, tmp_path / "other_cache")
    assert files.counts == whole.counts
    assert (
        files.tokens_path("train", "two").read_bytes()
        == whole.tokens_path("train", "two").read_bytes()
    )


def test_an_error_while_building_leaves_nothing(corpus, tmp_path):
    class Broken(corpora.FileCorpus):
        def documents(self, domain, heldout_fraction):
            yield from super().documents(domain, heldout_fraction)
            raise OSError("disk gone")

    broken = Broken(corpus.name, corpus.name.removeprefix("jsonl:"))
    with pytest.raises(OSError, match="disk gone"):
        prepare(broken, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_concurrent_builders_make_the_files_once(corpus, tmp_path):
    passes = []

    class Counted(corpora.FileCorpus):
        def documents(self, domain, heldout_fraction):
            passes.append(domain)
            return super().documents(domain, heldout_fraction)

    results = []

    def build():
        counted = Counted(corpus.name, corpus.name.removeprefix("jsonl:"))
        results.append(prepare(counted, tmp_path / "cache"))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert sorted(passes) == ["one", "one", "two", "two"]  # one pass for held-out text, one for all


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def cut(path):
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def other_counts(path):
    path.chmod(0o644)
    path.write_text(re.sub(r'"tokens": (\d)', r'"tokens": 9\1', path.read_text()))


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip, "train/two.tokens.npy"),
        (flip, "heldout/one.tokens.npy"),
        (flip, "train/one.offsets.npy"),
        (cut, "train/two.tokens.npy"),
        (pathlib.Path.unlink, "heldout/two.offsets.npy"),
        (cut, "manifest.json"),
        (other_counts, "manifest.json"),
        (pathlib.Path.unlink, "manifest.json"),
    ],
)
def test_a_damaged_cache_is_made_again_and_said(corpus, tmp_path, caplog, damage, name):
    files = prepare(corpus, tmp_path / "cache")
    whole = {p: p.read_bytes() for p in files.directory.rglob("*") if p.is_file()}
    damage(files.directory / name)
    assert prepare(corpus, tmp_path / "cache") == files
    assert {p: p.read_bytes() for p in files.directory.rglob("*") if p.is_file()} == whole
    (message,) = caplog.messages
    assert "\n" not in message and f"damaged: {name} is not as it was written" in message
    caplog.clear()
    prepare(corpus, tmp_path / "cache")
    assert not caplog.messages


def test_files_of_another_corpus_in_its_place_are_made_again(corpus, tmp_path, caplog):
    files = prepare(corpus, tmp_path / "cache")
    other = prepare(corpus, tmp_path / "cache", fraction=0.5)
    shutil.rmtree(files.directory)
    shutil.copytree(other.directory, files.directory)
    assert prepare(corpus, tmp_path / "cache") == files
    assert "manifest.json is not as it was written" in caplog.text


def test_files_are_read_only(corpus, tmp_path):
    files = prepare(corpus, tmp_path / "cache")
    modes = {p.stat().st_mode & 0o777 for p in files.directory.rglob("*") if p.is_file()}
    assert modes == {0o444}


def test_a_training_document_that_repeats_a_heldout_text_is_left_out(tmp_path, caplog):
    """Copies differ in id, domain and surrounding white space."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    texts = {f"{i}": f"tale {i}" for i in range(50)}
    heldout = [id_ for id_ in texts if split_of(id_, 0.2) == "heldout"]
    copies = {
        f"copy {i}": texts[i] + "\n" for i in heldout if split_of(f"copy {i}", 0.2) == "train"
    }
    assert len(heldout) > 4 < len(copies)
    for domain, documents in (("one", texts), ("two", copies | {"fresh": "another"})):
        lines = [json.dumps({"id": id_, "text": text}) for id_, text in documents.items()]
        (directory / f"{domain}.jsonl").write_text("\n".join(lines))
    files = prepare(corpora.open_corpus(str(directory)), tmp_path / "cache")
    assert split_of("fresh", 0.2) == "train" and files.counts["train"]["two"].documents == 1
    assert files.counts["train"]["one"].documents == 50 - len(heldout)
    assert f"{len(copies)} training documents" in caplog.text


def test_of_a_corpus_of_one_text_again_and_again_nothing_trains(tmp_path):
    records = [{"id": i, "text": "It was a dark and stormy night."} for i in range(10)]
    path = tmp_path / "web.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    files = prepare(corpora.open_corpus(str(path)), tmp_path / "cache", fraction=0.5)
    assert files.counts["train"]["web"].documents == 0 < files.counts["heldout"]["web"].documents


def test_a_whole_copy_of_a_document_of_which_the_end_is_held_out_does_not_train(tmp_path):
    text = "".join(f"line {i}\n" for i in range(50))
    records = [{"text": text, "heldout": "tail"}, {"text": text}, {"text": "short"}]
    path = tmp_path / "web.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    files = prepare(corpora.open_corpus(str(path)), tmp_path / "cache", fraction=0.1)
    tokens = np.load(files.tokens_path("train", "web"))
    assert "line 48" in BYTE.decode(np.load(files.tokens_path("heldout", "web")))
    assert BYTE.decode(tokens).count("line 0\n") == 1 and "line 48" not in BYTE.decode(tokens)


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"written to a cache: .*file.*set config\.data\.cache_dir"):
        prepare(corpus, tmp_path / "file")


def test_a_full_disk_is_named(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_files, "flush_to_disk", full)
    with pytest.raises(OSError, match=r"cache: No space left on device\. Make room"):
        prepare(corpus, tmp_path / "cache")


class ManyIds(tokenizers.ByteTokenizer):
    """A tokenizer that maps bytes to ids above 65,535."""

    name = "many"
    vocab_size = 70_384

    def encode(self, text):
        return super().encode(text).astype(np.uint32) + 70_000

    def fingerprint(self):
        return "many"


def test_ids_beyond_65535_are_kept(corpus, tmp_path):
    files = prepare(corpus, tmp_path / "cache", tokenizer=ManyIds())
    tokens = np.load(files.tokens_path("train", "one"))
    assert tokens.dtype == files.dtype == np.uint32
    assert tokens[1] == 70_003 + ord("o") and tokens[0] == BYTE.bos_id
    assert prepare(corpus, tmp_path / "cache", tokenizer=ManyIds()) == files


def test_a_corpus_of_no_text_is_refused(tmp_path):
    (tmp_path / "web.jsonl").write_text('{"text": ""}\n\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"must have text: '.*web\.jsonl' has none in \['web'\]"):
        prepare(corpora.open_corpus(f"{tmp_path}/web.jsonl"), tmp_path / "cache")


def test_a_fraction_out_of_range_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"in \[0, 1\): got 1\.5"):
        prepare(corpus, tmp_path / "cache", fraction=1.5)
