"""Slots filled and read by indices, and rows summed by token (legend: `moe_jax.moe`).

Every backward pass is also a gather. The gradient that JAX derives for reading rows is a
scatter-add, which is slow on every platform.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.run_experts.exchange import BY_CONSTRAINT, Exchange
from moe_jax.moe.run_experts.slots import run_slots
from moe_jax.moe.run_experts.sorting import Order


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
    x_GPM = jax.vmap(fill)(x_GSM, choice_GP, slot_GSK, assignment.kept_GSK)
    x_EGCM = x_GPM.reshape(groups, num_experts, capacity, model_dim).swapaxes(0, 1)
    y_EGCM = run_slots(x_EGCM, weights, experts, rng, exchange)
    y_GPM = y_EGCM.swapaxes(0, 1).reshape(groups, num_slots, model_dim)
    gates = (assignment.gate_GSK, choice_GP, slot_GSK, assignment.kept_GSK)
    return jax.vmap(combine)(y_GPM, *gates)


def choice_in_slot(slot_SK: jax.Array, num_slots: int) -> jax.Array:
    """The choice (token * K + k) in each slot of a group, int32 [P]; S * K in an empty slot."""
    choices = jnp.arange(slot_SK.size, dtype=jnp.int32)
    empty_P = jnp.full(num_slots, slot_SK.size, jnp.int32)
    return empty_P.at[slot_SK.reshape(-1)].set(choices, mode="drop")


@jax.custom_vjp
def fill(x_SM: jax.Array, choice_P: jax.Array, slot_SK: jax.Array, kept_SK: jax.Array) -> jax.Array:
    """[S, M] -> [P, M]; empty slots are 0."""
    # Empty slots read a row of zeros appended to the tokens.
    x_SM = jnp.concatenate([x_SM, jnp.zeros_like(x_SM, shape=(1, x_SM.shape[1]))])
    return x_SM.at[choice_P // slot_SK.shape[1]].get(mode="clip")


def _fill_forward(
    x_SM: jax.Array, choice_P: jax.Array, slot_SK: jax.Array, kept_SK: jax.Array
) -> tuple[jax.Array, Any]:
    return fill(x_SM, choice_P, slot_SK, kept_SK), (slot_SK, kept_SK)


def _fill_backward(residuals: Any, dx_PM: jax.Array) -> tuple[Any, ...]:
    slot_SK, kept_SK = residuals
    ones_SK = jnp.ones(slot_SK.shape, jnp.float32)
    dx_SM = sum_choices(dx_PM, slot_SK, ones_SK, kept_SK)
    return dx_SM.astype(dx_PM.dtype), None, None, None


fill.defvjp(_fill_forward, _fill_backward)


@jax.custom_vjp
def rows_of(x_JM: jax.Array, order: Order, kept_JK: jax.Array) -> jax.Array:
    """[J, M] -> [R, M]; every row is a choice. The gradient of a token is summed in float32."""
    return x_JM[order.choice_R // order.row_JK.shape[1]]


def _rows_of_forward(x_JM: jax.Array, order: Order, kept_JK: jax.Array) -> tuple[jax.Array, Any]:
    return rows_of(x_JM, order, kept_JK), (order.row_JK, kept_JK)


def _rows_of_backward(residuals: Any, dx_RM: jax.Array) -> tuple[Any, ...]:
    dx_JM, *_ = _fill_backward(residuals, dx_RM)
    return dx_JM, None, None


rows_of.defvjp(_rows_of_forward, _rows_of_backward)


@jax.custom_vjp
def combine(
    y_PM: jax.Array, gate_SK: jax.Array, choice_P: jax.Array, slot_SK: jax.Array, kept_SK: jax.Array
) -> jax.Array:
    """[P, M] and gates -> [S, M]."""
    return sum_choices(y_PM, slot_SK, gate_SK, kept_SK).astype(y_PM.dtype)


def _combine_forward(
    y_PM: jax.Array, gate_SK: jax.Array, choice_P: jax.Array, slot_SK: jax.Array, kept_SK: jax.Array
) -> tuple[jax.Array, Any]:
    y_SM = combine(y_PM, gate_SK, choice_P, slot_SK, kept_SK)
    return y_SM, (y_PM, gate_SK, choice_P, slot_SK, kept_SK)


def _combine_backward(residuals: Any, dy_SM: jax.Array) -> tuple[Any, ...]:
    y_PM, gate_SK, choice_P, slot_SK, kept_SK = residuals
    num_rows, num_choices = gate_SK.size, gate_SK.shape[1]
    filled_P = choice_P < num_rows
    gate_P1 = take_or_zero(gate_SK.reshape(-1, 1), choice_P, filled_P)
    dy_PM = take_or_zero(dy_SM, choice_P // num_choices, filled_P) * gate_P1
    dgate_SK = gate_gradient(y_PM, slot_SK, dy_SM, kept_SK).astype(gate_SK.dtype)
    return dy_PM.astype(y_PM.dtype), dgate_SK, None, None, None


combine.defvjp(_combine_forward, _combine_backward)


def take_or_zero(x: jax.Array, index: jax.Array, valid: jax.Array) -> jax.Array:
    """`x[index]` along the first dim where valid, else 0; an invalid index may be out of range."""
    return jnp.where(valid[..., None], x.at[index].get(mode="clip"), 0)


def sum_choices(
    y_RM: jax.Array, row_JK: jax.Array, weight_JK: jax.Array, kept_JK: jax.Array
) -> jax.Array:
    """sum_k weight[j, k] * y[row[j, k]] over kept choices.

    Args:
      y_RM: rows in any float dtype; only those of kept choices are read.
      row_JK: int32, the row of each choice.
      weight_JK: float32.
      kept_JK: bool.

    Returns:
      float32 [J, M], summed choice by choice, so that no [J, K, M] array is made.
    """
    y_JM = jnp.zeros((row_JK.shape[0], y_RM.shape[1]), jnp.float32)
    for k in range(row_JK.shape[1]):
        y_k_JM = take_or_zero(y_RM, row_JK[:, k], kept_JK[:, k]).astype(jnp.float32)
        y_JM = y_JM + y_k_JM * weight_JK[:, k, None]
    return y_JM


def gate_gradient(
    y_RM: jax.Array, row_JK: jax.Array, dy_JM: jax.Array, kept_JK: jax.Array
) -> jax.Array:
    """The gradient of `sum_choices` with respect to its weights: float32 [J, K]."""
    dy_JM = dy_JM.astype(jnp.float32)
    columns = [
        jnp.sum(take_or_zero(y_RM, row_JK[:, k], kept_JK[:, k]).astype(jnp.float32) * dy_JM, -1)
        for k in range(row_JK.shape[1])
    ]
    return jnp.stack(columns, axis=1)
