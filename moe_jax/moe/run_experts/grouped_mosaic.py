"""The products of a grouped matmul by the Pallas kernels for Hopper GPUs that come with JAX.

They use tiles of 64 rows and search the groups one by one, so many experts on a device make them
slow. The gradient of the weights multiplies rows of the next expert by 0, so non-finite values
there spread. Products of float32 would be TF32, at any requested precision (`wgmma` in
jax/experimental/mosaic/gpu). Legend: `moe_jax.moe`.
"""

from typing import Any

import jax
import jax.numpy as jnp

TILES: dict[str, Any] = {"block_m": 64, "block_n": 128, "block_k": 64}
STEPS: dict[str, Any] = {"max_concurrent_steps": 4, "grid_block_n": 2}


def rows(
    x_RI: jax.Array,
    weight: jax.Array,
    group_sizes_E: jax.Array,
    likely_rows: int,
    transposed: bool,
) -> jax.Array:
    """See `grouped_matmul.Products`.

    Raises:
      ValueError: I or O is not a multiple of 128, or the rows are not 16-bit floats.
    """
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    check_dtype(x_RI.dtype)
    check_multiples(*weight.shape[1:])
    return ragged_dot(
        x_RI, weight, group_sizes=group_sizes_E, transpose_rhs=transposed, **TILES, **STEPS
    )


def weights(
    x_RI: jax.Array, dy_RO: jax.Array, group_sizes_E: jax.Array, likely_rows: int
) -> jax.Array:
    """See `grouped_matmul.Products`."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    # The kernel reads whole blocks of rows, even past the last row.
    x_RI, dy_RO = (
        jnp.pad(array, ((0, -len(array) % TILES["block_k"]), (0, 0))) for array in (x_RI, dy_RO)
    )
    return transposed_ragged_dot(x_RI, dy_RO, group_sizes=group_sizes_E, **TILES, **STEPS)


def check_dtype(dtype: Any) -> None:
    """Raises `ValueError` for a dtype that the kernel would round before it multiplies."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            "grouped_matmul='mosaic_gpu' needs bfloat16 or float16: it multiplies float32 as TF32: "
            f"{jnp.dtype(dtype).name}. Set grouped_matmul='triton'."
        )


def check_multiples(*dims: int) -> None:
    """Raises `ValueError` unless dims are multiples of 128, the size of the kernel's tiles."""
    if any(dim % 128 for dim in dims):
        raise ValueError(
            "grouped_matmul='mosaic_gpu' needs model and expert dims that are multiples of 128: "
            f"{dims}. Set grouped_matmul='triton'."
        )
