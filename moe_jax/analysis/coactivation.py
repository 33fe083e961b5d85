"""Which experts are chosen together (legend: `moe_jax.moe`)."""

import numpy as np


def coactivation(expert_JK: np.ndarray, num_experts: int) -> np.ndarray:
    """The share of the tokens of expert i that also choose expert j.

    Args:
      expert_JK: integers in [0, E), the distinct choices of each token; -1 is no choice.
      num_experts: E.

    Returns:
      float64 [E, E], row i given i: N_ij / N_i, not symmetric unless the load is even. The diagonal
      is 1; the row of an expert without tokens is nan. Random routing gives (K - 1) / (E - 1) off
      the diagonal.

    Source: OLMoE, arXiv:2409.02060, sec. 5.2, eq. 6.
    """
    chosen_JE = np.zeros((len(expert_JK), num_experts + 1))
    np.put_along_axis(chosen_JE, expert_JK, 1, axis=1)  # -1 falls into the column that is cut off
    chosen_JE = chosen_JE[:, :num_experts]
    together_EE = chosen_JE.T @ chosen_JE
    with np.errstate(invalid="ignore"):
        return together_EE / np.diagonal(together_EE)[:, None]
