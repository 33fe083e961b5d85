"""Corpora by name: the embedded one, those in jsonl files, and those of TFDS.

A corpus is named by one string:

* `embedded`: the 5.3 MB that ship with the package (`SOURCES.md`), six domains;
* `jsonl:DIR`: a directory of `<domain>.jsonl` files, as `python -m moe_jax.data.build` makes;
* `tfds:NAME`: a prepared TFDS text dataset (`tfds_text.py`), one domain.
"""

import dataclasses
import functools
import hashlib
import json
import lzma
import pathlib
from collections.abc import Iterator

from moe_jax.data.documents import HELDOUT, TRAIN, Corpus, Document, hash_unit_interval, split_of

_EMBEDDED_FILE = pathlib.Path(__file__).parent / "embedded.jsonl.xz"


class EmbeddedCorpus(Corpus):
    """The corpus that ships with the package: 219 documents in six domains.

    A hash of the id would serve it badly: six plays make a domain, the 24 texts of
    `multilingual` are translations of one another, and five of the six folio plays are also in
    `drama`. So the held-out text is chosen domain by domain:

    * `prose` and `python`, domains of many short documents that stand alone, hold out whole
      documents, taken in order of a hash of their id while they fit into
      `heldout_fraction` of the domain's bytes;
    * `drama`, `folio1623`, `speech` and `multilingual` hold out the tail of every document, the
      last `heldout_fraction` of its characters, moved forward to the start of a line where
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
                yield from _split_tail(document, heldout_fraction)
            return
        heldout = _heldout_ids(documents, heldout_fraction)
        for document in documents:
            yield HELDOUT if document.id in heldout else TRAIN, document

    def fingerprint(self) -> str:
        """Sha256 of the embedded file."""
        return hashlib.sha256(_EMBEDDED_FILE.read_bytes()).hexdigest()


class JsonlCorpus(Corpus):
    """A directory of `<domain>.jsonl` files of `{"id", "text"}`.

    A document is held out when the hash of its `"group"` (of its id if it has none), read as a
    number in [0, 1), is below `heldout_fraction`: independent of the other documents, of the
    domain and of their order, so that a translation of a held-out page never trains, and what
    is held out at 3 % is held out at 5 %.

    Of a document with `"heldout": "tail"` the end is held out, as in the embedded corpus.
    """

    def __init__(self, directory: str):
        self.name = f"jsonl:{directory}"
        self._directory = pathlib.Path(directory)
        self._files = {path.stem: path for path in sorted(self._directory.glob("*.jsonl"))}
        if not self._files:
            raise ValueError(
                f"A jsonl corpus is a directory of <domain>.jsonl files: none in {directory!r}. "
                f"Build one with `python -m moe_jax.data.build --out={directory}`, or set "
                "config.data.corpus to 'embedded'."
            )

    def domains(self) -> tuple[str, ...]:
        """Stems of the files, sorted."""
        return tuple(self._files)

    def documents(self, domain: str, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
        """Yields (split, document); see the class for the rule, `Corpus` for the contract."""
        with self._files[domain].open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                document, has_tail = self._parse(line, domain, number)
                if has_tail:
                    yield from _split_tail(document, heldout_fraction)
                else:
                    yield split_of(document.group, heldout_fraction), document

    def fingerprint(self) -> str:
        """Sha256 over the names and contents of the files."""
        digest = hashlib.sha256()
        for domain, path in self._files.items():
            with path.open("rb") as file:
                digest.update(f"{domain}\0".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _parse(self, line: str, domain: str, number: int) -> tuple[Document, bool]:
        try:
            record = json.loads(line)
            id_, text = record["id"], record["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                'Each line of a jsonl corpus is an object with "id" and "text": '
                f"{self._files[domain]} line {number} is {line[:60]!r}. Repair or rebuild it."
            ) from error
        document = Document(domain, id_, text, record.get("group", id_))
        return document, record.get("heldout") == "tail"


def open_corpus(name: str) -> Corpus:
    """Opens the corpus that `name` describes.

    Args:
        name: `embedded`, `jsonl:DIR` or `tfds:NAME`.

    Returns:
        The corpus; nothing is read before its documents are asked for.

    Raises:
        ValueError: if the name has none of these forms, or there is no such corpus.
    """
    kind, _, argument = name.partition(":")
    if name == "embedded":
        return EmbeddedCorpus()
    if kind == "jsonl" and argument:
        return JsonlCorpus(argument)
    if kind == "tfds" and argument:
        # Most runs do without TFDS, so that it is imported only here.
        from moe_jax.data.tfds_text import TfdsTextCorpus

        return TfdsTextCorpus(argument)
    raise ValueError(
        f"A corpus is 'embedded', 'jsonl:DIR' or 'tfds:NAME': got {name!r}. "
        "Set config.data.corpus to one of them."
    )


def _heldout_ids(documents: tuple[Document, ...], heldout_fraction: float) -> frozenset[str]:
    """Ids of the documents that, in order of their hash, fit into the held-out budget."""
    sizes = {document.id: len(document.text.encode()) for document in documents}
    budget = heldout_fraction * sum(sizes.values())
    chosen = set()
    for id_ in sorted(sizes, key=hash_unit_interval):
        if sizes[id_] <= budget:
            budget -= sizes[id_]
            chosen.add(id_)
    return frozenset(chosen)


def _split_tail(document: Document, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
    """Yields the head as `train` and the tail as `heldout`; joined, they are the text."""
    start = round(len(document.text) * (1 - heldout_fraction))
    line_end = document.text.find("\n", start)
    # A tail that is all one line is cut where it stands, rather than not at all.
    cut = line_end + 1 if 0 <= line_end < len(document.text) - 1 else start
    parts = ((TRAIN, document.text[:cut]), (HELDOUT, document.text[cut:]))
    for split, text in parts:
        if text:
            yield split, dataclasses.replace(document, text=text)


@functools.cache
def _read_embedded() -> dict[str, tuple[Document, ...]]:
    documents: dict[str, list[Document]] = {}
    with lzma.open(_EMBEDDED_FILE, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            document = Document(record["domain"], record["id"], record["text"], record["id"])
            documents.setdefault(document.domain, []).append(document)
    return {domain: tuple(members) for domain, members in documents.items()}
