"""What an expert computes (legend: `moe_jax.moe`).

The maths is written once. A `Layout` (`moe_jax.parameters`) defines how rows are multiplied by the
weights of their expert: one FFN for all rows, slots of every expert side by side, or rows sorted by
expert.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.moe.activations import Activation
from moe_jax.parameters import Layout, dense, grouped

Weights = Mapping[str, Any]  # arrays, or `Weight`s, by name


@dataclasses.dataclass(frozen=True)
class Experts:
    """The network of experts, on rows in any layout.

    Attributes:
      activation: between the matrix products.
      dropout_rate: on the hidden units; off if the layout has no random key.
      gates_outputs: whether gates multiply outputs, so that the gradient of a gate needs them.
    """

    gates_outputs: ClassVar[bool] = True

    activation: Activation
    dropout_rate: float = 0.0

    def __call__(
        self, x: jax.Array, weights: Weights, layout: Layout, gate: jax.Array | None = None
    ) -> jax.Array:
        """What the experts compute, each row by itself, times the gates.

        Args:
          x: rows [..., M]; their dtype is the compute dtype.
          weights: arrays by name; their leading dim is E if the layout has more than one expert.
          layout: how rows are multiplied by weights.
          gate: float32 [..., 1], a factor of each row's output; None: 1. See `gated`.

        Returns:
          Rows [..., M] in the dtype of `x`.
        """
        raise NotImplementedError


def gated(y: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Rows times their gates, float32 [..., 1], in the dtype of the rows; None: 1."""
    return y if gate is None else (y * gate).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class FeedForward(Experts):
    """(activation(x wi, x wg)) wo.

    `weights` are `wi` and `wo`, `wg` if gated, and biases `bi`, `bg`, `bo` if there are any.
    """

    gates_outputs: ClassVar[bool] = False

    def __call__(
        self, x: jax.Array, weights: Weights, layout: Layout, gate: jax.Array | None = None
    ) -> jax.Array:
        """See `Experts`; the gate multiplies the hidden units.

        Then the gradient of the gate does not depend on the output. The backward pass neither
        keeps the output nor computes it again.
        """

        def product(rows: jax.Array, name: str, factor: jax.Array | None = None) -> jax.Array:
            out = grouped(rows, weights["w" + name], layout)
            if "b" + name not in weights:
                return out
            bias = layout.expand(dense(weights["b" + name]).astype(x.dtype))
            return out + (bias if factor is None else (bias * factor).astype(x.dtype))

        with jax.named_scope("experts"):
            x_wg = product(x, "g") if self.activation.gated else None
            hidden = self.activation.apply(product(x, "i"), x_wg)
            if self.dropout_rate > 0 and layout.rng is not None:
                keep = jax.random.bernoulli(layout.rng, 1 - self.dropout_rate, hidden.shape)
                hidden = jnp.where(keep, hidden / (1 - self.dropout_rate), 0)
            return product(gated(hidden, gate), "o", gate)
