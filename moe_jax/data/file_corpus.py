"""A corpus of files: text, JSON lines, parquet, or a Hugging Face dataset."""

import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from moe_jax.config.check import require
from moe_jax.data.documents import HELDOUT, SPLITS, TRAIN, Corpus, Document, split_documents
from moe_jax.data.file_layout import Layout, layout_of
from moe_jax.data.open_file import check_file
from moe_jax.data.read_lines import read_lines
from moe_jax.data.read_tables import read_arrow, read_parquet
from moe_jax.data.read_text import read_text
from moe_jax.data.records import Fields

# (path, domain, fields) -> documents, each with whether its end is held out.
Reader = Callable[[pathlib.Path, str, Fields], Iterator[tuple[Document, bool]]]
READERS: Mapping[str, Reader] = MappingProxyType(
    {"text": read_text, "jsonl": read_lines, "parquet": read_parquet, "arrow": read_arrow}
)


class FileCorpus(Corpus):
    """Files of one kind; `file_layout.layout_of` assigns them to domains.

    If files are split into train and validation, validation is held out. Otherwise a document is
    held out if the hash of its group (else its id, else its text), as a number in [0, 1), is below
    `heldout_fraction`. This does not depend on other documents, their order or the domain: a
    translation of a held-out page never trains, and what is held out at 3 % is held out at 5 %.

    Only the end is held out of a long text file, of a record with `"heldout": "tail"`, and of the
    only document of a domain without a group, as in the embedded corpus.
    """

    def __init__(self, name: str, path: str, kind: str = "", fields: Fields | None = None):
        """Finds the files; reads none.

        Args:
            name: name of the corpus.
            path: a file or folder; a leading ~ is the home of the user.
            kind: kind of the files; "": detected.
            fields: fields of the records to read.

        Raises:
            ValueError: there are no such files, or they are of several kinds.
        """
        self.name = name
        self._fields = fields or Fields()
        self._layout: Layout = layout_of(pathlib.Path(path).expanduser(), kind)
        require(
            not self._fields.conversations or self._layout.has_records,
            "Prompts and answers can be read only from JSON lines",
            f"data.corpus={name!r} has files of {self._layout.kind}",
            "Set config.data.corpus to a .jsonl file or a folder of them",
        )

    def domains(self) -> tuple[str, ...]:
        """Names of files or folders, in the order of the files."""
        return self._layout.domains

    def documents(self, domain: str, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
        """Yields (split, document); see the class for the rule, `Corpus` for the contract."""
        if not self._layout.has_splits:
            yield from split_documents(self._read(TRAIN, domain), heldout_fraction)
            return
        for split in SPLITS:
            for document, _ in self._read(split, domain):
                yield split, document

    def fingerprint(self) -> str:
        """Sha256 over the domains, splits and contents of the files, and the fields read."""
        digest = hashlib.sha256()
        layout = self._layout
        # JSON lines with the usual fields keep the checksum that earlier releases recorded in runs.
        if not layout.has_records or self._fields != Fields():
            digest.update(f"{layout.kind}{self._fields.names}\0".encode())
        for split, domain in ((split, domain) for split in SPLITS for domain in layout.domains):
            for path in layout.files[split].get(domain, ()):
                check_file(path, "A corpus file")
                with path.open("rb") as file:
                    label = domain if split == TRAIN else f"{HELDOUT}/{domain}"
                    digest.update(f"{label}\0".encode())
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _read(self, split: str, domain: str) -> Iterator[tuple[Document, bool]]:
        reader = READERS[self._layout.kind]
        for path in self._layout.files[split].get(domain, ()):
            for document, has_tail in reader(path, domain, self._fields):
                if document.text:
                    yield document, has_tail
