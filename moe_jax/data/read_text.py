"""Reads text files as documents."""

import pathlib
from collections.abc import Iterator

from moe_jax.config.check import require
from moe_jax.data.documents import Document
from moe_jax.data.open_file import decode, open_stream
from moe_jax.data.records import MAX_DOCUMENT_BYTES, TOO_LARGE, Fields, document_of

# The end of a file this long, such as a book, is held out. A shorter file is held out whole or not
# at all, because the end of a note means little without its beginning.
LONG = 10_000  # characters


def read_text(path: pathlib.Path, domain: str, fields: Fields) -> Iterator[tuple[Document, bool]]:
    """Reads a .txt or .md file as one document, with Unix line ends.

    Args:
        path: the file.
        domain: the domain of its documents.
        fields: unused.

    Yields:
        The document, and whether it is long.

    Raises:
        ValueError: the file is too large, not UTF-8, or not text.
    """
    del fields
    with open_stream(path) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    require(
        len(data) <= MAX_DOCUMENT_BYTES,
        TOO_LARGE,
        f"{path} has {path.stat().st_size >> 20}",
        f"Cut it up: split -C 100M --additional-suffix={path.suffix} {path} PART",
    )
    text = decode(data, str(path)).replace("\r\n", "\n")
    nul = text.find("\0")
    require(
        nul < 0,
        "A text file must contain text",
        f"{path} has a NUL byte in line {text.count(chr(10), 0, nul) + 1}",
        "Convert or remove it",
    )
    yield document_of({"text": text}, str(path), domain, Fields()), len(text) >= LONG
