"""Runs experts: moves rows to them, computes, and combines outputs by token (see `moe_jax.moe`).

A `Plan` selects an implementation. All agree in value and in every gradient:

  einsum  contracts one-hot tensors of shape GSEC; the reference. In addition to the experts it
          costs 4 * G*S * S*K*factor * M FLOPs, which grow with the group.
  gather  indices into E x C slots; no GSEC tensor.
  ragged  rows sorted by expert; computes kept choices only, without padding.

On a mesh, rows move between devices by one of two exchanges:

  compiler  arrays are global, constraints set their sharding, and the compiler inserts the
            all-to-all. For einsum and gather.
  explicit  one program per device, with explicit collectives. For all three.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.routing import Mixing
from moe_jax.moe.run_experts.buffer import Combined
from moe_jax.moe.run_experts.fsdp_weights import AllGathered
from moe_jax.moe.run_experts.gather import RUN_BY_SLOTS
from moe_jax.moe.run_experts.parallel import run_parallel
from moe_jax.moe.run_experts.plan import Plan
from moe_jax.moe.run_experts.rows import run_sorted_rows
from moe_jax.moe.run_experts.slots import mix_slots
from moe_jax.parallel.rules import mesh_in_use, num_shards
from moe_jax.parameters import Axes


def run_experts(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    axes: Mapping[str, Axes],
    experts: Experts,
    plan: Plan,
    rng: jax.Array | None = None,
) -> Combined:
    """Moves every kept choice to its expert and back, and sums the outputs by token.

    All implementations have these arguments, and return [G, S, M] in the dtype of `x_GSM`: the sum
    over a token's kept choices, times their gates. Docstrings state the differences.

    Args:
      x_GSM: tokens, in the compute dtype.
      assignment: the kept choices, their slots and gates.
      weights: of the experts, by name, leading dim E; inside `jax.shard_map` only this device's.
      axes: for each weight by name, the names of its dims in `parallel.rules`.
      experts: computes each row separately, with the weights that the layout selects.
      plan: how experts run.
      rng: random key of the experts, passed in the layout, or None.

    Returns:
      That sum, and which choices it includes.
    """
    if plan.gate_on_input:
        return gated_input(x_GSM, assignment, weights, axes, experts, plan, rng)
    if plan.exchange == "explicit":
        return run_parallel(x_GSM, assignment, weights, axes, experts, plan, rng)
    if plan.exchange == "compiler":
        weights = gathered_for(assignment.capacity, weights, axes, x_GSM)
    if plan.rows == "ragged":
        y_GSM = run_sorted_rows(x_GSM, assignment, weights, experts, rng, kernel=plan.kernel)
    else:
        run_slots = RUN_BY_SLOTS[plan.rows]
        y_GSM = run_slots(x_GSM, assignment, weights, experts, rng, plan.by_constraint)
    return Combined(y_GSM, assignment.kept_GSK)


def mix_experts(
    x_GSM: jax.Array,
    mixing: Mixing,
    weights: Weights,
    axes: Mapping[str, Axes],
    experts: Experts,
    plan: Plan,
    rng: jax.Array | None = None,
) -> jax.Array:
    """`run_experts` where every slot mixes all tokens, weighted by `mixing`: [G, S, M]."""
    weights = gathered_for(mixing.dispatch_GSEC.shape[-1], weights, axes, x_GSM)
    return mix_slots(x_GSM, mixing, weights, experts, rng, plan.by_constraint)


def gathered_for(
    slots: int, weights: Weights, axes: Mapping[str, Axes], x_GSM: jax.Array
) -> Weights:
    """Marks weights to be all-gathered over fsdp, unless moving the slots is cheaper.

    A matrix has about as many bytes as model_dim slots with their hidden units. Training and
    prompts have more slots than that on the devices that share a matrix. Single generation steps
    have fewer; then a compiler may move slots to the shards of matrices instead.

    Args:
      slots: C, slots per expert and group.
      weights: as in `run_experts`.
      axes: as in `run_experts`.
      x_GSM: tokens.
    """
    mesh = mesh_in_use()
    if mesh is None or (num_parts := num_shards("model", mesh)) == 1:
        return weights
    groups, _, model_dim = x_GSM.shape
    if groups * num_parts // num_shards("expert_group", mesh) * slots < model_dim:
        return weights
    return {name: AllGathered(weight, axes[name]) for name, weight in weights.items()}


def gated_input(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    axes: Mapping[str, Axes],
    experts: Experts,
    plan: Plan,
    rng: jax.Array | None,
) -> Combined:
    """`run_experts` with gates on the experts' input: each choice becomes a separate token.

    Experts are not linear, so a gate on the input differs from a gate on the output. A group then
    has S * K tokens, each with one choice and gate 1. With einsum, contractions cost K times as
    much.

    Source: Llama 4, `Llama4TextMoe` of transformers: the expert gets the token times the sigmoid of
      the best logit, and the shared expert's output is added to its output.
    """
    groups, tokens, num_choices = assignment.gate_GSK.shape
    x_GSKM = (x_GSM[:, :, None] * assignment.gate_GSK[..., None]).astype(x_GSM.dtype)
    index_GA1, slot_GA1, kept_GA1 = (
        values_GSK.reshape(groups, tokens * num_choices, 1)
        for values_GSK in (assignment.expert_index_GSK, assignment.slot_GSK, assignment.kept_GSK)
    )
    one_by_one = assignment._replace(
        expert_index_GSK=index_GA1,
        gate_GSK=kept_GA1.astype(jnp.float32),
        slot_GSK=slot_GA1,
        kept_GSK=kept_GA1,
    )
    x_GAM = x_GSKM.reshape(groups, tokens * num_choices, -1)
    plan = dataclasses.replace(plan, gate_on_input=False)
    y_GAM, kept_GA1, buffer = run_experts(x_GAM, one_by_one, weights, axes, experts, plan, rng)
    y_GSM = jnp.sum(y_GAM.reshape(x_GSKM.shape), axis=2, dtype=jnp.float32).astype(x_GSM.dtype)
    return Combined(y_GSM, kept_GA1.reshape(assignment.kept_GSK.shape), buffer)


__all__ = ["gathered_for", "mix_experts", "run_experts"]
