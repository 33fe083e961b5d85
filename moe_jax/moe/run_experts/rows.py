"""Rows sorted by expert: kept choices only, no padding (legend: `moe_jax.moe`).

Experts compute `SortedRows` through a kernel (`grouped_matmul`). On a CPU they run one after
another (`expert_loop`).
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.run_experts.expert_loop import expert_loop, one_by_one
from moe_jax.moe.run_experts.gather import rows_of, sum_choices
from moe_jax.moe.run_experts.grouped_matmul import grouped_matmul

# Choices that a CPU computes one by one rather than in a loop over experts: when decoding one text,
# or a few. XLA copies the operands of a loop inside of a scan over layers: the matrices of all
# experts of the layer.
FEW_CHOICES = 8


class SortedRows:
    """Rows `[R, I]` sorted by expert: the first `group_sizes_E[0]` are expert 0's, and so on.

    Args:
      rng: key of the experts, or None.
      group_sizes_E: int32, rows of each expert.
      num_rows: R, those past the last group included.
      kernel: of `grouped_matmul`.
      likely_rows: how many rows groups are likely to have together; None: all.
    """

    def __init__(
        self,
        rng: jax.Array | None,
        group_sizes_E: jax.Array,
        num_rows: int,
        kernel: str,
        likely_rows: int | None = None,
    ):
        self.rng, self.kernel, self.likely_rows = rng, kernel, likely_rows or num_rows
        ends_E = jnp.cumsum(group_sizes_E)
        self.group_sizes_E = group_sizes_E
        self.in_group_R = jnp.arange(num_rows) < ends_E[-1]
        self.expert_R = jnp.searchsorted(ends_E, jnp.arange(num_rows), side="right")

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[R, I] x [E, I, O] -> [R, O]; rows past the last group are 0, whatever they held."""
        # What a kernel leaves in rows of no group is not defined, in either direction.
        x = jnp.where(self.in_group_R[:, None], x, 0)
        y = grouped_matmul(x, weight, self.group_sizes_E, self.kernel, self.likely_rows)
        return jnp.where(self.in_group_R[:, None], y, 0)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[E, O] -> [R, O]; rows past the last group get the last expert's."""
        return jnp.take(bias, self.expert_R, axis=0, mode="clip")


def run_sorted_rows(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None = None,
    *,
    kernel: str,
) -> jax.Array:
    """Sorts the kept choices by expert, computes them, and sums them by token.

    Arguments and result are those of `run_experts`; slots are not used. `kernel` multiplies rows
    and weights (`grouped_matmul`); "loop" runs experts block by block (`expert_loop`).
    """
    num_choices = assignment.kept_GSK.shape[-1]
    y_JM = through_sorted_rows(
        x_GSM.reshape(-1, x_GSM.shape[-1]),
        assignment.expert_index_GSK.reshape(-1, num_choices),
        assignment.gate_GSK.reshape(-1, num_choices),
        assignment.kept_GSK.reshape(-1, num_choices),
        weights,
        experts,
        rng,
        kernel,
    )
    return y_JM.reshape(x_GSM.shape)


def through_sorted_rows(
    x_JM: jax.Array,
    expert_JK: jax.Array,
    gate_JK: jax.Array,
    kept_JK: jax.Array,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    kernel: str,
    likely_rows: int | None = None,
) -> jax.Array:
    """`run_sorted_rows` without groups: [J, M] -> [J, M] in the dtype of `x_JM`.

    `likely_rows` is how many choices are likely to be kept; None: all.
    """
    num_experts = num_experts_of(weights)
    if kernel == "loop" and kept_JK.size <= FEW_CHOICES and likely_rows is None:
        return one_by_one(x_JM, expert_JK, gate_JK, kept_JK, weights, experts, rng)
    choice_R, row_JK, group_sizes_E = sort_by_expert(expert_JK, kept_JK, num_experts)
    if kernel == "loop":
        operands = (x_JM, gate_JK, kept_JK, choice_R, row_JK, group_sizes_E)
        return expert_loop(experts, weights, rng, *operands, likely_rows)
    layout = SortedRows(rng, group_sizes_E, len(choice_R), kernel, likely_rows)
    y_RM = experts(rows_of(x_JM, choice_R, row_JK, kept_JK), weights, layout)
    return sum_choices(y_RM, row_JK, gate_JK, kept_JK).astype(x_JM.dtype)


def sort_by_expert(
    expert_JK: jax.Array, kept_JK: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Orders the kept choices by expert, then by token.

    Args:
      expert_JK: int32 in [0, E).
      kept_JK: bool.
      num_experts: E.

    Returns:
      choice_R: int32, the choice (token * K + k) of each row; dropped ones come last.
      row_JK: int32, its inverse.
      group_sizes_E: int32, kept rows of each expert.

    Raises:
      ValueError: (E + 1) * J * K does not fit in int32.
    """
    num_rows = expert_JK.size
    if (num_experts + 1) * num_rows > jnp.iinfo(jnp.int32).max:
        raise ValueError(
            "(num_experts + 1) * tokens * num_selected_experts must fit in int32: "
            f"num_experts={num_experts}, tokens * num_selected_experts={num_rows}. Use more "
            "microbatches, or run_experts='gather'."
        )
    key_JK = jnp.where(kept_JK, expert_JK, num_experts)
    rows_R = jnp.arange(num_rows, dtype=jnp.int32)
    # Expert and choice packed in one integer: several times faster on a CPU than argsort.
    packed_R = jax.lax.sort(key_JK.reshape(-1).astype(jnp.int32) * num_rows + rows_R)
    choice_R = packed_R % num_rows
    row_R = jnp.zeros_like(rows_R).at[choice_R].set(rows_R, unique_indices=True)
    is_expert_JKE = key_JK[..., None] == jnp.arange(num_experts)
    group_sizes_E = jnp.sum(is_expert_JKE, axis=(0, 1), dtype=jnp.int32)
    return choice_R, row_R.reshape(key_JK.shape), group_sizes_E


def num_experts_of(weights: Weights) -> int:
    """The leading dim of the weights of experts."""
    return jax.tree.leaves(dict(weights))[0].shape[0]
