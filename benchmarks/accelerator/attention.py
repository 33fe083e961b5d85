"""Attention only, forward and backward, by every kernel, at 4,096 tokens in bfloat16.

Useful FLOPs count pairs of a query and a visible key: two products forward, twice that backward,
nothing for recomputation. A causal form therefore counts half of the square.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.child import message_of
from benchmarks.accelerator.clock import bar, compiled, rate_against
from benchmarks.accelerator.experts import kernels_in
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.kernels import attention_kernels
from moe_jax.layers.attention_kernels import attend_by_rules
from moe_jax.layers.masks import Rules, Tokens
from moe_jax.parallel.rules import platform


class Form(NamedTuple):
    """The shape and the mask of an attention call.

    Attributes:
      batch: B.
      length: L.
      heads: N.
      kv_heads: heads of keys and values.
      dim: dims of queries and keys.
      value_dim: dims of values.
      documents: packed documents per row.
      window: W, the number of keys that a query sees, or None.
    """

    batch: int = 4
    length: int = 4096
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128
    value_dim: int = 128
    documents: int = 1
    window: int | None = None

    @property
    def segments(self) -> np.ndarray:
        """int32 [L]: the document number of each token, from 1; lengths are unequal."""
        first = self.length // (2 * self.documents) if self.documents > 1 else self.length
        ends = np.linspace(first, self.length, self.documents).astype(int)
        return np.searchsorted(ends, np.arange(self.length), side="right").astype(np.int32) + 1

    @property
    def pairs(self) -> float:
        """Pairs of a query and a visible key, in all rows of one head."""
        lengths = np.unique(self.segments, return_counts=True)[1]
        return self.batch * float(sum(seen_pairs(int(one), self.window) for one in lengths))

    @property
    def flops(self) -> float:
        """Useful FLOPs, forward and backward."""
        return 3 * 2.0 * self.pairs * self.heads * (self.dim + self.value_dim)


def seen_pairs(length: int, window: int | None) -> int:
    """Causal pairs of query and key, at most `window` keys per query."""
    width = length if window is None else min(window, length)
    return width * (width + 1) // 2 + (length - width) * width


MAIN = "causal"
FORMS = {
    MAIN: Form(),
    "grouped queries": Form(kv_heads=8),
    "documents": Form(kv_heads=8, documents=3),
    "window": Form(kv_heads=8, window=1024),
    "latent dims": Form(batch=1, heads=128, kv_heads=128, dim=192),
}


def rows(dry: bool) -> list[Row]:
    """Every form with every kernel."""
    found = []
    for name, form in FORMS.items():
        for kernel in usable_kernels():
            run = functools.partial(measure, tiny(form) if dry else form, kernel, dry)
            found.append(Row(f"{name}/{kernel}", 8, run, first=name == MAIN))
    return found


def usable_kernels() -> list[str]:
    """The kernels that can run here, XLA's last; `blocks` only on a CPU, its target."""
    return [
        kernel for kernel in reversed(attention_kernels())
        if not refusal(kernel) and (kernel != "blocks" or platform() == "cpu")
    ]  # fmt: skip


def measure(form: Form, kernel: str, dry: bool) -> dict[str, Any]:
    """Times a form, alternating with the matmul."""
    q, k, v, dy = draw(form, jnp.bfloat16)
    segments_BL = jnp.broadcast_to(jnp.asarray(form.segments), (form.batch, form.length))
    run = by_kernel(kernel, form)

    def forward_backward(q: Any, k: Any, v: Any, segments_BL: Any, dy: Any) -> Any:
        y, vjp = jax.vjp(lambda q, k, v: run(q, k, v, segments_BL), q, k, v)
        return y, vjp(dy)

    program = compiled(forward_backward, q, k, v, segments_BL, dy)
    found = rate_against(program.timed, form.flops, *bar(dry), dry)
    out = program.timed.wait(program.timed.call())
    finite = all(bool(jnp.isfinite(one).all()) for one in jax.tree.leaves(out))
    return {**found, **program.facts, "finite": finite,
            "kernels": kernels_in(program.text), "form": form._asdict()}  # fmt: skip


def draw(form: Form, dtype: Any) -> list[jax.Array]:
    """Random queries, keys, values, and an output gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((form.heads, form.dim), (form.kv_heads, form.dim), (form.kv_heads, form.value_dim),
             (form.heads, form.value_dim))  # fmt: skip
    return [
        jax.random.normal(key, (form.batch, form.length, *size), dtype)
        for key, size in zip(keys, sizes, strict=True)
    ]


def by_kernel(kernel: str, form: Form) -> Callable[..., jax.Array]:
    """The function `(q, k, v, segments_BL) -> out` with a kernel."""
    rules, scale = Rules(causal=True, window=form.window), form.dim**-0.5

    def run(q: Any, k: Any, v: Any, segments_BL: Any) -> jax.Array:
        tokens = Tokens(positions_of(segments_BL), segments_BL)
        return attend_by_rules(q, k, v, rules, tokens, kernel=kernel, contiguous=True, scale=scale)

    return run


def refusal(kernel: str) -> str:
    """The error of the library or JAX if a kernel cannot run here; "" if it can."""
    form = tiny(FORMS["causal"])
    sizes = ((form.heads, form.dim), (form.kv_heads, form.dim), (form.kv_heads, form.dim))
    arrays = [jax.ShapeDtypeStruct((1, form.length, *size), jnp.bfloat16) for size in sizes]
    segments_BL = jax.ShapeDtypeStruct((1, form.length), jnp.int32)
    try:
        jax.eval_shape(by_kernel(kernel, form), *arrays, segments_BL)
    except Exception as error:  # a missing cuDNN raises no ValueError
        return message_of(error)
    return ""


def small(form: Form, dry: bool) -> Form:
    """The form at a size for parity: few heads, 512 tokens."""
    shared, window = form.heads // form.kv_heads, form.window and 200
    few = form._replace(batch=2, length=512, heads=2 * shared, kv_heads=2, window=window)
    return tiny(form) if dry else few


def tiny(form: Form) -> Form:
    """The form at a size that a CPU computes in a moment."""
    window = form.window and 32
    return form._replace(
        batch=1, length=128, heads=2, kv_heads=1, dim=24, value_dim=16, window=window
    )


def positions_of(segments_BL: jax.Array) -> jax.Array:
    """The position of every token in its document."""
    place_L = jnp.arange(segments_BL.shape[1], dtype=jnp.int32)
    is_first = jnp.diff(segments_BL, axis=1, prepend=0) != 0
    start_BL = jax.lax.cummax(jnp.where(is_first, place_L, 0), axis=1)
    return place_L - start_BL
