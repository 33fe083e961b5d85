"""Assembling the corpus from stand-in sources."""

import json

import pytest

from moe_jax.data import corpora
from moe_jax.data.large_corpus import assemble, packages, readers, sources

PACKAGE = packages.Package("deb", "words")
LONG = "word " * 50


def source(domain, *texts, **changes):
    return sources.Source(domain, (PACKAGE,), "MIT", lambda paths: iter(texts), **changes)


def run(tmp_path, *table, max_code_bytes=10**6):
    (tmp_path / "words.deb").write_text("archive")
    return assemble.assemble(
        table, {PACKAGE: tmp_path / "words.deb"}, tmp_path / "out", max_code_bytes=max_code_bytes
    )


def records(tmp_path, domain):
    lines = (tmp_path / "out" / f"{domain}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_texts_become_records_of_a_jsonl_corpus(tmp_path):
    grouped = readers.Text("a", f"{LONG} one", "page")
    tailed = readers.Text("b", f"{LONG}\n" * 20)
    run(tmp_path, source("x", grouped), source("y", tailed, heldout=sources.BY_TAIL))
    assert records(tmp_path, "x") == [{"id": "words/a", "text": f"{LONG} one", "group": "page"}]
    corpus = corpora.open_corpus(f"jsonl:{tmp_path / 'out'}")
    assert corpus.domains() == ("x", "y")
    ((_, document),) = corpus.documents("x", 0.0)
    assert (document.id, document.group) == ("words/a", "page")
    (_, head), (_, tail) = corpus.documents("y", 0.1)
    assert head.text + tail.text == tailed.text


def test_short_and_repeated_texts_are_left_out(tmp_path):
    texts = [readers.Text("a", LONG), readers.Text("short", "word"), readers.Text("again", LONG)]
    (size,) = run(tmp_path, source("x", *texts))
    assert [record["id"] for record in records(tmp_path, "x")] == ["words/a"]
    assert (size.documents, size.bytes) == (1, len(LONG))


def test_sources_of_one_domain_share_its_file(tmp_path):
    run(tmp_path, source("x", readers.Text("a", LONG)), source("x", readers.Text("b", LONG + "!")))
    assert [record["id"] for record in records(tmp_path, "x")] == ["words/a", "words/b"]


def test_code_is_cut_off_and_text_is_not(tmp_path):
    texts = [readers.Text(str(i), f"{LONG}{i}") for i in range(10)]
    other = [readers.Text(str(i), f"{LONG}more{i}") for i in range(10)]
    table = (source("code_x", *texts), source("en_x", *other))
    code, text = run(tmp_path, *table, max_code_bytes=3 * len(LONG))
    assert (code.documents, text.documents) == (3, 10)


def test_sources_without_their_packages_are_left_out(tmp_path):
    other = sources.Source("z", (PACKAGE, packages.Package("npm", "none", "1")), "MIT", iter)
    sizes = run(tmp_path, source("x", readers.Text("a", LONG)), other)
    assert [size.domain for size in sizes] == ["x"]


def test_an_error_leaves_no_directory(tmp_path):
    def broken(paths):
        yield readers.Text("a", LONG)
        raise OSError("damaged archive")

    with pytest.raises(OSError, match="damaged"):
        run(tmp_path, sources.Source("x", (PACKAGE,), "MIT", broken))
    assert [path.name for path in tmp_path.iterdir()] == ["words.deb"]


def test_an_existing_directory_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(ValueError, match="out is there already"):
        run(tmp_path, source("x", readers.Text("a", LONG)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_sizes_and_packages_are_written_beside_the_text(tmp_path):
    run(tmp_path, source("x", readers.Text("a", LONG)))
    contents = json.loads((tmp_path / "out" / "sources.json").read_text())
    assert contents["packages"] == {"deb:words": "words.deb"}
    assert contents["sources"][0]["bytes"] == len(LONG)
