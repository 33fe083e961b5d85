"""Dropless dispatch: rows sorted by expert, no padding (legend: `moe_jax.moe`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.dispatch.grouped_matmul import grouped_matmul
from moe_jax.moe.experts import Layout


class SortedRows:
    """Rows `[R, I]` sorted by expert: the first `group_sizes_E[0]` are expert 0's, and so on."""

    def __init__(self, group_sizes_E: jax.Array, expert_R: jax.Array):
        self.group_sizes_E = group_sizes_E
        self.expert_R = expert_R

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[R, I] x [E, I, O] -> [R, O]; rows past the last group come out 0."""
        return grouped_matmul(x, weight, self.group_sizes_E)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[E, O] -> [R, O]."""
        return bias[self.expert_R]


def ragged_dispatch(
    x_GSM: jax.Array,
    assignment: Assignment,
    num_experts: int,
    experts: Callable[[jax.Array, Layout], jax.Array],
) -> jax.Array:
    """Sorts the kept choices by expert, computes them, and puts them back.

    Args:
      x_GSM: tokens.
      assignment: the kept choices and their gates; slots are not used, so nothing is padded.
      num_experts: E.
      experts: computes rows [R, M] in the `SortedRows` layout, R = G * S * K.

    Returns:
      [G, S, M] in the dtype of `x_GSM`: the gated sum over a token's kept choices.
    """
    model_dim = x_GSM.shape[-1]
    num_choices = assignment.kept_GSK.shape[-1]
    expert_R = jnp.where(assignment.kept_GSK, assignment.expert_index_GSK, num_experts).reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)
    group_sizes_E = jnp.sum(jax.nn.one_hot(expert_R, num_experts, dtype=jnp.int32), axis=0)

    x_RM = x_GSM.reshape(-1, model_dim)[order_R // num_choices]
    layout = SortedRows(group_sizes_E, jnp.minimum(expert_R[order_R], num_experts - 1))
    y_RM = experts(x_RM, layout)
    y_RM = jnp.where((jnp.arange(len(order_R)) < jnp.sum(group_sizes_E))[:, None], y_RM, 0)
    y_choices = jnp.zeros_like(y_RM).at[order_R].set(y_RM, unique_indices=True)
    y_GSKM = y_choices.reshape(*assignment.kept_GSK.shape, model_dim)
    return jnp.einsum("GSK,GSKM->GSM", assignment.gate_GSK, y_GSKM).astype(x_GSM.dtype)
