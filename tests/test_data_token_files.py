"""Token files: contents, cache keys, and what a kill or a second builder leaves behind."""

import itertools
import json
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from moe_jax.data import corpora, token_files, tokenizers

BYTE = tokenizers.ByteTokenizer()


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for domain in ("one", "two"):
        lines = [json.dumps({"id": f"{i}", "text": f"{domain} é {i}"}) for i in range(100)]
        (directory / f"{domain}.jsonl").write_text("\n".join(lines))
    return corpora.JsonlCorpus(str(directory))


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

    class Killed(corpora.JsonlCorpus):
        def documents(self, domain, heldout_fraction):
            for number, item in enumerate(super().documents(domain, heldout_fraction)):
                if (domain, number) == ("two", 50):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

    token_files.prepare_token_files(
        Killed(sys.argv[1]), tokenizers.ByteTokenizer(), heldout_fraction=0.2, cache_dir=sys.argv[2]
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
    assert ".partial-" in left[0]

    files = prepare(corpus, cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == [files.directory]
    whole = prepare(corpus, tmp_path / "other_cache")
    assert files.counts == whole.counts
    assert (
        files.tokens_path("train", "two").read_bytes()
        == whole.tokens_path("train", "two").read_bytes()
    )


def test_an_error_while_building_leaves_nothing(corpus, tmp_path):
    class Broken(corpora.JsonlCorpus):
        def documents(self, domain, heldout_fraction):
            yield from super().documents(domain, heldout_fraction)
            raise OSError("disk gone")

    broken = Broken(corpus.name.removeprefix("jsonl:"))
    with pytest.raises(OSError, match="disk gone"):
        prepare(broken, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_concurrent_builders_make_the_files_once(corpus, tmp_path):
    passes = []

    class Counted(corpora.JsonlCorpus):
        def documents(self, domain, heldout_fraction):
            passes.append(domain)
            return super().documents(domain, heldout_fraction)

    results = []

    def build():
        counted = Counted(corpus.name.removeprefix("jsonl:"))
        results.append(prepare(counted, tmp_path / "cache"))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert sorted(passes) == ["one", "two"]


def test_files_of_another_format_version_are_refused(corpus, tmp_path):
    files = prepare(corpus, tmp_path / "cache")
    manifest_path = files.directory / "manifest.json"
    manifest_path.write_text(manifest_path.read_text().replace('version": 1', 'version": 0'))
    with pytest.raises(ValueError, match=r"format version 1: .* has 0\. Delete the directory"):
        prepare(corpus, tmp_path / "cache")


def test_a_fraction_out_of_range_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"in \[0, 1\): got 1\.5"):
        prepare(corpus, tmp_path / "cache", fraction=1.5)
