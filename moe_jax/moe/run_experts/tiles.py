"""Tile sizes of grouped matmuls, from shapes only (legend: `moe_jax.moe`).

A kernel computes tiles of rows. A tile belongs to one expert, or is computed once per expert with
rows in it. So the fewer rows an expert has, the smaller tiles must be. But small tiles read the
weights more often.
"""

import itertools
import math


def tile_rows(
    num_rows: int, num_experts: int, *, smallest: int, largest: int, tiles_per_expert: int = 8
) -> int:
    """Rows per tile, such that an expert of mean size has `tiles_per_expert` tiles.

    Args:
      num_rows: R, rows likely to be filled; the mean size is R / E.
      num_experts: E.
      smallest: fewest rows that the hardware computes efficiently; a power of two.
      largest: a power of two.
      tiles_per_expert: a power of two; with 8, at most an eighth of the rows is wasted.

    Returns:
      A power of two from smallest to largest.
    """
    mean = max(num_rows // (num_experts * tiles_per_expert), 1)
    return min(max(1 << (mean.bit_length() - 1), smallest), largest)


# Part of the on-chip memory that a TPU kernel gets by default, 16 MiB. The rest is for what the
# compiler keeps in addition to the tiles.
TPU_TILE_BYTES = 11 * 2**20
LANES = 128
TPU_SIZES = (128, 256, 512, 1024, 2048)


def tpu_row_tiles(
    num_rows: int, num_experts: int, inner: int, outer: int, itemsize: int
) -> tuple[int, int, int]:
    """Tile sizes of [R, I] x [E, I, O], over R, I and O, that read the fewest bytes.

    Rows are read once per tile of O. Weights are read once if a tile covers all of I, since it then
    stays on the chip for all rows of its expert. Otherwise they are read once per tile of rows.

    Args:
      num_rows: R.
      num_experts: E.
      inner: I.
      outer: O.
      itemsize: bytes per number.
    """
    rows = tile_rows(num_rows, num_experts, smallest=LANES, largest=512)

    def fits(i: int, o: int) -> bool:
        tiles = 2 * itemsize * (rows * i + i * o + rows * o)  # the next tile is read meanwhile
        return tiles + 8 * rows * o <= TPU_TILE_BYTES

    def bytes_read(i: int, o: int) -> float:
        times = 1 if i >= inner else num_rows / rows / num_experts + 1
        weights = num_experts * times * math.ceil(inner / i) * i * math.ceil(outer / o) * o
        return weights + num_rows * inner * math.ceil(outer / o)

    choices = itertools.product(_sizes(inner), _sizes(outer))
    return rows, *min((c for c in choices if fits(*c)), key=lambda choice: bytes_read(*choice))


def tpu_weight_tiles(
    num_rows: int, num_experts: int, inner: int, outer: int, itemsize: int
) -> tuple[int, int, int]:
    """Tile sizes of [I, R] x [R, O] -> [E, I, O], over R, I and O; arguments as in `tpu_row_tiles`.

    A tile of the result stays on the chip for all rows of its expert.
    """
    rows = tile_rows(num_rows, num_experts, smallest=LANES, largest=512)

    def fits(i: int, o: int) -> bool:
        tiles = 2 * itemsize * (rows * i + rows * o + i * o) + 8 * i * o
        return tiles + 4 * rows * (i + o) <= TPU_TILE_BYTES

    def bytes_read(i: int, o: int) -> float:
        tiles_i, tiles_o = math.ceil(inner / i), math.ceil(outer / o)
        written = num_experts * tiles_i * i * tiles_o * o
        return written + num_rows * (inner * tiles_o + outer * tiles_i)

    choices = itertools.product(_sizes(inner), _sizes(outer))
    return rows, *min((c for c in choices if fits(*c)), key=lambda choice: bytes_read(*choice))


def _sizes(dim: int) -> list[int]:
    """Tile sizes of a dim: the `TPU_SIZES` smaller than it, and the whole dim."""
    whole = -(-dim // LANES) * LANES
    return [*(size for size in TPU_SIZES if size < whole), whole]
