"""What an expert computes, and the parameters it needs (legend: `moe_jax.moe`).

The maths is written once. A `Layout` says how rows meet the weights of their expert: one FFN for
all rows, slots of every expert side by side, or rows sorted by expert.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

Weights = Mapping[str, jax.Array]
# The weights of experts, and the names of their dims in `parallel.rules`.
EXPERT_AXES = {
    "wi": ("expert", "model", "hidden"),
    "wg": ("expert", "model", "hidden"),
    "wo": ("expert", "hidden", "model"),
    "bi": ("expert", "hidden"),
    "bg": ("expert", "hidden"),
    "bo": ("expert", "model"),
}
EXPERT_WEIGHTS = tuple(EXPERT_AXES)


class Layout(Protocol):
    """How rows `x[..., I]` meet weights.

    Attributes:
      rng: key for what is random in these rows, or None.
    """

    rng: jax.Array | None

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """`x[..., I] @ weight[I, O]`, with the weight of each row's own expert."""

    def expand(self, bias: jax.Array) -> jax.Array:
        """`bias[O]` of each row's own expert, in a shape that adds to the rows."""


# What experts compute, each row by itself: (rows [..., M], weights, layout) -> rows [..., M].
Experts = Callable[[jax.Array, Weights, Layout], jax.Array]


class Shared:
    """Every row meets the same weights [I, O]: a dense FFN, or shared experts."""

    rng: jax.Array | None = None

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[..., I] @ [I, O] -> [..., O]."""
        return jnp.matmul(x, weight)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[O], which broadcasts."""
        return bias


def ffn(
    x: jax.Array,
    weights: Weights,
    activation: str,
    layout: Layout,
    *,
    dropout_rate: float = 0.0,
) -> jax.Array:
    """A feed-forward network, for whichever rows and experts the layout holds.

    Args:
      x: rows [..., M]; computed in their dtype.
      weights: `wi` and `wo`, `wg` if gated, and biases `bi`, `bg`, `bo` if there are any.
      activation: "relu", "gelu": act(x wi) wo; "swiglu", "geglu": (act(x wg) * x wi) wo
        (Shazeer 2020, arXiv:2002.05202). GELU is the exact one.
      layout: how rows meet weights.
      dropout_rate: on the hidden units; off if the layout has no random key.

    Returns:
      Rows [..., M] in the dtype of `x`.
    """

    def linear(rows: jax.Array, name: str) -> jax.Array:
        out = layout.matmul(rows, weights["w" + name].astype(x.dtype))
        bias = weights.get("b" + name)
        return out if bias is None else out + layout.expand(bias.astype(x.dtype))

    if activation in ("swiglu", "geglu"):
        gate = jax.nn.silu if activation == "swiglu" else exact_gelu
        hidden = gate(linear(x, "g")) * linear(x, "i")
    else:
        hidden = (jax.nn.relu if activation == "relu" else exact_gelu)(linear(x, "i"))
    if dropout_rate > 0 and layout.rng is not None:
        keep = jax.random.bernoulli(layout.rng, 1 - dropout_rate, hidden.shape)
        hidden = jnp.where(keep, hidden / (1 - dropout_rate), 0)
    return linear(hidden, "o")


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function, as in PyTorch; JAX's own default is the tanh form."""
    return jax.nn.gelu(x, approximate=False)
