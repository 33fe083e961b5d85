"""Dispatch by indices into capacity slots (legend: `moe_jax.moe`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.dispatch.slots import Slots
from moe_jax.moe.experts import Layout


def gather_dispatch(
    x_GSM: jax.Array,
    assignment: Assignment,
    num_experts: int,
    experts: Callable[[jax.Array, Layout], jax.Array],
) -> jax.Array:
    """Fills E x C slots a group by reading tokens, and reads the outputs back by slot.

    Args:
      x_GSM: tokens.
      assignment: the kept choices, their slots and gates.
      num_experts: E.
      experts: computes rows [E, G, C, M] in the `Slots` layout.

    Returns:
      [G, S, M] in the dtype of `x_GSM`: the gated sum over a token's kept choices.
    """
    groups, tokens, model_dim = x_GSM.shape
    capacity = assignment.capacity
    # Slot number e * C + c; a dropped choice points past the end.
    address_GSK = assignment.expert_index_GSK * capacity + assignment.slot_GSK
    address_GSK = jnp.where(assignment.kept_GSK, address_GSK, num_experts * capacity)

    group_G11 = jnp.arange(groups)[:, None, None]
    token_GSK = jnp.broadcast_to(jnp.arange(tokens)[None, :, None], address_GSK.shape)
    empty = jnp.full((groups, num_experts * capacity), tokens, jnp.int32)
    token_of_slot = empty.at[group_G11, address_GSK].set(token_GSK, mode="drop")

    source = token_of_slot[..., None]
    x_slots = jnp.take_along_axis(x_GSM, source, axis=1, mode="fill", fill_value=0)
    x_EGCM = x_slots.reshape(groups, num_experts, capacity, model_dim).swapaxes(0, 1)
    y_EGCM = experts(x_EGCM, Slots())
    y_slots = y_EGCM.swapaxes(0, 1).reshape(groups, -1, model_dim)
    flat = address_GSK.reshape(groups, -1, 1)
    y_choices = jnp.take_along_axis(y_slots, flat, axis=1, mode="fill", fill_value=0)
    y_GSKM = y_choices.reshape(*address_GSK.shape, model_dim)
    return jnp.einsum("GSK,GSKM->GSM", assignment.gate_GSK, y_GSKM).astype(x_GSM.dtype)
