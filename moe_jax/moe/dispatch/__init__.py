"""Dispatchers: they carry tokens to their experts and back, one signature each.

`dispatch(x_GSM, assignment, weights, experts, rng) -> y_GSM`, where `experts(rows, weights,
layout)` computes every row by the expert that the layout gives it. They agree in value and in every
gradient:

  einsum  one-hot tensors of shape GSEC, contracted; the reference, and how GShard writes it. Costs
          4 * G*S * S*K*factor * M FLOPs on top of the experts: it grows with the group.
  gather  indices into E x C slots; no GSEC tensor.
  ragged  rows sorted by expert; computes kept choices only, so it is the one without padding.
"""

from typing import Protocol

import jax

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.dispatch.einsum import einsum_dispatch
from moe_jax.moe.dispatch.gather import gather_dispatch
from moe_jax.moe.dispatch.ragged import ragged_dispatch
from moe_jax.moe.experts import Layout, Weights


class Experts(Protocol):
    """What the experts compute, each row by itself."""

    def __call__(self, rows: jax.Array, weights: Weights, layout: Layout) -> jax.Array:
        """Rows [..., M] -> rows [..., M]."""


class Dispatch(Protocol):
    """The signature of a dispatcher; see `einsum_dispatch`."""

    def __call__(
        self,
        x_GSM: jax.Array,
        assignment: Assignment,
        weights: Weights,
        experts: Experts,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """[G, S, M] -> [G, S, M]."""


DISPATCHERS: dict[str, Dispatch] = {
    "einsum": einsum_dispatch,
    "gather": gather_dispatch,
    "ragged": ragged_dispatch,
}

__all__ = ["DISPATCHERS", "Dispatch", "Experts", "einsum_dispatch", "gather_dispatch",
           "ragged_dispatch"]  # fmt: skip
