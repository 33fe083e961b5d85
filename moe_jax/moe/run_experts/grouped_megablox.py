"""The products of a grouped matmul by megablox, the Pallas TPU kernels that come with JAX.

Source: Gale et al. 2022, MegaBlocks, arXiv:2211.15841; `jax.experimental.pallas.ops.tpu.megablox`.
Legend: `moe_jax.moe`.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.run_experts.tiles import tpu_row_tiles, tpu_weight_tiles
from moe_jax.parallel.rules import platform


def rows(
    x_RI: jax.Array,
    weight: jax.Array,
    group_sizes_E: jax.Array,
    likely_rows: int,
    transposed: bool,
) -> jax.Array:
    """See `grouped_matmul.Products`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    num_rows, inner = x_RI.shape
    outer = weight.shape[1 if transposed else 2]
    sizes = (likely_rows, len(group_sizes_E), inner, outer)
    tiles = tpu_row_tiles(*sizes, x_RI.dtype.itemsize)
    y_RO = gmm(
        in_whole_tiles(x_RI, tiles[0]), weight, group_sizes_E, x_RI.dtype, tiles,
        transpose_rhs=transposed, interpret=platform() == "cpu",
    )  # fmt: skip
    return y_RO[:num_rows]


def weights(
    x_RI: jax.Array, dy_RO: jax.Array, group_sizes_E: jax.Array, likely_rows: int
) -> jax.Array:
    """See `grouped_matmul.Products`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    sizes = (likely_rows, len(group_sizes_E), x_RI.shape[1], dy_RO.shape[1])
    tiles = tpu_weight_tiles(*sizes, x_RI.dtype.itemsize)
    x_RI, dy_RO = (in_whole_tiles(array, tiles[0]) for array in (x_RI, dy_RO))
    # The kernel transposes its argument back.
    return tgmm(
        x_RI.T, dy_RO, group_sizes_E, x_RI.dtype, tiles, interpret=platform() == "cpu"
    )  # fmt: skip


def in_whole_tiles(x_RI: jax.Array, tile: int) -> jax.Array:
    """Pads with rows of no group, up to a multiple of the tile."""
    return jnp.pad(x_RI, ((0, -len(x_RI) % tile), (0, 0)))
