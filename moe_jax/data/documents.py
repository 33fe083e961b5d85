"""What a corpus is: documents by domain, and which of them are held out."""

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
        group: documents of one group (translations of a page, editions of a play) fall on the
            same side of the held-out split. The document's own id when it stands alone.
        has_group: whether the group was given: other documents may be of it.
        where: file and line or row, for messages; "" where it has none.
        whole: whether it is never cut, so that its end is held out with its beginning.
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
        """Yields (split, document) in an order that depends on nothing but the corpus.

        Of a document whose end is held out, the two parts follow each other.

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
        """The folder of the token files that it came with; None of a corpus of documents.

        Args:
            cache: where it is put.
            source: what they must be made from.
        """
        del cache, source
        return None

    def way_to_hold_out(self, fraction: float) -> str:
        """What makes some text held out and leaves some to train on, where a fraction does not."""
        groups = (document.group for _, document in self._split(0.0))
        places = sorted(set(map(hash_unit_interval, groups)))[:2]
        larger = [0.03, 0.1, 0.3]  # A document alone is cut at any; others fall below their place.
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
        """The documents of all domains."""
        for domain in self.domains():
            yield from self.documents(domain, heldout_fraction)


def split_documents(
    documents: Iterable[tuple[Document, bool]], heldout_fraction: float
) -> Iterator[tuple[str, Document]]:
    """Splits the documents of a domain by the hash of their group, each by itself.

    Args:
        documents: of one domain, each with whether its end is held out rather than the whole. The
            end of a document that is alone is too, unless its group is held out: the whole then.
        heldout_fraction: in [0, 1).

    Yields:
        `train` or `heldout`, and the document or a part of it.
    """
    rest = iter(documents)
    first = list(itertools.islice(rest, 2))
    for document, has_tail in itertools.chain(first, rest):
        split = split_of(document.group, heldout_fraction)
        is_alone = len(first) == 1 and not (document.has_group and split == HELDOUT)
        if (has_tail or is_alone) and not document.whole:
            yield from split_tail(document, heldout_fraction)
        else:
            yield split, document


def split_tail(document: Document, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
    """Yields the head as `train` and the tail as `heldout`; joined, they are the text."""
    start = round(len(document.text) * (1 - heldout_fraction))
    line_end = document.text.find("\n", start)
    # A tail that is all one line is cut where it stands, rather than not at all.
    cut = line_end + 1 if 0 <= line_end < len(document.text) - 1 else start
    parts = ((TRAIN, document.text[:cut]), (HELDOUT, document.text[cut:]))
    for split, text in parts:
        if text:
            yield split, dataclasses.replace(document, text=text)


def split_of(group: str, heldout_fraction: float) -> str:
    """Assigns a group of documents to a split, by hash alone.

    Args:
        group: name of the group (a document's id when it stands alone).
        heldout_fraction: in [0, 1); expected share of the groups that is held out.

    Returns:
        `train` or `heldout`.
    """
    return HELDOUT if hash_unit_interval(group) < heldout_fraction else TRAIN


def hash_unit_interval(text: str) -> float:
    """A number in [0, 1), the same for the same text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for equal texts, white space around them aside."""
    return hashlib.sha256(text.strip().encode()).digest()[:16]


def heldout_digests(corpus: Corpus, heldout_fraction: float) -> frozenset[bytes]:
    """Digests of all text that is held out, in any domain; what has one of them must not train.

    Of a document whose end is held out both the end and the whole: the whole may come again. Takes
    about 100 bytes of memory a held-out document.

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
