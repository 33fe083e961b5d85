"""Windows in which short texts share a row."""

from collections.abc import Callable

import numpy as np

from moe_jax.data.windows import DomainTokens, RawWindow, Windows


def pack_rows(sizes_C2: np.ndarray, limits_2: tuple[int, int]) -> np.ndarray:
    """Packs pieces into rows in order: a row takes the next piece while both sides have room.

    Args:
        sizes_C2: int, tokens of each piece on the two sides; each piece fits into a row.
        limits_2: tokens of a row on each side.

    Returns:
        int64 [rows + 1], the first piece of each row; the last entry is C.
    """
    ends_2C = np.cumsum(sizes_C2, axis=0).T
    firsts = [0]
    while firsts[-1] < len(sizes_C2):
        first = firsts[-1]
        used_2 = ends_2C[:, first - 1] if first else (0, 0)
        # The pieces that end within the limits, on the side with less room.
        firsts.append(
            min(
                int(np.searchsorted(ends_C, used + limit, side="right"))
                for ends_C, used, limit in zip(ends_2C, used_2, limits_2, strict=True)
            )
        )
    return np.array(firsts, np.int64)


class PackedDocuments(Windows):
    """Whole documents; short ones share a row.

    Rows are planned once, in the order of the documents: a row takes the next document while it
    has room. A segment is a document.
    """

    def __init__(
        self,
        tokens: DomainTokens,
        documents_C: np.ndarray,
        sizes_C2: np.ndarray,
        *,
        limits: tuple[int, int],
        packed: bool,
    ):
        """Plans the rows; reads the offsets of the documents.

        Args:
            tokens: tokens of the domain.
            documents_C: int, the documents to read, in order.
            sizes_C2: int, tokens of each document on the two sides of a row; each fits into a row.
            limits: tokens of a row on each side.
            packed: whether documents share rows.
        """
        super().__init__(tokens)
        self._documents_C = documents_C
        rows = pack_rows(sizes_C2, limits) if packed else np.arange(len(documents_C) + 1)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows) - 1

    def read(self, index: int) -> RawWindow:
        """See `Windows`: documents as they are on disk, none cut."""
        documents = self._documents_C[slice(*self._rows[index : index + 2])]
        begins, ends = self.tokens.offsets[documents], self.tokens.offsets[documents + 1]
        sizes = ends - begins
        tokens = map(self.tokens.read, begins.tolist(), ends.tolist())
        return RawWindow(
            tokens=np.concatenate(list(tokens)),
            segment_ids=np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
            positions=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            domain=self.tokens.domain_id,
        )


class PackedText(Windows):
    """Pieces of single documents; short ones share a row.

    A document without its `bos_id` and `eos_id` is cut into pieces of N tokens and a remainder; a
    remainder of one token is left out. Rows are planned once, in the order of the documents: each
    whole piece has its own row, and remainders share rows as they fit.
    """

    def __init__(
        self,
        tokens: DomainTokens,
        *,
        window: int,
        limits: tuple[int, int],
        pair_lengths: Callable[[int], tuple[int, int]],
    ):
        """Plans the rows; reads the offsets of the documents.

        Args:
            tokens: tokens of the domain.
            window: N.
            limits: tokens of a row on the encoder's side and on the decoder's.
            pair_lengths: from the tokens of a piece to its tokens on the encoder's side of a row
                and on the decoder's.
        """
        super().__init__(tokens)
        sizes_D = np.diff(tokens.offsets) - 2
        pieces_D = -(-sizes_D // window)
        document_C = np.repeat(np.arange(len(sizes_D)), pieces_D)
        skipped_C = window * (
            np.arange(len(document_C)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
        )
        sizes_C = np.minimum(sizes_D[document_C] - skipped_C, window)
        starts_C = tokens.offsets[document_C] + 1 + skipped_C
        order = np.argsort(sizes_C < window, kind="stable")
        order = order[sizes_C[order] > 1]
        self._starts_C, self._sizes_C = starts_C[order], sizes_C[order]
        table = np.array([(0, 0), *map(pair_lengths, range(1, window + 1))])
        num_whole = int(np.sum(self._sizes_C == window))
        rests = pack_rows(table[self._sizes_C[num_whole:]], limits)
        self._rows = np.concatenate([np.arange(num_whole), num_whole + rests])

    def __len__(self) -> int:
        return len(self._rows) - 1

    def read(self, index: int) -> RawWindow:
        """See `Windows`: a segment is a piece."""
        pieces = slice(*self._rows[index : index + 2])
        sizes = self._sizes_C[pieces]
        starts = self._starts_C[pieces].tolist()
        tokens = [
            self.tokens.read(start, start + size)
            for start, size in zip(starts, sizes.tolist(), strict=True)
        ]
        return RawWindow(
            tokens=np.concatenate(tokens),
            segment_ids=np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
            positions=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            domain=self.tokens.domain_id,
        )
