"""Slots filled and read by indices, and rows summed by token (legend: `moe_jax.moe`).

Every backward pass is also a gather. The gradient that JAX derives for reading rows is a
scatter-add, which is slow on every platform.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.run_experts.exchange import BY_CONSTRAINT, Exchange
from moe_jax.moe.run_experts.slots import run_einsum, run_slots


class Places(NamedTuple):
    """Which choice is in which slot, or row.

    Attributes:
      choice_P: int32, the choice (token * K + k) in each slot; S * K in an empty slot.
      slot_SK: int32, the slot of each choice; of any value if it has none.
      kept_SK: bool, whether a choice has a slot.
    """

    choice_P: jax.Array
    slot_SK: jax.Array
    kept_SK: jax.Array


def run_gather(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None = None,
    exchange: Exchange = BY_CONSTRAINT,
) -> jax.Array:
    """Fills the slots of every group by reading its tokens, and reads the outputs back by slot.

    Arguments and result are those of `run_experts`. Experts compute rows [E, G, C, M] in the
    `Slots` layout, and `exchange` moves these between the devices of tokens and of experts.
    """
    groups, _, model_dim = x_GSM.shape
    num_experts, capacity = assignment.num_experts, assignment.capacity
    num_slots = num_experts * capacity

    slot_GSK = assignment.expert_index_GSK * capacity + assignment.slot_GSK
    slot_GSK = jnp.where(assignment.kept_GSK, slot_GSK, num_slots)
    choice_GP = jax.vmap(functools.partial(choice_in_slot, num_slots=num_slots))(slot_GSK)

    # Group by group, so that on a mesh each device reads its own tokens.
    places = Places(choice_GP, slot_GSK, assignment.kept_GSK)
    x_GPM = jax.vmap(fill)(x_GSM, places)
    gate_GP1 = jax.vmap(fill_gates)(assignment.gate_GSK, places)
    x_EGCM, gate_EGC1 = (
        rows.reshape(groups, num_experts, capacity, -1).swapaxes(0, 1) for rows in (x_GPM, gate_GP1)
    )
    y_EGCM = run_slots(x_EGCM, gate_EGC1, weights, experts, rng, exchange)
    y_GPM = y_EGCM.swapaxes(0, 1).reshape(groups, num_slots, model_dim)
    return jax.vmap(combine)(y_GPM, places)


RUN_BY_SLOTS = {"einsum": run_einsum, "gather": run_gather}


def choice_in_slot(slot_SK: jax.Array, num_slots: int) -> jax.Array:
    """The choice (token * K + k) in each slot of a group, int32 [P]; S * K in an empty slot."""
    choices = jnp.arange(slot_SK.size, dtype=jnp.int32)
    empty_P = jnp.full(num_slots, slot_SK.size, jnp.int32)
    return empty_P.at[slot_SK.reshape(-1)].set(choices, mode="drop")


@jax.custom_vjp
def fill(x_SM: jax.Array, places: Places) -> jax.Array:
    """[S, M] -> [P, M]: each slot reads its token; empty slots are 0."""
    # Empty slots read a row of zeros appended to the tokens.
    x_SM = jnp.concatenate([x_SM, jnp.zeros_like(x_SM, shape=(1, x_SM.shape[1]))])
    return x_SM.at[places.choice_P // places.slot_SK.shape[1]].get(mode="clip")


@jax.custom_vjp
def combine(y_PM: jax.Array, places: Places) -> jax.Array:
    """[P, M] -> [S, M]: sums the slots of each token, in float32. The transpose of `fill`."""
    return sum_choices(y_PM, places.slot_SK, places.kept_SK).astype(y_PM.dtype)


fill.defvjp(
    lambda x_SM, places: (fill(x_SM, places), places),
    lambda places, dx_PM: (combine(dx_PM, places), None),
)
combine.defvjp(
    lambda y_PM, places: (combine(y_PM, places), places),
    lambda places, dy_SM: (fill(dy_SM, places), None),
)


def fill_gates(gate_SK: jax.Array, places: Places) -> jax.Array:
    """[S, K] -> [P, 1]: the gate of the choice in each slot; 0 in empty slots."""
    by_choice = Places(places.choice_P, *(one.reshape(-1, 1) for one in places[1:]))
    gate_P1: jax.Array = fill(gate_SK.reshape(-1, 1), by_choice)
    return gate_P1


def take_or_zero(x: jax.Array, index: jax.Array, valid: jax.Array) -> jax.Array:
    """`x[index]` along the first dim where valid, else 0; an invalid index may be out of range."""
    return jnp.where(valid[..., None], x.at[index].get(mode="clip"), 0)


def sum_choices(y_RM: jax.Array, row_JK: jax.Array, kept_JK: jax.Array) -> jax.Array:
    """sum_k y[row[j, k]] over kept choices.

    Args:
      y_RM: rows in any float dtype; only those of kept choices are read.
      row_JK: int32, the row of each choice.
      kept_JK: bool.

    Returns:
      float32 [J, M], summed choice by choice, so that no [J, K, M] array is made.
    """
    y_JM = jnp.zeros((row_JK.shape[0], y_RM.shape[1]), jnp.float32)
    for k in range(row_JK.shape[1]):
        y_JM += take_or_zero(y_RM, row_JK[:, k], kept_JK[:, k]).astype(jnp.float32)
    return y_JM
