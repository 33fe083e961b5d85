"""The token ids that an expert specialises in (legend: `moe_jax.moe`)."""

from typing import NamedTuple

import numpy as np


class RoutedToken(NamedTuple):
    """A token id and an expert.

    Attributes:
      token: the id.
      share: the share of its occurrences that have the expert among their choices, in [0, 1].
      occurrences: how often it occurs.
    """

    token: int
    share: float
    occurrences: int


def most_frequent_ids(occurrences_V: np.ndarray, num_ids: int) -> np.ndarray:
    """The most frequent ids, at most `num_ids`, by falling count; equal ones by id."""
    order = np.lexsort((np.arange(len(occurrences_V)), -occurrences_V))
    return order[: min(num_ids, np.count_nonzero(occurrences_V))]


def most_routed_tokens(
    counts_VE: np.ndarray, occurrences_V: np.ndarray, *, min_count: int, num_tokens: int
) -> list[list[RoutedToken]]:
    """For each expert, the token ids that go to it most reliably.

    Args:
      counts_VE: occurrences of each id that have the expert among their choices, as
        `information.choice_counts` counts them. Random routing gives each id a share of K / E.
      occurrences_V: occurrences of each id.
      min_count: ids with fewer occurrences are left out: their shares are chance.
      num_tokens: the most ids per expert.

    Returns:
      For each of the E experts, ids by falling share, and by falling count if shares are equal. Ids
      that never go to the expert are left out.

    Source: vocabulary specialization, OLMoE, arXiv:2409.02060, sec. 5.4, eq. 8 and table 8 (there
      with K = 1 and ids of at least 10 occurrences).
    """
    found = []
    for counts_V in counts_VE.T:
        ids = np.flatnonzero((occurrences_V >= max(min_count, 1)) & (counts_V > 0))
        share = counts_V[ids] / occurrences_V[ids]
        best = np.lexsort((ids, -occurrences_V[ids], -share))[:num_tokens]
        found.append(
            [RoutedToken(int(ids[i]), float(share[i]), int(occurrences_V[ids[i]])) for i in best]
        )
    return found
