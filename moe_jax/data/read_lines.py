"""Reads files of JSON lines as documents."""

import json
import pathlib
from collections.abc import Iterator

from moe_jax.config.check import require
from moe_jax.data.documents import Document
from moe_jax.data.open_file import decode, open_stream
from moe_jax.data.records import MAX_DOCUMENT_BYTES, TOO_LARGE, Fields, document_of


def read_lines(path: pathlib.Path, domain: str, fields: Fields) -> Iterator[tuple[Document, bool]]:
    """Reads a .jsonl file, also .gz or .zst, line by line; blank lines are skipped.

    Args:
        path: the file.
        domain: the domain of its documents.
        fields: fields of a line to read.

    Yields:
        The document, and whether the line has `"heldout": "tail"`.

    Raises:
        ValueError: with the file, the line and what is wrong with it.
    """
    with open_stream(path) as stream:
        number = 0
        # JSON escapes take up to six bytes per byte of text.
        while line := stream.readline(6 * MAX_DOCUMENT_BYTES + 1):
            number += 1
            where = f"{path} line {number}"
            require(len(line) <= 6 * MAX_DOCUMENT_BYTES, TOO_LARGE, where, "Cut it up")
            text = decode(line, where)
            if text.strip():
                record = _parse(text, where, fields.example)
                document = document_of(record, where, domain, fields)
                has_tail = record.get("heldout") == "tail"
                require(
                    not (has_tail and document.has_group),
                    "A document of a group is held out as a whole, like the rest of its group, or "
                    "not at all",
                    f'{where} has the group {document.group!r} and "heldout": "tail"',
                    "Leave one of them out",
                )
                yield document, has_tail


def _parse(line: str, where: str, example: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"Each line of a .jsonl corpus must be a JSON object such as {example}: "
            f"{where} is {line[:60]!r}. Repair or rebuild it."
        )
    return record
