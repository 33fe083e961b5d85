"""Experts on capacity slots [E, G, C, M], filled by one-hot tensors: the reference (GShard).

Soft MoE fills and reads its slots in the same way. Legend: `moe_jax.moe`.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.routing import Mixing
from moe_jax.moe.run_experts.exchange import BY_CONSTRAINT, Exchange


class Slots:
    """Rows `[E, G, C, I]`: the slots of expert e times its weights `[e, I, O]`."""

    def __init__(self, rng: jax.Array | None):
        self.rng = rng

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[E, G, C, I] x [E, I, O] -> [E, G, C, O]."""
        return jnp.einsum("EGCI,EIO->EGCO", x, weight)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[E, O] -> [E, 1, 1, O]."""
        return bias[:, None, None, :]


def run_slots(
    x_EGCM: jax.Array,
    gate_EGC1: jax.Array | None,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    exchange: Exchange,
) -> jax.Array:
    """Moves slots to their experts, computes them, and moves the outputs back, [E, G, C, M].

    Chunks split the slots of each expert. No chunk waits for another, so a compiler with
    asynchronous collectives can overlap them.

    Args:
      x_EGCM: slots.
      gate_EGC1: float32, factors of the outputs; None: 1.
      weights: see `run_experts`.
      experts: see `run_experts`.
      rng: see `run_experts`.
      exchange: moves slots between devices.
    """
    num_chunks = min(exchange.num_chunks, x_EGCM.shape[2])
    chunks = jnp.array_split(x_EGCM, num_chunks, axis=2)
    gates: list[jax.Array | None] = [None] * num_chunks
    if gate_EGC1 is not None:
        gates = [exchange.to_experts(gate) for gate in jnp.array_split(gate_EGC1, num_chunks, 2)]
    outputs = []
    for i, (chunk_EGCM, gate) in enumerate(zip(chunks, gates, strict=True)):
        key = rng if rng is None or i == 0 else jax.random.fold_in(rng, i)
        chunk_EGCM = exchange.to_experts(chunk_EGCM)
        outputs.append(exchange.to_tokens(experts(chunk_EGCM, weights, Slots(key), gate)))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def run_einsum(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None = None,
    exchange: Exchange = BY_CONSTRAINT,
) -> jax.Array:
    """Moves tokens by contraction with dispatch and combine tensors [G, S, E, C].

    Arguments and result are those of `run_experts`. Experts compute rows [E, G, C, M] in the
    `Slots` layout, and `exchange` moves these between the devices of tokens and of experts.

    Source: Lepikhin et al. 2020, GShard, arXiv:2006.16668, alg. 1. The dispatch tensor is made from
      indices, not from combine > 0, so a gate that underflows to 0 keeps its slot.
    """
    expert_index_GSK, num_experts = assignment.expert_index_GSK, assignment.num_experts
    expert_GSKE = jax.nn.one_hot(expert_index_GSK, num_experts, dtype=x_GSM.dtype)
    slot_GSK = jnp.where(assignment.kept_GSK, assignment.slot_GSK, assignment.capacity)
    slot_GSKC = jax.nn.one_hot(slot_GSK, assignment.capacity, dtype=x_GSM.dtype)
    gate_GSK = assignment.gate_GSK.astype(x_GSM.dtype)
    dispatch_GSEC = jnp.einsum("GSKE,GSKC->GSEC", expert_GSKE, slot_GSKC)
    combine_GSEC = jnp.einsum("GSK,GSKE,GSKC->GSEC", gate_GSK, expert_GSKE, slot_GSKC)
    mixing = Mixing(dispatch_GSEC, combine_GSEC)
    return mix_slots(x_GSM, mixing, weights, experts, rng, exchange)


def mix_slots(
    x_GSM: jax.Array,
    mixing: Mixing,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None = None,
    exchange: Exchange = BY_CONSTRAINT,
) -> jax.Array:
    """Fills slots with weighted tokens, and sums the weighted outputs of slots by token.

    Arguments and result are those of `run_einsum`, with `mixing` instead of an assignment: the
    weights of the tokens in each slot, and of the slots in each token's output.
    """
    dispatch_GSEC, combine_GSEC = (mix_GSEC.astype(x_GSM.dtype) for mix_GSEC in mixing)
    x_EGCM = jnp.einsum("GSEC,GSM->EGCM", dispatch_GSEC, x_GSM)
    y_EGCM = run_slots(x_EGCM, None, weights, experts, rng, exchange)
    return jnp.einsum("GSEC,EGCM->GSM", combine_GSEC, y_EGCM)
