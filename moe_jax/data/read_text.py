"""Text files as documents."""

import pathlib
from collections.abc import Iterator

from moe_jax.config.check import require
from moe_jax.data.documents import Document
from moe_jax.data.open_file import decode, open_stream
from moe_jax.data.records import MAX_DOCUMENT_BYTES, TOO_LARGE, Fields, document_of

# A file this long, such as a book, gives its end to the held-out text; a shorter one is held out
# whole or not at all, since the end of a note says little without its beginning.
LONG = 10_000  # characters


def read_text(path: pathlib.Path, domain: str, fields: Fields) -> Iterator[tuple[Document, bool]]:
    """Reads a .txt or .md file as one document, with line ends as on Unix.

    Args:
        path: of the file.
        domain: that it belongs to.
        fields: without effect.

    Yields:
        The document, and whether it is long.

    Raises:
        ValueError: it is too large, not UTF-8, or not text.
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
        "A text file is text",
        f"{path} has a NUL byte in line {text.count(chr(10), 0, nul) + 1}",
        "Convert or remove it",
    )
    yield document_of({"text": text}, str(path), domain, Fields()), len(text) >= LONG
