"""Fixed-length windows over the token files of one domain, by index."""

import functools
import os
import weakref
from typing import Any

import numpy as np

from moe_jax.data.objectives import Example, Objective, RawWindow
from moe_jax.data.token_files import TokenFiles


class Windows:
    """Random access to the windows of one domain: window i begins at token i * L.

    Consecutive windows share one token, the last target of one and the first input of the next,
    so each token is a target once. Documents are cut where a window ends; a document's
    `positions` begin at 0 in every window, for attention sees no further back.

    Only the tokens asked for are read. A pickle holds the paths, not the tokens.
    """

    def __init__(
        self,
        files: TokenFiles,
        split: str,
        domain: str,
        *,
        sequence_length: int,
        objective: Objective,
        pad_id: int,
        keep_partial: bool,
    ):
        """Describes the windows; opens no file.

        Args:
            files: the token files.
            split: `train` or `heldout`.
            domain: one of `files.domains`.
            sequence_length: L, tokens a window.
            objective: turns a `RawWindow` of at most L + 1 tokens into an example.
            pad_id: given to the objective.
            keep_partial: whether the last window may have fewer than L + 1 tokens; if not, the
                tokens that fill no window are left out.
        """
        self._tokens_path = files.tokens_path(split, domain)
        self._dtype = files.dtype
        self._offsets_path = files.offsets_path(split, domain)
        self._domain_id = files.domains.index(domain)
        self._sequence_length = sequence_length
        self._objective = objective
        self._pad_id = pad_id
        self.num_tokens = files.counts[split][domain].tokens
        num_targets = max(self.num_tokens - 1, 0)
        self._length = num_targets // sequence_length
        if keep_partial and num_targets % sequence_length:
            self._length += 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Returns an example; for `causal_lm`, the arrays that its docstring lists."""
        return self._objective(
            self.raw(index), sequence_length=self._sequence_length, pad_id=self._pad_id
        )

    def raw(self, index: int) -> RawWindow:
        """Returns a window as it is on disk.

        Args:
            index: in [0, len(self)).

        Returns:
            The window's tokens, of which there are 2 to L + 1.

        Raises:
            IndexError: if the index is out of range.
            OSError: if the file was cut after it was opened.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"window {index} of {self._length} in {self._tokens_path}")
        start = index * self._sequence_length
        tokens = self._tokens(start, self._sequence_length + 1).astype(np.int32)
        stop = start + len(tokens)
        # Documents that begin after the window's first token and within it.
        first, last = np.searchsorted(self._offsets, (start, stop - 1), side="right")
        begins = np.zeros(len(tokens), np.int32)
        begins[self._offsets[first:last] - start] = 1
        arange = np.arange(len(tokens), dtype=np.int32)
        return RawWindow(
            tokens=tokens,
            segment_ids=1 + np.cumsum(begins, dtype=np.int32),
            positions=arange - np.maximum.accumulate(arange * begins),
            domain=self._domain_id,
        )

    def _tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), fewer at the end of the file.

        Read rather than mapped: of a mapped file that is cut the process dies without a word.
        """
        file, header_bytes = self._tokens_file
        count = min(count, self.num_tokens - start)
        size = self._dtype.itemsize
        data = os.pread(file, count * size, header_bytes + start * size)
        if len(data) != count * size:
            raise OSError(
                f"Token files stay as they are while they are read: {self._tokens_path} was cut. "
                "Start again: they are made anew."
            )
        return np.frombuffer(data, self._dtype)

    @functools.cached_property
    def _tokens_file(self) -> tuple[int, int]:
        """Descriptor of the open file, and the bytes before its first token."""
        descriptor = os.open(self._tokens_path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        with self._tokens_path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return descriptor, file.tell()

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return np.load(self._offsets_path)  # Eight bytes a document.

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_tokens_file", "_offsets")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __repr__(self) -> str:
        return f"Windows({str(self._tokens_path)!r}, {self._length} of {self._sequence_length})"
