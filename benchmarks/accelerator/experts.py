"""The three products of SwiGLU experts only, forward and backward.

Weights, rows and gradients are bfloat16. Useful FLOPs count rows that reach an expert, not padding
or dropped rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.clock import bar, compiled, rate_against
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.kernels import DENSE as DENSE_KERNEL
from benchmarks.accelerator.kernels import ragged, usable_kernels
from benchmarks.accelerator.shapes import (
    FACTOR,
    ROUTINGS,
    SHAPES,
    TINY,
    Shape,
    group_sizes,
    kept_in_slots,
)
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.run_experts.rows import SortedRows
from moe_jax.moe.run_experts.slots import Slots
from moe_jax.parameters import SAME_WEIGHTS

EXPERTS = FeedForward(SwiGLU())
SLOTS = f"slots {FACTOR}"
MARKS = (
    "__gpu$xla.gpu.triton", "mosaic_gpu", "tpu_custom_call", "__cudnn", "__cublas",
    "__triton_nested_gemm_fusion", "ragged-dot",
)  # fmt: skip
DENSE = "dense FFN"  # every row through the same expert: a lower bound of the cost of grouping


class Form(NamedTuple):
    """A way to compute the experts.

    Attributes:
      function: `(x, weights, sizes_E) -> y`.
      x: rows, in the layout of the form.
      weights: weights by name.
      sizes_E: rows of each expert; an operand, so that the compiler does not know them.
      rows: number of rows that reach an expert.
    """

    function: Callable[[jax.Array, dict[str, jax.Array], jax.Array], jax.Array]
    x: jax.Array
    weights: dict[str, jax.Array]
    sizes_E: jax.Array
    rows: int


def rows(dry: bool) -> list[Row]:
    """Mixtral's shape first; for each shape the kernels, then slots and the dense FFN."""
    shapes = TINY if dry else SHAPES
    kernels = [ragged(kernel) for kernel in usable_kernels(of_products=True, dense=False)]
    forms = [*kernels, SLOTS, DENSE, ragged(DENSE_KERNEL)]
    found = []
    for routing in ROUTINGS:
        for name, shape in shapes.items():
            for form in forms:
                if form == DENSE and routing != "even":
                    continue
                run = functools.partial(measure, shape, routing, form, dry)
                is_first = routing == "even" and form in kernels
                found.append(Row(f"{name}/{routing}/{form}", 10, run, is_first))
    name, shape = next(iter(shapes.items()))
    for form in forms:
        run = functools.partial(measure, shape, "even", form, dry, backward=False)
        found.append(Row(f"{name}, forward/even/{form}", 7, run, form in kernels))
    return sorted(found, key=lambda row: row.name.endswith(ragged(DENSE_KERNEL)))


def measure(
    shape: Shape, routing: str, form: str, dry: bool, backward: bool = True
) -> dict[str, Any]:
    """Times one form, alternating with the matmul."""
    made = make(shape, routing, form)
    dy = jax.random.normal(jax.random.key(9), made.x.shape, made.x.dtype)

    def forward_backward(x: jax.Array, weights: Any, sizes_E: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda x, weights: made.function(x, weights, sizes_E), x, weights)
        return (y, vjp(dy)) if backward else y

    program = compiled(forward_backward, made.x, made.weights, made.sizes_E, dy)
    flops = shape.flops(made.rows) / (1 if backward else 3)
    found = rate_against(program.timed, flops, *bar(dry), dry)
    out = program.timed.wait(program.timed.call())
    checks = backward and form.startswith("ragged")
    return {
        **found,
        **program.facts,
        "rows": made.rows,
        "kernels": kernels_in(program.text),
        **(checked(made, dy, out) if checks else {}),
    }


def checked(made: Form, dy: jax.Array, out: Any) -> dict[str, Any]:
    """Compares the last expert with rows with a dense FFN, and checks the empty expert.

    The error is the largest difference over the largest entry, for the output and all gradients. A
    kernel that is correct on small arrays may still overflow its indices on large arrays.
    """
    sizes = [int(size) for size in made.sizes_E]
    last = max(expert for expert, size in enumerate(sizes) if size)
    own = slice(sum(sizes[:last]), sum(sizes[: last + 1]))
    y, (dx, dweights) = out

    def alone(x: jax.Array, weights: Any, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda x, weights: EXPERTS(x, weights, SAME_WEIGHTS), x, weights)
        return y, vjp(dy)

    weights = {name: weight[last] for name, weight in made.weights.items()}
    expected = jax.jit(alone)(made.x[own], weights, dy[own])
    got = y[own], (dx[own], {name: weight[last] for name, weight in dweights.items()})
    errors = jax.tree.map(largest_difference, got, expected)
    empty = [float(jnp.abs(weight[-1].astype(jnp.float32)).max()) for weight in dweights.values()]
    return {"error": largest(jax.tree.leaves(errors)), "empty_expert": largest(empty)}


def largest(values: list[float]) -> float:
    """The largest value; NaN if any is NaN, which Python's `max` may miss."""
    return float(np.max(values))


def largest_difference(got: jax.Array, expected: jax.Array) -> float:
    """The largest difference over the largest expected entry."""
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.abs(got - expected).max() / (jnp.abs(expected).max() + 1e-30))


def make(shape: Shape, routing: str, form: str) -> Form:
    """A form with random rows and weights."""
    sizes_E = jnp.asarray(group_sizes(shape, routing))
    names, dims = ("wi", "wg", "wo"), (shape.model_dim, shape.expert_dim)
    experts = () if form == DENSE else (shape.experts,)
    weights = {
        name: random(i, (*experts, *(dims if name != "wo" else dims[::-1])), 0.02)
        for i, name in enumerate(names)
    }
    if form == SLOTS:
        x_EGCM = random(8, (shape.experts, 1, shape.slots, shape.model_dim))
        kept = kept_in_slots(shape, routing)
        return Form(lambda x, w, _: EXPERTS(x, w, Slots(None)), x_EGCM, weights, sizes_E, kept)
    x_RM = random(8, (shape.rows, shape.model_dim))
    if form == DENSE:
        return Form(lambda x, w, _: EXPERTS(x, w, SAME_WEIGHTS), x_RM, weights, sizes_E, shape.rows)
    kernel = form.removeprefix("ragged").strip()

    def run(x: jax.Array, weights: dict[str, jax.Array], sizes_E: jax.Array) -> jax.Array:
        return EXPERTS(x, weights, SortedRows(None, sizes_E, shape.rows, kernel))

    return Form(run, x_RM, weights, sizes_E, shape.rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random(seed: int, shape: tuple[int, ...], stddev: float = 1.0) -> jax.Array:
    """Normal numbers in bfloat16."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * jnp.bfloat16(stddev)


def kernels_in(text: str) -> dict[str, int]:
    """Number of calls in a compiled program to other than plain XLA, by target."""
    return {mark: count for mark in MARKS if (count := text.count(mark))}
