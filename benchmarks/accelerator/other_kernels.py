"""Grouped matmuls that the library does not use: one product, forward and backward.

They show whether the library's choice of kernels is still right. A form that is not installed gives
a failed row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.clock import bar, compiled, rate_against
from benchmarks.accelerator.experts import kernels_in, largest, largest_difference, random
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.shapes import SHAPES, TINY, Shape, group_sizes
from moe_jax.parallel.rules import platform

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def rows(dry: bool) -> list[Row]:
    """The forms for this platform, on every shape with even loads."""
    return [
        Row(f"{name}/{form}", 12, functools.partial(measure, shape, form, dry))
        for form in ("lax", *FORMS_OF.get(platform(), ()))
        for name, shape in (TINY if dry else SHAPES).items()
    ]


def measure(shape: Shape, form: str, dry: bool) -> dict[str, Any]:
    """Times a form, alternating with the matmul; the error is against a dense product."""
    product = FORMS[form]()
    sizes = group_sizes(shape, "even")
    x = random(0, (shape.rows, shape.model_dim))
    weight = random(1, (shape.experts, shape.model_dim, shape.expert_dim), 0.02)
    dy = random(2, (shape.rows, shape.expert_dim))

    def forward_backward(x: Any, weight: Any, sizes_E: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(lambda x, weight: product(x, weight, sizes_E), x, weight)
        return y, vjp(dy)

    program = compiled(forward_backward, x, weight, jnp.asarray(sizes), dy)
    flops = shape.flops(shape.rows) / 3
    found = rate_against(program.timed, flops, *bar(dry), dry)
    y, (dx, dweight) = program.timed.wait(program.timed.call())
    own = slice(int(sizes[:-2].sum()), int(sizes.sum()))  # rows of the last expert with rows
    expected = x[own] @ weight[-2], dy[own] @ weight[-2].T, x[own].T @ dy[own]
    pairs = zip((y[own], dx[own], dweight[-2]), expected, strict=True)
    return {
        **found,
        **program.facts,
        "error": largest([largest_difference(a, b) for a, b in pairs]),
        "empty_expert": float(jnp.abs(dweight[-1].astype(jnp.float32)).max()),
        "kernels": kernels_in(program.text),
    }


def lax() -> Product:
    """`jax.lax.ragged_dot`, as compiled for this platform."""
    return jax.lax.ragged_dot


def mosaic_gpu(block_m: int, grid_block_n: int) -> Product:
    """JAX's Pallas kernels for Hopper, with a tile size."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    tiles = {"block_m": block_m, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4,
             "grid_block_n": grid_block_n}  # fmt: skip

    @jax.custom_vjp
    def product(x: jax.Array, weight: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return ragged_dot(x, weight, group_sizes=sizes_E, **tiles)

    def forward(x: jax.Array, weight: jax.Array, sizes_E: jax.Array) -> Any:
        return product(x, weight, sizes_E), (x, weight, sizes_E)

    def backward(kept: Any, dy: jax.Array) -> Any:
        x, weight, sizes_E = kept
        dx = ragged_dot(dy, weight, group_sizes=sizes_E, transpose_rhs=True, **tiles)
        return dx, transposed_ragged_dot(x, dy, group_sizes=sizes_E, **tiles), None

    product.defvjp(forward, backward)
    return product


def tokamax(implementation: str) -> Product:
    """The product of the package tokamax."""
    import tokamax as package

    return lambda x, weight, sizes_E: package.ragged_dot(
        x, weight, sizes_E, implementation=implementation
    )


FORMS: dict[str, Callable[[], Product]] = {
    "lax": lax,
    "mosaic_gpu, 64 rows": functools.partial(mosaic_gpu, 64, 2),
    "mosaic_gpu, 128 rows": functools.partial(mosaic_gpu, 128, 8),
    "tokamax mosaic": functools.partial(tokamax, "mosaic"),
    "tokamax triton": functools.partial(tokamax, "triton"),
}
FORMS_OF = {
    "gpu": ("mosaic_gpu, 64 rows", "mosaic_gpu, 128 rows", "tokamax mosaic", "tokamax triton"),
    "tpu": ("tokamax mosaic",),
}
