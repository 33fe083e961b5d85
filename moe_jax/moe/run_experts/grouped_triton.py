"""The products of a grouped matmul for NVIDIA GPUs, by Pallas's Triton route.

Tiles of rows start at the first row of each expert, so no tile spans two experts. Rows of a tile
past the last row of its expert are neither read nor written. The expert and the rows of each tile
are computed before the kernel starts. Sums are in float32. Legend: `moe_jax.moe`; here also T,
tiles of rows.

MegaBlocks (Gale et al. 2022, arXiv:2211.15841) also uses a grid of row tiles that look up their
experts, as do Levanter and AXLearn, by the same route through Pallas.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.moe.run_experts.tiles import tile_rows
from moe_jax.parallel.rules import platform

# Tile sizes: of O, and of the dim that is summed over.
TILE, STEP = 128, 32
# Row tiles that run side by side on the same columns of the weights, shared in the cache.
BAND = 8
PARAMS = triton.CompilerParams(num_warps=4, num_stages=4)


def rows(
    x_RI: jax.Array,
    weight: jax.Array,
    group_sizes_E: jax.Array,
    likely_rows: int,
    transposed: bool,
) -> jax.Array:
    """See `grouped_matmul.Products`."""
    num_rows, inner = x_RI.shape
    outer = weight.shape[1 if transposed else 2]
    num_experts = len(group_sizes_E)
    tile = row_tile(likely_rows, num_experts)
    tiles = find_tiles(group_sizes_E, tile, num_rows)
    return pl.pallas_call(
        functools.partial(rows_kernel, tile=tile, transposed=transposed),
        out_shape=like((num_rows, outer), x_RI),
        grid=(len(tiles[0]) * pl.cdiv(outer, TILE),),
        compiler_params=PARAMS,
        cost_estimate=cost(num_rows, inner, outer, x_RI, weight),
        interpret=platform() == "cpu",
        name="grouped_rows",
    )(*tiles, x_RI, weight)


def row_tile(likely_rows: int, num_experts: int) -> int:
    """Rows per tile."""
    return tile_rows(likely_rows, num_experts, smallest=16, largest=TILE, tiles_per_expert=4)


def weights(
    x_RI: jax.Array, dy_RO: jax.Array, group_sizes_E: jax.Array, likely_rows: int
) -> jax.Array:
    """See `grouped_matmul.Products`."""
    (num_rows, inner), outer, num_experts = x_RI.shape, dy_RO.shape[1], len(group_sizes_E)
    ends_E = jnp.cumsum(group_sizes_E)
    return pl.pallas_call(
        weights_kernel,
        out_shape=like((num_experts, inner, outer), x_RI),
        grid=(pl.cdiv(inner, TILE), pl.cdiv(outer, TILE), num_experts),
        compiler_params=PARAMS,
        cost_estimate=cost(num_rows, inner, outer, x_RI, dy_RO),
        interpret=platform() == "cpu",
        name="grouped_weights",
    )(ends_E - group_sizes_E, ends_E, x_RI, dy_RO)


def find_tiles(
    group_sizes_E: jax.Array, tile: int, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tiles of rows, expert by expert.

    Args:
      group_sizes_E: int32.
      tile: rows per tile.
      num_rows: R, the most rows that all groups can have.

    Returns:
      int32 [T] each: the expert of every tile, its first row, and the end of its expert's rows. T
      is the most tiles that can occur, rounded up to whole bands; unused tiles have no rows.
    """
    num_experts = len(group_sizes_E)
    most = num_rows // tile + min(num_experts, num_rows)
    tile_T = jnp.arange(pl.cdiv(most, BAND) * BAND, dtype=jnp.int32)
    tiles_E = pl.cdiv(group_sizes_E, tile)
    last_tile_E, end_E = jnp.cumsum(tiles_E), jnp.cumsum(group_sizes_E)
    expert_T = jnp.searchsorted(last_tile_E, tile_T, side="right").astype(jnp.int32)
    expert_T = jnp.minimum(expert_T, num_experts - 1)
    of_expert_T = tile_T - (last_tile_E - tiles_E)[expert_T]
    end_T = end_E[expert_T]
    first_T = (end_E - group_sizes_E)[expert_T] + of_expert_T * tile
    first_T = jnp.minimum(first_T, end_T)
    return expert_T, first_T, end_T


def rows_kernel(
    expert_T: jax.Ref,
    first_T: jax.Ref,
    end_T: jax.Ref,
    x_RI: jax.Ref,
    weight: jax.Ref,
    y_RO: jax.Ref,
    *,
    tile: int,
    transposed: bool,
) -> None:
    """One tile of rows by one tile of columns."""
    (_, inner), outer = x_RI.shape, y_RO.shape[1]
    columns = pl.cdiv(outer, TILE)
    band, place = jnp.divmod(pl.program_id(0), BAND * columns)
    column_tile, row_tile = jnp.divmod(place, BAND)
    row_tile += band * BAND
    expert, first, end = expert_T[row_tile], first_T[row_tile], end_T[row_tile]
    row, column = pl.Slice(first, tile), pl.Slice(column_tile * TILE, TILE)
    in_group = within(row, end)
    in_outer = within(column, outer)

    def add(i: jax.Array, sum_RO: jax.Array) -> jax.Array:
        step = pl.Slice(i * STEP, STEP)
        in_inner = within(step, inner)
        x = load(x_RI.at[row, step], in_group, in_inner)
        if transposed:
            w = load(weight.at[expert, column, step], in_outer, in_inner)
        else:
            w = load(weight.at[expert, step, column], in_inner, in_outer)
        return sum_RO + dot(x, w, (1, 1 if transposed else 0))

    @pl.when(first < end)
    def compute() -> None:
        sum_RO = jnp.zeros((tile, TILE), jnp.float32)
        sum_RO = jax.lax.fori_loop(0, pl.cdiv(inner, STEP), add, sum_RO)
        mask = in_group[:, None] & in_outer[None, :]
        triton.store(y_RO.at[row, column], sum_RO.astype(y_RO.dtype), mask=mask)


def weights_kernel(
    first_E: jax.Ref, end_E: jax.Ref, x_RI: jax.Ref, dy_RO: jax.Ref, dweight_EIO: jax.Ref
) -> None:
    """One tile of the weight gradient of one expert; 0 if the expert has no rows."""
    inner, outer = x_RI.shape[1], dy_RO.shape[1]
    i = pl.Slice(pl.program_id(0) * TILE, TILE)
    o = pl.Slice(pl.program_id(1) * TILE, TILE)
    expert = pl.program_id(2)
    in_inner, in_outer = within(i, inner), within(o, outer)
    first, end = first_E[expert], end_E[expert]

    def add(step: jax.Array, sum_IO: jax.Array) -> jax.Array:
        row = pl.Slice(first + step * STEP, STEP)
        in_group = within(row, end)
        x = load(x_RI.at[row, i], in_group, in_inner)
        dy = load(dy_RO.at[row, o], in_group, in_outer)
        return sum_IO + dot(x, dy, (0, 0))

    sum_IO = jnp.zeros((TILE, TILE), jnp.float32)
    sum_IO = jax.lax.fori_loop(0, pl.cdiv(end - first, STEP), add, sum_IO)
    mask = in_inner[:, None] & in_outer[None, :]
    triton.store(dweight_EIO.at[expert, i, o], sum_IO.astype(dweight_EIO.dtype), mask=mask)


def within(dim: pl.Slice, end: jax.Array | int) -> jax.Array:
    """Which indices of a slice are below `end`."""
    return dim.start + jnp.arange(dim.size) < end


def load(ref: Any, *in_dims: jax.Array) -> jax.Array:
    """A tile of a matrix; 0, and not read, where either index is past the end."""
    return triton.load(ref, mask=in_dims[0][:, None] & in_dims[1][None, :], other=0)


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """A product of two tiles, contracted over one dim of each, in float32."""
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def like(shape: tuple[int, ...], x: jax.Array) -> jax.ShapeDtypeStruct:
    """An output in the dtype of `x`; inside `jax.shard_map` it varies over the same axes."""
    return jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def cost(num_rows: int, inner: int, outer: int, *operands: jax.Array) -> pl.CostEstimate:
    """The cost estimate for XLA, as if all rows were filled."""
    bytes_read = sum(array.size * array.dtype.itemsize for array in operands)
    written = num_rows * outer * operands[0].dtype.itemsize
    flops = 2 * num_rows * inner * outer
    return pl.CostEstimate(flops=flops, bytes_accessed=bytes_read + written, transcendentals=0)
