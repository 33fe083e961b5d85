"""The base class of corpora: documents by domain, and which of them are held out."""

import abc
import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

TRAIN = "train"
HELDOUT = "heldout"
SPLITS = (TRAIN, HELDOUT)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with its name.

    Attributes:
        domain: name of the domain, usable as a file name.
        id: names the document within the domain.
        text: not empty.
        group: documents of one group (translations of a page, editions of a play) are on the
            same side of the held-out split. Without a group: the document's id, or the sha256
            of its text.
        has_group: whether the group was given, so that other documents may share it.
        where: file and line or row, for messages; "" if unknown.
        whole: whether it is never cut, so that its end is held out only with its beginning.
    """

    domain: str
    id: str
    text: str
    group: str
    has_group: bool = False
    where: str = ""
    whole: bool = False


class Corpus(abc.ABC):
    """Documents by domain, each assigned to `train` or `heldout`.

    Attributes:
        name: the string that `open_corpus` turns into this corpus.
    """

    name: str

    @abc.abstractmethod
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; a domain's id is its index here."""

    @abc.abstractmethod
    def documents(self, domain: str, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
        """Yields (split, document) in an order that depends only on the corpus.

        If the end of a document is held out, the two parts follow each other.

        Args:
            domain: one of `domains()`.
            heldout_fraction: share of the text to hold out, in [0, 1).

        Yields:
            `train` or `heldout`, and the document.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal sha256 that changes whenever the documents do."""

    def unpacked(self, cache: pathlib.Path, source: dict[str, Any]) -> pathlib.Path | None:
        """The folder of the token files that the corpus has; None for a corpus of documents.

        Args:
            cache: where the folder is made.
            source: what the token files must have been made from.
        """
        del cache, source
        return None

    def way_to_hold_out(self, fraction: float) -> str:
        """The fix for a fraction that holds out no text, or leaves none to train on."""
        groups = (document.group for _, document in self._split(0.0))
        places = sorted(set(map(hash_unit_interval, groups)))[:2]
        # Any fraction cuts a single document; with several, it must exceed the hash of a group.
        larger = [0.03, 0.1, 0.3]
        if len(places) == 2:
            rounded = (math.floor(places[0] * 10**digits + 1) / 10**digits for digits in (2, 3, 6))
            larger.insert(0, next((f for f in rounded if f <= places[1]), sum(places) / 2))
        for another in (f for f in larger if f > fraction):
            never_trains = heldout_digests(self, another)
            splits = {
                split
                for split, document in self._split(another)
                if split == HELDOUT or text_digest(document.text) not in never_trains
            }
            if splits == {TRAIN, HELDOUT}:
                return f"Set config.data.heldout_fraction={another}"
        return "Add documents, of ids or groups that differ"

    def _split(self, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
        """Yields (split, document) over all domains."""
        for domain in self.domains():
            yield from self.documents(domain, heldout_fraction)


def split_documents(
    documents: Iterable[tuple[Document, bool]], heldout_fraction: float
) -> Iterator[tuple[str, Document]]:
    """Splits the documents of a domain, each by the hash of its group.

    Args:
        documents: of one domain, each with whether its end is held out instead of the whole. The
            end of a domain's only document is held out, too. A document with a given group is
            never cut, since the rest of its group lies on one side.
        heldout_fraction: in [0, 1).

    Yields:
        `train` or `heldout`, and the document or a part of it.
    """
    rest = iter(documents)
    first = list(itertools.islice(rest, 2))
    for document, has_tail in itertools.chain(first, rest):
        if (has_tail or len(first) == 1) and not document.whole and not document.has_group:
            yield from split_tail(document, heldout_fraction)
        else:
            yield split_of(document.group, heldout_fraction), document


def split_tail(document: Document, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
    """Yields the head as `train` and the tail as `heldout`; joined, they are the text."""
    start = round(len(document.text) * (1 - heldout_fraction))
    line_end = document.text.find("\n", start)
    # A tail that is part of one line is cut within the line, rather than not at all.
    cut = line_end + 1 if 0 <= line_end < len(document.text) - 1 else start
    parts = ((TRAIN, document.text[:cut]), (HELDOUT, document.text[cut:]))
    for split, text in parts:
        if text:
            yield split, dataclasses.replace(document, text=text)


def split_of(group: str, heldout_fraction: float) -> str:
    """Assigns a group of documents to a split, only by its hash.

    Args:
        group: name of the group; see `Document`.
        heldout_fraction: in [0, 1); expected held-out share of the groups.

    Returns:
        `train` or `heldout`.
    """
    return HELDOUT if hash_unit_interval(group) < heldout_fraction else TRAIN


def hash_unit_interval(text: str) -> float:
    """A number in [0, 1), the same for the same text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for equal texts, ignoring white space around them."""
    return hashlib.sha256(text.strip().encode()).digest()[:16]


def heldout_digests(corpus: Corpus, heldout_fraction: float) -> frozenset[bytes]:
    """Digests of all held-out text, in any domain; a text with one of them must not train.

    A document whose end is held out adds the end and the whole, because the whole may occur
    again. Takes about 100 bytes of memory per held-out document.

    Returns:
        The digests.
    """
    digests: set[bytes] = set()
    for domain in corpus.domains():
        before: tuple[str, Document | None] = ("", None)
        for split, document in corpus.documents(domain, heldout_fraction):
            if split == HELDOUT:
                digests.add(text_digest(document.text))
                if before[0] == TRAIN and before[1] and before[1].id == document.id:
                    digests.add(text_digest(before[1].text + document.text))
            before = (split, document)
    return frozenset(digests)
