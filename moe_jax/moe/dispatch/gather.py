"""Dispatch by indices into capacity slots (legend: `moe_jax.moe`).

Every backward pass is a gather as well: the gradient that JAX would derive for reading rows is a
scatter-add, which is slow on every platform.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.dispatch.rows import gate_gradient, sum_choices, take_or_zero
from moe_jax.moe.dispatch.slots import Slots
from moe_jax.moe.experts import Layout, Weights


def gather_dispatch(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Callable[[jax.Array, Weights, Layout], jax.Array],
    rng: jax.Array | None = None,
) -> jax.Array:
    """Fills E x G x C slots by reading tokens, and reads the outputs back by slot.

    Args:
      x_GSM: tokens.
      assignment: the kept choices, their slots and gates.
      weights: of the experts, by name, leading dim E.
      experts: computes rows [E, G, C, M] in the `Slots` layout.
      rng: key for the experts, or None; the layout carries it.

    Returns:
      [G, S, M] in the dtype of `x_GSM`: the gated sum over a token's kept choices.
    """
    groups, tokens, model_dim = x_GSM.shape
    num_choices, capacity = assignment.kept_GSK.shape[-1], assignment.capacity
    num_experts = next(iter(weights.values())).shape[0]
    num_slots = num_experts * groups * capacity
    num_rows = groups * tokens * num_choices

    group_G11 = jnp.arange(groups)[:, None, None]
    slot_GSK = assignment.expert_index_GSK * groups + group_G11
    slot_GSK = slot_GSK * capacity + assignment.slot_GSK
    kept_JK = assignment.kept_GSK.reshape(-1, num_choices)
    slot_JK = jnp.where(kept_JK, slot_GSK.reshape(-1, num_choices), num_slots)
    # The choice (token * K + k) in each slot; an empty slot has one that is out of range.
    choice_P = jnp.full(num_slots, num_rows, jnp.int32)
    choice_P = choice_P.at[slot_JK.reshape(-1)].set(
        jnp.arange(num_rows, dtype=jnp.int32), mode="drop"
    )

    x_PM = _fill(x_GSM.reshape(-1, model_dim), choice_P, slot_JK, kept_JK)
    x_EGCM = x_PM.reshape(num_experts, groups, capacity, model_dim)
    y_PM = experts(x_EGCM, weights, Slots(rng)).reshape(num_slots, -1)
    gate_JK = assignment.gate_GSK.reshape(-1, num_choices)
    y_JM = _combine(y_PM, gate_JK, choice_P, slot_JK, kept_JK)
    return y_JM.reshape(x_GSM.shape)


@jax.custom_vjp
def _fill(
    x_JM: jax.Array, choice_P: jax.Array, slot_JK: jax.Array, kept_JK: jax.Array
) -> jax.Array:
    """[J, M] -> [P, M]; empty slots are 0."""
    num_rows, num_choices = slot_JK.size, slot_JK.shape[1]
    return take_or_zero(x_JM, choice_P // num_choices, choice_P < num_rows)


def _fill_forward(
    x_JM: jax.Array, choice_P: jax.Array, slot_JK: jax.Array, kept_JK: jax.Array
) -> tuple[jax.Array, Any]:
    return _fill(x_JM, choice_P, slot_JK, kept_JK), (slot_JK, kept_JK)


def _fill_backward(residuals: Any, dx_PM: jax.Array) -> tuple[Any, ...]:
    slot_JK, kept_JK = residuals
    ones_JK = jnp.ones(slot_JK.shape, jnp.float32)
    dx_JM = sum_choices(dx_PM, slot_JK, ones_JK, kept_JK)
    return dx_JM.astype(dx_PM.dtype), None, None, None


_fill.defvjp(_fill_forward, _fill_backward)


@jax.custom_vjp
def _combine(
    y_PM: jax.Array, gate_JK: jax.Array, choice_P: jax.Array, slot_JK: jax.Array, kept_JK: jax.Array
) -> jax.Array:
    """[P, M] and gates -> [J, M]."""
    return sum_choices(y_PM, slot_JK, gate_JK, kept_JK).astype(y_PM.dtype)


def _combine_forward(
    y_PM: jax.Array, gate_JK: jax.Array, choice_P: jax.Array, slot_JK: jax.Array, kept_JK: jax.Array
) -> tuple[jax.Array, Any]:
    y_JM = _combine(y_PM, gate_JK, choice_P, slot_JK, kept_JK)
    return y_JM, (y_PM, gate_JK, choice_P, slot_JK, kept_JK)


def _combine_backward(residuals: Any, dy_JM: jax.Array) -> tuple[Any, ...]:
    y_PM, gate_JK, choice_P, slot_JK, kept_JK = residuals
    num_rows, num_choices = gate_JK.size, gate_JK.shape[1]
    filled_P = choice_P < num_rows
    gate_P1 = take_or_zero(gate_JK.reshape(-1, 1), choice_P, filled_P)
    dy_PM = take_or_zero(dy_JM, choice_P // num_choices, filled_P) * gate_P1
    dgate_JK = gate_gradient(y_PM, slot_JK, dy_JM, kept_JK).astype(gate_JK.dtype)
    return dy_PM.astype(y_PM.dtype), dgate_JK, None, None, None


_combine.defvjp(_combine_forward, _combine_backward)
