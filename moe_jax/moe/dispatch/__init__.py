"""Dispatchers: they carry tokens to their experts and back, one signature each.

`dispatch(x_GSM, assignment, num_experts, experts) -> y_GSM`, where `experts(rows, layout)` computes
every row by the expert that the layout gives it. They agree in value and in every gradient:

  einsum  one-hot tensors of shape GSEC, contracted; the reference, and how GShard writes it. Costs
          4 * G*S * S*K*factor * M FLOPs on top of the experts: it grows with the group.
  gather  indices into E x C slots; no GSEC tensor.
  ragged  rows sorted by expert; computes kept choices only, so it is the one without padding.
"""

from collections.abc import Callable

import jax

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.dispatch.einsum import einsum_dispatch
from moe_jax.moe.dispatch.gather import gather_dispatch
from moe_jax.moe.dispatch.ragged import ragged_dispatch
from moe_jax.moe.experts import Layout

Experts = Callable[[jax.Array, Layout], jax.Array]
Dispatch = Callable[[jax.Array, Assignment, int, Experts], jax.Array]

DISPATCHERS: dict[str, Dispatch] = {
    "einsum": einsum_dispatch,
    "gather": gather_dispatch,
    "ragged": ragged_dispatch,
}

__all__ = ["DISPATCHERS", "Dispatch", "Experts", "einsum_dispatch", "gather_dispatch",
           "ragged_dispatch"]  # fmt: skip
