"""Fixed-length windows over the token files of one domain, by index.

Only the tokens asked for are read. A pickle holds the paths, not the tokens.
"""

import abc
import functools
import os
import weakref
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.token_files import TokenFiles


class RawWindow(NamedTuple):
    """A stretch of a domain's tokens, documents one after the other.

    Attributes:
        tokens: int32 [N], the ids; N is at least 1.
        segment_ids: int32 [N], 1 for the tokens of the first document in the window, 2 for the
            second, and so on.
        positions: int32 [N], 0 at the start of the window and of each document.
        domain: the domain's id.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    domain: int


class DomainTokens:
    """Random access to the tokens of one domain in one split.

    Attributes:
        name: domain and split, for messages.
        domain_id: id of the domain.
        num_tokens: tokens of all documents, `bos_id` and `eos_id` included.
        num_documents: number of documents.
    """

    def __init__(self, files: TokenFiles, split: str, domain: str):
        """Describes the tokens; opens no file.

        Args:
            files: the token files.
            split: `train` or `heldout`.
            domain: one of `files.domains`.
        """
        self.name = f"{domain!r} ({split})"
        self.path = files.tokens_path(split, domain)
        self._dtype = files.dtype
        self._offsets_path = files.offsets_path(split, domain)
        self.domain_id = files.domains.index(domain)
        self.num_tokens = files.counts[split][domain].tokens
        self.num_documents = files.counts[split][domain].documents

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), fewer at the end of the file; int32.

        The file is read, not mapped: cutting a mapped file kills the process without a message.

        Raises:
            OSError: if the file was cut after it was opened.
        """
        file, header_bytes = self._file
        count = min(stop, self.num_tokens) - start
        size = self._dtype.itemsize
        data = os.pread(file, count * size, header_bytes + start * size)
        if len(data) != count * size:
            raise OSError(
                f"Token files must not change while they are read: {self.path} was cut. "
                "Start again: they are made anew."
            )
        return np.frombuffer(data, self._dtype).astype(np.int32)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each document begins, and the end; int64 [documents + 1]."""
        return np.load(self._offsets_path)  # Eight bytes per document.

    @functools.cached_property
    def _file(self) -> tuple[int, int]:
        """Descriptor of the open file, and the bytes before its first token."""
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        with self.path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return descriptor, file.tell()

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_file", "offsets")
        return {name: value for name, value in self.__dict__.items() if name not in opened}


class Windows(abc.ABC):
    """Random access to the windows of one domain, in an order that the class defines."""

    def __init__(self, tokens: DomainTokens):
        """Describes the windows; opens no file, unless a class says so."""
        self.tokens = tokens

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of windows."""

    @abc.abstractmethod
    def read(self, index: int) -> RawWindow:
        """Reads a window.

        Args:
            index: in [0, len(self)).

        Raises:
            OSError: if the file was cut after it was opened.
        """

    def __getitem__(self, index: int) -> RawWindow:
        """Reads a window, as `read`, and checks the index.

        Raises:
            IndexError: the index is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)} in {self.tokens.path}")
        return self.read(index)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.tokens.path)!r}, {len(self)})"


class DocumentWindows(Windows):
    """Documents as they are on disk, one after the other: window i begins at token i * L.

    Consecutive windows share one token, the last target of one and the first input of the next,
    so each token is a target once. Documents are cut where a window ends; a document's
    `positions` begin at 0 in every window, because attention sees no further back.
    """

    def __init__(self, tokens: DomainTokens, *, window: int, keep_partial: bool):
        """Describes the windows; opens no file.

        Args:
            tokens: tokens of the domain.
            window: L + 1, tokens per window.
            keep_partial: whether the last window may have fewer tokens, at least 2; if not, tokens
                that fill no window are left out.
        """
        super().__init__(tokens)
        self._stride = window - 1
        self._length = _num_windows(max(tokens.num_tokens - 1, 0), self._stride, keep_partial)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> RawWindow:
        """See `Windows`: 2 to L + 1 tokens."""
        start = index * self._stride
        tokens = self.tokens.read(start, start + self._stride + 1)
        stop = start + len(tokens)
        # Documents that begin after the window's first token and within it.
        offsets = self.tokens.offsets
        first, last = np.searchsorted(offsets, (start, stop - 1), side="right")
        begins = np.zeros(len(tokens), np.int32)
        begins[offsets[first:last] - start] = 1
        arange = np.arange(len(tokens), dtype=np.int32)
        return RawWindow(
            tokens=tokens,
            segment_ids=1 + np.cumsum(begins, dtype=np.int32),
            positions=arange - np.maximum.accumulate(arange * begins),
            domain=self.tokens.domain_id,
        )


class JoinedText(Windows):
    """The text of all documents, joined without separators: window i begins at token i * N.

    `bos_id` and `eos_id` of the documents are left out, and a window is one segment, as in T5's
    `reduce_concat_tokens` and `split_tokens`.
    """

    def __init__(self, tokens: DomainTokens, *, window: int, keep_partial: bool):
        """Describes the windows; opens no file.

        Args:
            tokens: tokens of the domain.
            window: N, tokens per window.
            keep_partial: whether the last window may have fewer tokens; if not, tokens that fill no
                window are left out.
        """
        super().__init__(tokens)
        self._window = window
        self._num_tokens = tokens.num_tokens - 2 * tokens.num_documents
        self._length = _num_windows(self._num_tokens, window, keep_partial)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> RawWindow:
        """See `Windows`: 1 to N tokens."""
        start = index * self._window
        last = min(start + self._window, self._num_tokens) - 1
        # Documents of the first and last token; 2 d + 1 bos and eos precede the text of document d.
        offsets = self.tokens.offsets
        first_document, last_document = (
            np.searchsorted(self._text_offsets, (start, last), side="right") - 1
        )
        begin = start + 2 * int(first_document) + 1
        tokens = self.tokens.read(begin, last + 2 * int(last_document) + 2)
        begins = offsets[first_document + 1 : last_document + 1] - begin
        tokens = np.delete(tokens, np.concatenate([begins - 1, begins]))  # eos and the next bos
        return RawWindow(
            tokens=tokens,
            segment_ids=np.ones_like(tokens),
            positions=np.arange(len(tokens), dtype=np.int32),
            domain=self.tokens.domain_id,
        )

    @functools.cached_property
    def _text_offsets(self) -> np.ndarray:
        """`offsets`, counted in tokens of text."""
        return self.tokens.offsets - 2 * np.arange(len(self.tokens.offsets))


def _num_windows(num_tokens: int, stride: int, keep_partial: bool) -> int:
    return -(-num_tokens // stride) if keep_partial else num_tokens // stride
