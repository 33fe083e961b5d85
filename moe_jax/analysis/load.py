"""How evenly experts are used (legend: `moe_jax.moe`)."""

from typing import NamedTuple

import numpy as np


class Load(NamedTuple):
    """The load of the experts of a layer.

    Attributes:
      share_E: float64, share of all choices that went to each expert; sums to 1.
      fullest: share of the fullest expert, as a multiple of an even split; 1 at best, E at worst.
      effective_experts: exp of the entropy of the shares: E at an even split, 1 if one expert has
        all choices.
    """

    share_E: np.ndarray
    fullest: float
    effective_experts: float


def expert_load(expert_JK: np.ndarray, num_experts: int) -> Load:
    """Counts the choices of each expert.

    Args:
      expert_JK: integers in [0, E), the choices of each token; -1 is no choice.
      num_experts: E.

    Raises:
      ValueError: no token has a choice.
    """
    counts_E = np.bincount(expert_JK[expert_JK >= 0], minlength=num_experts)
    if not counts_E.sum():
        raise ValueError(
            f"A load needs at least one choice: {expert_JK.shape[0]} tokens have none. Pass more "
            "tokens."
        )
    share_E = counts_E / counts_E.sum()
    used = share_E[share_E > 0]
    return Load(
        share_E=share_E,
        fullest=float(share_E.max() * num_experts),
        effective_experts=float(np.exp(-np.sum(used * np.log(used)))),
    )
