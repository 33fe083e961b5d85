"""The choices of tokens, and their rows sorted by expert (legend: `moe_jax.moe`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.run_experts.gather import Places


class UngroupedChoices(NamedTuple):
    """The choices of the tokens of all groups.

    Attributes:
      expert_JK: int32 in [0, E).
      gate_JK: float32.
      kept_JK: bool.
    """

    expert_JK: jax.Array
    gate_JK: jax.Array
    kept_JK: jax.Array


class Order(NamedTuple):
    """Kept choices sorted by expert, then by token.

    Attributes:
      choice_R: int32, the choice (token * K + k) of each row; dropped ones come last.
      row_JK: int32, the row of each choice.
      rows_E: int32, kept rows of each expert.
    """

    choice_R: jax.Array
    row_JK: jax.Array
    rows_E: jax.Array

    def places(self, kept_JK: jax.Array) -> Places:
        """The kept choices and their rows; rows after them are empty."""
        is_filled_R = jnp.arange(self.choice_R.size) < jnp.sum(self.rows_E)
        choice_R = jnp.where(is_filled_R, self.choice_R, kept_JK.size)
        return Places(choice_R, self.row_JK, kept_JK)


def without_groups(assignment: Assignment) -> UngroupedChoices:
    """The choices of an assignment, with the tokens of all groups in one dim."""
    values = (assignment.expert_index_GSK, assignment.gate_GSK, assignment.kept_GSK)
    return UngroupedChoices(*(value.reshape(-1, value.shape[-1]) for value in values))


def sort_by_expert(choices: UngroupedChoices, num_experts: int) -> Order:
    """The order of the kept choices.

    Raises:
      ValueError: (E + 1) * J * K does not fit in int32.
    """
    expert_JK, _, kept_JK = choices
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
    rows_E = jnp.sum(is_expert_JKE, axis=(0, 1), dtype=jnp.int32)
    return Order(choice_R, row_R.reshape(key_JK.shape), rows_E)
