"""How easily the choices of experts flip: under noise, in another precision, since a checkpoint.

The same tokens are compared, token by token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.analysis.routed import Routed, route_batches
from moe_jax.data import Example
from moe_jax.models.model import LanguageModel
from moe_jax.training.state import TrainState


class Flips(NamedTuple):
    """The share of tokens that have other experts; both in [0, 1].

    Attributes:
      first: tokens whose first choice differs; 1 - 1 / E for unrelated even routing.
      set: tokens whose sets of chosen experts differ, whatever the order.
    """

    first: float
    set: float


def flips(expert_JK: np.ndarray, other_JK: np.ndarray) -> Flips:
    """Compares two routings of the same tokens in one layer.

    Args:
      expert_JK: int in [0, E), best first, each expert of a token once; -1 is no choice.
      other_JK: the choices of another checkpoint, precision or noise; K may differ.

    Raises:
      ValueError: the numbers of tokens differ, or there are no tokens.
    """
    if len(expert_JK) != len(other_JK) or not len(expert_JK):
        raise ValueError(
            f"Choices are compared token by token: {len(expert_JK)} tokens against "
            f"{len(other_JK)}. Route the same tokens both times."
        )
    longest = max(expert_JK.shape[1], other_JK.shape[1])
    sets = [
        np.sort(np.pad(index_JK, ((0, 0), (0, longest - index_JK.shape[1])), constant_values=-1))
        for index_JK in (expert_JK, other_JK)
    ]
    return Flips(
        first=float(np.mean(expert_JK[:, 0] != other_JK[:, 0])),
        set=float(np.mean((sets[0] != sets[1]).any(axis=1))),
    )


def route_variations(
    state: TrainState,
    model: LanguageModel,
    batches: Sequence[Example],
    max_tokens: int,
    noise: float,
    *,
    of_encoder: bool = False,
) -> dict[str, Routed]:
    """Routes tokens under small variations, for comparison with `route_batches`.

    Args:
      state: see `route_batches`.
      model: its model.
      batches: the tokens, in batches.
      max_tokens: stop after this many tokens.
      noise: `input_noise` of `route_batches`.
      of_encoder: see `route_batches`.

    Returns:
      The routing by variation: "input noise 0.01", "compute in bfloat16" and "router in bfloat16",
      or float32 for what already is in bfloat16.
    """

    def with_other_router(part: Any) -> Any:
        if not part.routes:
            return part
        router = dataclasses.replace(part.router, dtype=other_dtype(part.router.dtype))
        return dataclasses.replace(part, router=router)

    other_router = model.map_parts(with_other_router)
    other_compute = dataclasses.replace(model, compute_dtype=other_dtype(model.compute_dtype))
    routers = (moe.router for moe in other_router.moe_parts.values())
    dtypes = " and ".join(dict.fromkeys(router.dtype for router in routers))
    varied = {
        f"input noise {noise:g}": (model, noise),
        f"compute in {other_compute.compute_dtype}": (other_compute, 0.0),
        f"router in {dtypes}": (other_router, 0.0),
    }
    return {
        name: route_batches(state, one, batches, max_tokens, size, of_encoder=of_encoder)
        for name, (one, size) in varied.items()
    }


def other_dtype(dtype: str) -> str:
    """bfloat16 for float32, and float32 for any other."""
    return "bfloat16" if dtype == "float32" else "float32"
