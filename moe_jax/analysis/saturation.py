"""How early a router has settled (legend: `moe_jax.moe`)."""

import numpy as np


def router_saturation(expert_JK: np.ndarray, last_expert_JK: np.ndarray) -> float:
    """The share of the choices at a checkpoint that the last checkpoint also makes.

    Args:
      expert_JK: integers in [0, E), the distinct choices of each token at a checkpoint; -1 is no
        choice. For the first choice only, pass the first column of both, [J, 1].
      last_expert_JK: the choices of the same tokens at the last checkpoint.

    Returns:
      In [0, 1]: 1 at the last checkpoint itself; K / E is expected for unrelated even routing. nan
      if no token has a choice.

    Source: OLMoE, arXiv:2409.02060, sec. 5.1, eq. 5. If tokens have different numbers of choices,
      the mean is over choices.
    """
    is_choice_JK = expert_JK >= 0
    is_kept_JK = (expert_JK[:, :, None] == last_expert_JK[:, None, :]).any(axis=2) & is_choice_JK
    num_choices = np.count_nonzero(is_choice_JK)
    return float(np.count_nonzero(is_kept_JK) / num_choices) if num_choices else float("nan")
