"""How often consecutive tokens go to the same experts (legend: `moe_jax.moe`).

Source: Mixtral of Experts, arXiv:2401.04088, sec. 5 and table 5.
"""

import math
from typing import NamedTuple

import numpy as np


class Repetition(NamedTuple):
    """Shares of the pairs of consecutive tokens of a document.

    Attributes:
      num_pairs: number of pairs.
      same_first: share whose first choices are the same; nan without pairs.
      any_shared: share that has an expert in common among all choices given; nan without pairs.
    """

    num_pairs: int
    same_first: float
    any_shared: float


def repetition(expert_JK: np.ndarray, document_J: np.ndarray) -> Repetition:
    """Compares the choices of each token with those of the next in its document.

    Args:
      expert_JK: integers in [0, E), best first; -1 is no choice and equals nothing. For the measure
        of Mixtral ("first or second choice", K = 2) pass `expert_JK[:, :2]`.
      document_J: any numbers, the same for the tokens of one document, which are consecutive.
    """
    is_pair = document_J[1:] == document_J[:-1]
    before_JK, after_JK = expert_JK[:-1][is_pair], expert_JK[1:][is_pair]
    num_pairs = len(before_JK)
    if not num_pairs:
        return Repetition(0, math.nan, math.nan)
    same_JKK = (before_JK[:, :, None] == after_JK[:, None, :]) & (before_JK[:, :, None] >= 0)
    return Repetition(
        num_pairs=num_pairs,
        same_first=float(same_JKK[:, 0, 0].mean()),
        any_shared=float(same_JKK.any(axis=(1, 2)).mean()),
    )


def random_repetition(
    num_experts: int, num_choices: int, num_next: int | None = None
) -> tuple[float, float]:
    """What two tokens share at random, if all sets of experts of a size are equally likely.

    The first choices agree in 1 of E cases. The N choices of the next token all miss the K of this
    one in C(E - K, N) of C(E, N) cases: a share of 6/8 * 5/7 for E = 8, K = N = 2. A token without
    choices shares nothing.

    Args:
      num_experts: E.
      num_choices: K, of a token.
      num_next: N, of the next; None: K.

    Returns:
      same_first, any_shared.
    """
    num_next = num_choices if num_next is None else num_next
    missed = math.comb(num_experts - num_choices, num_next) / math.comb(num_experts, num_next)
    return (1 / num_experts if num_choices and num_next else 0.0), 1 - missed


def expected_repetition(
    expert_JK: np.ndarray, document_J: np.ndarray, num_experts: int
) -> tuple[float, float]:
    """The expected `repetition` of random routing, for tokens with as many choices as these.

    This is `random_repetition` of each pair of consecutive tokens of a document, averaged over all
    pairs. As in `repetition`, pairs with a token without choices count too.

    Args:
      expert_JK: as for `repetition`; the first column has each token's first choice, if it has any.
      document_J: as for `repetition`.
      num_experts: E.

    Returns:
      same_first, any_shared; nan without pairs.
    """
    count_J = np.count_nonzero(expert_JK >= 0, axis=1)
    is_pair = document_J[1:] == document_J[:-1]
    counts_P2 = np.stack([count_J[:-1][is_pair], count_J[1:][is_pair]], axis=1)
    if not len(counts_P2):
        return math.nan, math.nan
    kinds, weights = np.unique(counts_P2, axis=0, return_counts=True)
    shares = [random_repetition(num_experts, *kind) for kind in kinds.tolist()]
    same_first, any_shared = np.average(shares, axis=0, weights=weights).tolist()
    return same_first, any_shared
