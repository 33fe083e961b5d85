"""The corpus that ships with the package."""

import functools
import hashlib
import json
import lzma
import pathlib
from collections.abc import Iterator

from moe_jax.data.documents import (
    HELDOUT,
    TRAIN,
    Corpus,
    Document,
    hash_unit_interval,
    split_tail,
)

_EMBEDDED_FILE = pathlib.Path(__file__).parent / "embedded.jsonl.xz"


class EmbeddedCorpus(Corpus):
    """The corpus that ships with the package: 219 documents in six domains.

    A hash of the id would split it badly: six plays make a domain, the 24 texts of
    `multilingual` are translations of one another, and five of the six folio plays are also in
    `drama`. So the held-out text is chosen domain by domain:

    * `prose` and `python`, domains of many short, independent documents, hold out whole
      documents, in order of a hash of their id, if they still fit into `heldout_fraction` of the
      domain's bytes;
    * `drama`, `folio1623`, `speech` and `multilingual` hold out the tail of every document, the
      last `heldout_fraction` of its characters, moved forward to the start of a line if
      there is one. The tail of a translation is the translation of the tail: what is held out
      in one language or spelling is held out in the others, up to a line or two.
    """

    name = "embedded"
    _TAIL_DOMAINS = frozenset({"drama", "folio1623", "speech", "multilingual"})

    def domains(self) -> tuple[str, ...]:
        """Names of the six domains, in the order of the file."""
        return tuple(_read_embedded())

    def documents(self, domain: str, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
        """Yields (split, document); see the class for the rule, `Corpus` for the contract."""
        documents = _read_embedded()[domain]
        if domain in self._TAIL_DOMAINS:
            for document in documents:
                yield from split_tail(document, heldout_fraction)
            return
        heldout = _heldout_ids(documents, heldout_fraction)
        for document in documents:
            yield HELDOUT if document.id in heldout else TRAIN, document

    def fingerprint(self) -> str:
        """Sha256 of the embedded file."""
        return hashlib.sha256(_EMBEDDED_FILE.read_bytes()).hexdigest()


def _heldout_ids(documents: tuple[Document, ...], heldout_fraction: float) -> frozenset[str]:
    """Ids of the documents that fit into the held-out budget, taken in order of their hash."""
    sizes = {document.id: len(document.text.encode()) for document in documents}
    budget = heldout_fraction * sum(sizes.values())
    chosen = set()
    for id_ in sorted(sizes, key=hash_unit_interval):
        if sizes[id_] <= budget:
            budget -= sizes[id_]
            chosen.add(id_)
    return frozenset(chosen)


@functools.cache
def _read_embedded() -> dict[str, tuple[Document, ...]]:
    documents: dict[str, list[Document]] = {}
    with lzma.open(_EMBEDDED_FILE, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            document = Document(record["domain"], record["id"], record["text"], record["id"])
            documents.setdefault(document.domain, []).append(document)
    return {domain: tuple(members) for domain, members in documents.items()}
