"""What a category of tokens (domain, token id) tells about their experts (`moe_jax.moe`).

A table counts choices by category and expert; mutual information reduces it to one number. With
finitely many tokens that number is above 0 even if nothing is shared. So it is compared with that
of the same routing shuffled over the tokens. Shuffling keeps the load of every expert and the size
of every category, but breaks their connection.
"""

import numpy as np


def choice_counts(
    category_J: np.ndarray, expert_JK: np.ndarray, num_categories: int, num_experts: int
) -> np.ndarray:
    """How often the tokens of each category chose each expert.

    Args:
      category_J: integers in [0, I), such as the domain or the id of each token.
      expert_JK: integers in [0, E), the choices of each token; -1 is no choice.
      num_categories: I.
      num_experts: E.

    Returns:
      int64 [I, E].
    """
    is_choice_JK = expert_JK >= 0
    cell_JK = category_J[:, None].astype(np.int64) * num_experts + expert_JK
    counts = np.bincount(cell_JK[is_choice_JK], minlength=num_categories * num_experts)
    return counts.reshape(num_categories, num_experts)


def mutual_information(counts_IE: np.ndarray) -> float:
    """Mutual information of the rows and columns of a table of counts, bits.

    It is between the category of a choice and its expert, with relative frequencies as
    probabilities ("plug-in"). If each token has K choices, it is what the category tells about one
    of them, drawn at random: at most log2(E / K) bits if all experts are used equally.

    Args:
      counts_IE: not negative, not all 0.
    """
    joint_IE = counts_IE / counts_IE.sum()
    apart_IE = joint_IE.sum(axis=1, keepdims=True) * joint_IE.sum(axis=0, keepdims=True)
    there = joint_IE > 0
    bits = np.sum(joint_IE[there] * np.log2(joint_IE[there] / apart_IE[there]))
    return max(float(bits), 0.0)  # rounding may give -1e-17


def expected_bias(
    num_categories: int, num_experts: int, choices_per_token: float, num_tokens: int
) -> float:
    """The expected `mutual_information` if nothing is shared, bits.

    With N choices, the plug-in value times 2 N ln 2 is the likelihood-ratio statistic of
    independence. Its mean is its degrees of freedom: (I - 1)(E - 1) for independent choices. Here
    it is (I - 1)(E - K), since the K choices of a token differ. An expert that a token chooses with
    probability p_e has variance p_e (1 - p_e) per token, and sum_e (1 - p_e) = E - K. The value is
    approximate if most cells of the table expect fewer than a few counts.

    Args:
      num_categories: I, the categories that occur.
      num_experts: E, the experts that are chosen at all.
      choices_per_token: K, the mean.
      num_tokens: J.
    """
    freedom = (num_categories - 1) * (num_experts - choices_per_token)
    return freedom / (2 * num_tokens * choices_per_token * np.log(2))


def shuffled_information(
    category_J: np.ndarray,
    expert_JK: np.ndarray,
    num_categories: int,
    num_experts: int,
    *,
    num_shuffles: int,
    within_J: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The mutual information of a table after its routing was shuffled over the tokens, bits.

    Each token gets the choices of another, all K of them together.

    Args:
      category_J: see `choice_counts`.
      expert_JK: see `choice_counts`.
      num_categories: I.
      num_experts: E.
      num_shuffles: number of independent shuffles.
      within_J: shuffle only among tokens with the same number here, such as the token id: the
        information that is left is what that number explains.
      seed: of the shuffles.

    Returns:
      float64 [num_shuffles].
    """
    rng = np.random.default_rng(seed)
    groups_J = np.zeros_like(category_J) if within_J is None else within_J
    place_J = np.argsort(groups_J, kind="stable")
    shuffled_JK, values = np.empty_like(expert_JK), []
    for _ in range(num_shuffles):
        shuffled_JK[place_J] = expert_JK[np.lexsort((rng.random(len(groups_J)), groups_J))]
        counts_IE = choice_counts(category_J, shuffled_JK, num_categories, num_experts)
        values.append(mutual_information(counts_IE))
    return np.array(values)
