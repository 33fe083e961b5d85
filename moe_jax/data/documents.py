"""What a corpus is: documents by domain, and which of them are held out."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterator

TRAIN = "train"
HELDOUT = "heldout"
SPLITS = (TRAIN, HELDOUT)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with its name.

    Attributes:
        domain: name of the domain, usable as a file name.
        id: unique within the domain.
        text: not empty.
        group: documents of one group (translations of a page, editions of a play) fall on the
            same side of the held-out split. The document's own id when it stands alone.
    """

    domain: str
    id: str
    text: str
    group: str


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

        Args:
            domain: one of `domains()`.
            heldout_fraction: share of the text to hold out, in [0, 1).

        Yields:
            `train` or `heldout`, and the document.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal sha256 that changes whenever the documents do."""


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
