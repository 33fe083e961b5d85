"""Corpora of files: which files are read, domains, held-out splits, refusals."""

import codecs
import errno
import gzip
import json
import os
import pathlib
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_jax.data import records
from moe_jax.data.corpora import form_of, open_corpus
from moe_jax.data.records import Fields


def texts(corpus, fraction=0.0):
    """{(split, domain): texts}."""
    found = {}
    for domain in corpus.domains():
        for split, document in corpus.documents(domain, fraction):
            found.setdefault((split, domain), []).append(document.text)
    return found


def write_lines(path, *records, prefix=b"", end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(prefix + b"".join(f"{json.dumps(r)}{end}".encode() for r in records))
    return path


def write_table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def save_dataset(folder, **columns):
    """Writes what `datasets.Dataset.save_to_disk` leaves, in two files."""
    folder.mkdir(parents=True)
    table, names = pa.table(columns), []
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        names.append(f"data-0000{number}-of-00002.arrow")
        with pa.ipc.new_stream(str(folder / names[-1]), table.schema) as writer:
            writer.write_table(part)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )


def test_text_files_of_a_folder_are_documents_of_one_domain(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "b.txt").write_bytes(codecs.BOM_UTF8 + "é\r\nend".encode())
    (folder / "a.md").write_text("# first")
    (folder / "empty.txt").write_text("")
    (folder / "._a.txt").write_bytes(b"\0\xff")
    (folder / "image.png").write_bytes(b"\x89PNG")
    assert texts(open_corpus(str(folder))) == {("train", "notes"): ["# first", "é\nend"]}


def test_subfolders_are_domains(tmp_path):
    for name in ("loose.txt", "de/x.txt", "en/deep/y.txt", "en/z.txt", ".git/w.txt"):
        path = tmp_path / "c" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = {domain: t for (_, domain), t in texts(open_corpus(str(tmp_path / "c"))).items()}
    expected = {"de": ["de/x.txt"], "en": ["en/deep/y.txt", "en/z.txt"], "c": ["loose.txt"]}
    assert found == expected
    (tmp_path / "c/c").mkdir()
    (tmp_path / "c/c/v.txt").write_text("v")
    with pytest.raises(ValueError, match=r"loose\.txt and .*v\.txt are both 'c'. Rename"):
        open_corpus(str(tmp_path / "c"))


def test_the_end_of_a_document_alone_or_long_is_held_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    found = texts(open_corpus(str(path)), 0.1)
    assert found["heldout", "book"] == ["".join(f"line {i}\n" for i in range(91, 100))]
    for name in ("one", "two"):
        (tmp_path / "books" / name).mkdir(parents=True)
        (tmp_path / "books" / name / "a.txt").write_text("word\n" * 3000)
        (tmp_path / "books" / name / "b.txt").write_text("other\n" * 3000)
    found = texts(open_corpus(str(tmp_path / "books")), 0.1)
    assert [len(t) for t in found["heldout", "one"]] == [1495, 1794]


def test_each_jsonl_file_is_a_domain_and_shards_are_one(tmp_path):
    for name in ("web", "code-00000-of-00002", "code-00001-of-00002", "books/a", "books/b"):
        write_lines(tmp_path / f"{name}.jsonl", {"text": name})
    (tmp_path / "README.md").write_text("about the data")
    found = {domain: t for (_, domain), t in texts(open_corpus(str(tmp_path))).items()}
    shards = ["code-00000-of-00002", "code-00001-of-00002"]
    assert found == {"books": ["books/a", "books/b"], "code": shards, "web": ["web"]}


def test_numbers_are_shards_from_zero_without_gaps_and_dates_are_not(tmp_path):
    names = ("news-20240101", "news-20240102", "run-9999", "run-10000", "web-00000", "web-00001")
    gap = ("old-00000", "old-00002")
    for name in (*names, *gap):
        write_lines(tmp_path / f"{name}.jsonl", {"text": name})
    assert set(open_corpus(str(tmp_path)).domains()) == {*names[:4], *gap, "web"}


def packed(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        # Two frames, as tools that append write them.
        middle = data.index(b"\n") + 1
        parts = (data[:middle], data[middle:])
        path.write_bytes(b"".join(pa.Codec("zstd").compress(p, asbytes=True) for p in parts))
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["web.jsonl", "web.jsonl.gz", "web.jsonl.zst"])
def test_json_lines_may_be_packed_and_start_with_a_byte_order_mark(tmp_path, name):
    data = codecs.BOM_UTF8 + b'{"text": "one"}\r\n\r\n{"id": 7, "text": "two", "group": 3}\n \n'
    corpus = open_corpus(str(packed(tmp_path / name, data)))
    documents = [document for _, document in corpus.documents("web", 0.0)]
    assert [document.text for document in documents] == ["one", "two"]
    assert (documents[1].id, documents[1].group) == ("7", "3")
    assert documents[0].id.endswith(f"{name} line 1")


def test_documents_without_ids_fall_to_a_split_by_their_text(tmp_path):
    records = [{"text": f"text {i % 40}"} for i in range(80)]
    found = texts(open_corpus(str(write_lines(tmp_path / "web.jsonl", *records))), 0.3)
    train, heldout = found["train", "web"], found["heldout", "web"]
    assert not set(train) & set(heldout) and 5 < len(heldout) < 40


def test_parquet_and_hugging_face_datasets_are_read_by_columns(tmp_path):
    columns = {"body": [f"text {i}" for i in range(5)], "n": list(range(5)), "id": ["x"] * 5}
    fields = Fields(text="body", id="n")
    write_table(tmp_path / "tables" / "web.parquet", **columns)
    save_dataset(tmp_path / "saved", **columns)
    for path, domain in (("tables/web.parquet", "web"), ("tables", "web"), ("saved", "saved")):
        corpus = open_corpus(str(tmp_path / path), fields)
        documents = [document for _, document in corpus.documents(domain, 0.0)]
        assert [(d.id, d.text) for d in documents] == [(f"{i}", f"text {i}") for i in range(5)]


@pytest.mark.parametrize("kind", ["lines", "folders", "shards", "dataset"])
def test_files_called_train_and_validation_are_splits(tmp_path, kind):
    folder = tmp_path / "mine"
    if kind == "lines":
        for split in ("train", "validation", "test"):
            write_lines(folder / f"{split}.jsonl", {"text": split})
    elif kind == "folders":
        for split in ("train", "validation", "test"):
            write_lines(folder / split / "mine.jsonl", {"text": split})
    elif kind == "shards":
        for split in ("train", "validation", "test"):
            write_table(folder / "mine" / f"{split}-00000-of-00001.parquet", text=[split])
    else:
        folder.mkdir()
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
        for split in ("train", "validation", "test"):
            save_dataset(folder / split, text=[split] * 3)
    repeats = 3 if kind == "dataset" else 1
    assert texts(open_corpus(str(folder)), 0.5) == {
        ("train", "mine"): ["train"] * repeats, ("heldout", "mine"): ["validation"] * repeats
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "train", "heldout"),
    [
        # Names used by WikiText and PTB.
        (["train.txt", "valid.txt", "test.txt"], {"mine": ["train.txt"]}, {"mine": ["valid.txt"]}),
        (["p.train.txt", "p.test.txt"], {"mine": ["p.train.txt"]}, {"mine": ["p.test.txt"]}),
        (["en/train.txt", "en/test.txt"], {"en": ["en/train.txt"]}, {"en": ["en/test.txt"]}),
        (["train/test.txt", "dev/a.txt"], {"mine": ["train/test.txt"]}, {"mine": ["dev/a.txt"]}),
        (
            ["Train.jsonl", "Validation.jsonl"],
            {"mine": ["Train.jsonl"]},
            {"mine": ["Validation.jsonl"]},
        ),
        (
            ["a.train.jsonl", "a.valid.jsonl", "b_train.jsonl"],
            {"a": ["a.train.jsonl"], "b": ["b_train.jsonl"]},
            {"a": ["a.valid.jsonl"]},
        ),
        (["dev/train.txt", "dev/val.txt"], {"dev": ["dev/train.txt"]}, {"dev": ["dev/val.txt"]}),
        (
            ["train/a.txt", "valid/a.txt", "test/train.txt"],
            {"mine": ["train/a.txt"]},
            {"mine": ["valid/a.txt"]},
        ),
        # No pair of splits: the names are ordinary files.
        (["train/a.txt", "train/test.txt"], {"train": ["train/a.txt", "train/test.txt"]}, {}),
        (["night-train.txt", "test.txt"], {"mine": ["night-train.txt", "test.txt"]}, {}),
        (["a.txt", "test.txt"], {"mine": ["a.txt", "test.txt"]}, {}),
    ],
)  # fmt: skip
def test_names_of_splits_in_any_case_and_after_a_name_are_splits(tmp_path, names, train, heldout):
    for name in names:
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    expected = {("train", domain): t for domain, t in train.items()}
    expected |= {("heldout", domain): t for domain, t in heldout.items()}
    assert texts(open_corpus(str(tmp_path / "mine"))) == expected


def test_a_file_of_no_split_beside_splits_is_refused(tmp_path):
    for name in ("train", "test", "code"):
        write_lines(tmp_path / f"{name}.jsonl", {"text": name})
    with pytest.raises(
        ValueError, match=r"splits train and test must have no other files: .*code\.json"
    ):
        open_corpus(str(tmp_path))


def test_a_fingerprint_follows_contents_splits_and_fields(tmp_path):
    def fingerprint(name, fields=None):
        return open_corpus(str(tmp_path / name), fields).fingerprint()

    for name in ("a/web.jsonl", "b/web.jsonl", "c/train/web.jsonl", "c/test/web.jsonl"):
        write_lines(tmp_path / name, {"text": "t", "body": "b"})
    assert fingerprint("a") == fingerprint("b") != fingerprint("c")
    assert fingerprint("a") != fingerprint("a", Fields(text="body"))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/one.txt").write_text("one")
    before = fingerprint("t")
    (tmp_path / "t/two.txt").write_text("")
    assert fingerprint("t") != before


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"one of \.txt, .*: none in "),
        ({"x.csv": b"a"}, r"one of \.txt, .*: none in "),
        ({"x.txt": b"a", "y.jsonl": b"{}"}, r"x\.txt \(text\), y\.jsonl \(jsonl\)\. Move .*jsonl:"),
        ({"x.parquet": b"a", "y.jsonl": b"{}"}, r"x\.parquet \(parquet\), y\.jsonl \(jsonl\)"),
        ({"x.txt": "café".encode("latin-1")}, r"x\.txt line 1 has the byte 0xe9.*iconv -f LATIN1"),
        ({"x.txt": random.Random(0).randbytes(999)}, r"must contain text: .* 999 bytes.*x\.txt"),
        (
            {"x.jsonl.gz": gzip.compress('{"text": "café"}'.encode("latin-1"))},
            r"Unpack the file, and convert it, .*: iconv -f LATIN1 -t UTF-8 \S*x\.jsonl\.",
        ),
        ({"x.txt": "a".encode("utf-16")}, r"x\.txt is UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ({"x.txt": b"a\nb\0c"}, r"x\.txt has a NUL byte in line 2"),
        ({"x.txt": LFS}, r"x\.txt is a Git LFS pointer.*git lfs pull"),
        ({"x.parquet": LFS}, r"x\.parquet is a Git LFS pointer"),
        ({"x.parquet": b"PAR1 cut"}, r"x\.parquet is damaged, cut short, or not \.parquet"),
        ({"state.json": b'{"_data_files": [1'}, r"list its _data_files: .*state\.json does not"),
        ({"state.json": b'{"_data_files": [{"filename": "x"}]}'}, r"lists: there is no"),
        ({"dataset_dict.json": b'{"splits": ["train"]}'}, r"there is no .*train\. Copy or save"),
        ({"x.arrow": b"cut"}, r"x\.arrow is damaged, cut short, or not \.arrow"),
        ({"x.jsonl": b'{"text": "a"}\n{"text": "b'}, r"x\.jsonl line 2 is "),
        ({"x.jsonl": b'{"text": null}'}, r"x\.jsonl line 1 has null. Leave the record out"),
        ({"x.jsonl": b'{"text": ["a"], "t": ""}'}, r"line 1 has list .*text_field.*one of \['t'\]"),
        ({"x.jsonl": b'{"body": "a"}'}, r"line 1 has the fields \['body'\].*one of \['body'\]"),
        ({"x.jsonl": b'{"text": "a", "id": [1]}'}, r"Field 'id' .* line 1 has list '\[1\]'"),
        (
            {"x.jsonl": b'{"text": "a", "group": "g", "heldout": "tail"}'},
            r"line 1 has the group 'g' and \"heldout\": \"tail\"\. Leave one of them out",
        ),
        ({"x.jsonl": b'{"text": "a", "group": true}'}, r"Field 'group' .* line 1 has bool"),
        ({"x.jsonl": b'{"text": "\\ud83d"}'}, r"line 1 has a lone surrogate '\\ud83d'"),
        ({"x.jsonl": '{"text": "é"}'.encode("latin-1")}, r"x\.jsonl line 1 has the byte 0xe9"),
        ({"x.jsonl": '{"text": "é"}'.encode("utf-16")}, r"x\.jsonl line 1 is UTF-16"),
        ({"x.jsonl": b"[" * 100_000}, r"x\.jsonl line 1 is '\[\["),
        ({"x.jsonl.gz": gzip.compress(b'{"text": "a"}')[:-9]}, r"x\.jsonl\.gz is damaged, cut sh"),
        ({"x.jsonl.gz": b'{"text": "a"}'}, r"x\.jsonl\.gz is damaged, cut short, or not \.gz"),
        ({"x.jsonl.zst": b'{"text": "a"}'}, r"x\.jsonl\.zst is damaged, cut short, or not \.zst"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as refused:
        texts(open_corpus(str(tmp_path)))
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    "write", [write_table, lambda path, **c: save_dataset(path.parent / "d", **c)]
)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [[1]], "title": ["a"]}, r"has it as list<.*one of \['title'\]"),
        ({"body": ["a"], "n": [1]}, r"columns \['body', 'n'\]. Set .*one of \['body'\]"),
        ({"text": ["a", None]}, r"row 2 has null"),
    ],
)  # fmt: skip
def test_columns_that_are_no_text_are_refused(tmp_path, write, columns, message):
    write(tmp_path / "x.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        texts(open_corpus(str(tmp_path / ("d" if (tmp_path / "d").exists() else "x.parquet"))))


def test_a_file_beside_the_same_file_packed_is_refused(tmp_path):
    write_lines(tmp_path / "web.jsonl", {"text": "t"})
    packed = tmp_path / "web.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "web.jsonl").read_bytes()))
    with pytest.raises(ValueError, match=r"once, packed or not: .*web\.jsonl\.gz and .* same name"):
        open_corpus(str(tmp_path))
    packed.rename(tmp_path / "other.jsonl.gz")
    assert open_corpus(str(tmp_path)).domains() == ("other", "web")


def test_the_setting_of_a_field_is_named():
    with pytest.raises(ValueError, match=r"'key' must name .* or set config\.data\.id_field\."):
        records.document_of({"text": "a", "key": 1.5}, "f line 1", "d", Fields(id="key"))
    with pytest.raises(ValueError, match=r"Correct config\.data\.group_field, or the record\."):
        records.document_of({"text": "a"}, "f line 1", "d", Fields(group="key"))


@pytest.mark.parametrize("name", ["embedded", "text:DIR", "packed:DIR", "tfds:DIR"])
def test_pairs_are_of_json_lines(name):
    with pytest.raises(ValueError, match="Prompts and answers can be read only from JSON lines"):
        open_corpus(name, Fields(conversations=True))


def test_a_file_or_folder_that_is_reached_twice_is_refused(tmp_path):
    write_lines(tmp_path / "a" / "web.jsonl", {"text": "t"})
    os.symlink(tmp_path / "a/web.jsonl", tmp_path / "a/again.jsonl")
    with pytest.raises(ValueError, match=r"web\.jsonl and .*again\.jsonl are the same"):
        open_corpus(str(tmp_path / "a"))
    (tmp_path / "a/again.jsonl").unlink()
    os.symlink(tmp_path / "a", tmp_path / "a/loop")
    with pytest.raises(ValueError, match=r"must reach each folder only once: .*loop is .* again"):
        open_corpus(str(tmp_path / "a"))


def test_fields_of_text_without_records_are_refused(tmp_path):
    for name in ("embedded", f"text:{tmp_path}"):
        with pytest.raises(ValueError, match="Text without records has no fields"):
            open_corpus(name, Fields(text="body"))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    corpus = open_corpus(str(write_lines(tmp_path / "web.jsonl", {"text": "t"})))
    monkeypatch.setattr(pathlib.Path, "open", forbidden)
    for read in (corpus.fingerprint, lambda: texts(corpus)):
        with pytest.raises(OSError, match=r"readable: .*web\.jsonl: Permission denied.*chmod \+r"):
            read()


def test_a_document_has_a_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 2**20)
    path = write_lines(tmp_path / "web.jsonl", {"text": "a" * (2**20 + 1)})
    with pytest.raises(ValueError, match=r"A document must have at most .*web\.jsonl line 1"):
        texts(open_corpus(str(path)))


@pytest.mark.parametrize("kind", ["gz", "parquet"])
def test_a_small_file_that_unpacks_to_much_is_never_in_memory_at_once(tmp_path, kind):
    text, repeats = "a" * 100_000, 400
    if kind == "gz":
        path = tmp_path / "bomb.jsonl.gz"
        with gzip.open(path, "wt") as file:
            file.writelines(f'{{"text": "{text}"}}\n' for _ in range(repeats))
    else:
        path = write_table(tmp_path / "bomb.parquet", text=[text] * repeats)
    assert path.stat().st_size < len(text) * repeats / 100
    corpus = open_corpus(str(path))
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    total, most = 0, 0
    for _, document in corpus.documents("bomb", 0.0):
        total += len(document.text)
        most = max(most, pa.total_allocated_bytes() - before)
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == len(text) * repeats and most < total / 4


@pytest.mark.parametrize(
    ("name", "form"),
    [("embedded", "embedded"), ("jsonl:/a/b", "jsonl"), ("/a/b", "path"), ("x.model", "path")],
)
def test_the_form_of_a_name_says_nothing_of_its_place(name, form):
    assert form_of(name) == form
