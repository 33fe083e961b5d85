"""Writes the texts of fetched archives to a directory of `<domain>.jsonl` files."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from moe_jax.data.large_corpus.packages import Package
from moe_jax.data.large_corpus.sources import BY_GROUP, Source
from moe_jax.files import whole_or_absent

# Shorter texts are stubs: redirections, empty chapters, files of one import.
_SHORTEST_TEXT_BYTES = 200


@dataclasses.dataclass(frozen=True)
class SourceSize:
    """The text that a source contributed.

    Attributes:
        domain: domain of the source.
        package: its first package.
        licence: licence of its text.
        documents: number of documents.
        bytes: UTF-8 bytes of text.
    """

    domain: str
    package: str
    licence: str
    documents: int
    bytes: int


def assemble(
    sources: Sequence[Source],
    archives: Mapping[Package, pathlib.Path],
    out: pathlib.Path,
    *,
    max_code_bytes: int,
    on_source: Callable[[Source], None] = lambda source: None,
) -> list[SourceSize]:
    """Writes the corpus, whole or not at all.

    Texts under 200 bytes and exact repetitions of an earlier text are left out. In addition to one
    file per domain, `sources.json` lists the sizes, licences and packages.

    Args:
        sources: what to read; a source that lacks an archive is left out.
        archives: paths of the packages.
        out: the directory to create.
        max_code_bytes: size at which a source of code is cut off.
        on_source: called before each source is read.

    Returns:
        The size of each source.

    Raises:
        ValueError: if `out` exists and is not empty.
    """
    with whole_or_absent(out) as partial:
        seen: set[bytes] = set()
        sizes = []
        for source in sources:
            if all(package in archives for package in source.packages):
                on_source(source)
                paths = [archives[package] for package in source.packages]
                limit = max_code_bytes if source.is_code else None
                with (partial / f"{source.domain}.jsonl").open("a", encoding="utf-8") as file:
                    sizes.append(_write(source, paths, file, seen, limit))
        (partial / "sources.json").write_text(_describe(sizes, archives))
    return sizes


def _write(
    source: Source,
    paths: Sequence[pathlib.Path],
    file: TextIO,
    seen: set[bytes],
    limit: int | None,
) -> SourceSize:
    """Appends the texts of one source to its domain's file."""
    documents = num_bytes = 0
    for record in _new_records(source, paths, seen):
        if limit is not None and num_bytes >= limit:
            break
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        documents += 1
        num_bytes += len(record["text"].encode())
    return SourceSize(source.domain, str(source.packages[0]), source.licence, documents, num_bytes)


def _new_records(
    source: Source, paths: Sequence[pathlib.Path], seen: set[bytes]
) -> Iterator[dict[str, Any]]:
    """Yields a record for each text that is long enough and not yet in `seen`."""
    for text in source.reader(paths):
        encoded = text.text.encode()
        digest = hashlib.sha256(encoded).digest()
        if len(encoded) < _SHORTEST_TEXT_BYTES or digest in seen:
            continue
        seen.add(digest)
        record = {"id": f"{source.packages[0].name}/{text.id}", "text": text.text}
        if text.group:
            record["group"] = text.group
        if source.heldout != BY_GROUP:
            record["heldout"] = source.heldout
        yield record


def _describe(sizes: Sequence[SourceSize], archives: Mapping[Package, pathlib.Path]) -> str:
    contents = {
        "sources": [dataclasses.asdict(size) for size in sizes],
        "packages": {str(package): archives[package].name for package in sorted(archives)},
    }
    return json.dumps(contents, indent=1) + "\n"
