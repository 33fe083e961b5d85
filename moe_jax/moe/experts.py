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

from moe_jax.config.settings import Settings
from moe_jax.parameters import Layout, dense, grouped

Weights = Mapping[str, Any]  # arrays, or `Weight`s, by name


@dataclasses.dataclass(frozen=True)
class Activation(Settings):
    """The function between the matrix products of a feed-forward network.

    Attributes:
      gated: whether there is a third matrix, for the gate.
    """

    family: ClassVar[str] = "activation"
    gated: ClassVar[bool] = False

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """The hidden units.

        Args:
          inner: x wi, [..., H].
          gate: x wg, [..., H], if the activation is gated; else None.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Relu(Activation):
    """max(x wi, 0)."""

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        return jax.nn.relu(inner)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A feed-forward network on rows and experts in any layout.

    Attributes:
      activation: between the matrix products.
      dropout_rate: on the hidden units; off if the layout has no random key.
    """

    activation: Activation
    dropout_rate: float = 0.0

    def __call__(self, x: jax.Array, weights: Weights, layout: Layout) -> jax.Array:
        """(activation(x wi, x wg)) wo, each row by itself.

        Args:
          x: rows [..., M]; their dtype is the compute dtype.
          weights: `wi` and `wo`, `wg` if gated, and biases `bi`, `bg`, `bo` if there are any.
          layout: how rows are multiplied by weights.

        Returns:
          Rows [..., M] in the dtype of `x`.
        """

        def product(rows: jax.Array, name: str) -> jax.Array:
            out = grouped(rows, weights["w" + name], layout)
            bias = weights.get("b" + name)
            return out if bias is None else out + layout.expand(dense(bias).astype(x.dtype))

        with jax.named_scope("experts"):
            gate = product(x, "g") if self.activation.gated else None
            hidden = self.activation.apply(product(x, "i"), gate)
            if self.dropout_rate > 0 and layout.rng is not None:
                keep = jax.random.bernoulli(layout.rng, 1 - self.dropout_rate, hidden.shape)
                hidden = jnp.where(keep, hidden / (1 - self.dropout_rate), 0)
            return product(hidden, "o")
