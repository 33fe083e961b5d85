"""What a block reports about its routing: sums over tokens, and metrics computed from them.

Legend: `moe_jax.moe`. Here E includes zero-computation experts, which come last.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.moe.balance import count_choices, entropy, max_violation, named_losses
from moe_jax.moe.choices import record_choices
from moe_jax.moe.routing import RouterInputs, Routing
from moe_jax.moe.run_experts.buffer import Buffer
from moe_jax.part import Aux, Call

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

BUFFER = ("buffer_overflow", "buffer_rows", "buffer_factor")


def measure(
    routing: Routing,
    kept_GSK: jax.Array,
    moe: "MoE",
    call: Call,
    inputs: RouterInputs,
    shape: tuple[int, ...],
    buffer: Buffer | None = None,
) -> Aux:
    """The `Aux` of one block call on tokens of shape [B, L, M].

    Returns:
      The `Aux` of `routing_aux`, with four more sums: `losses`, measurements of each balance loss,
      by name; `router_loss`, the router's loss summed over tokens; `router`, its `Routing.sums`;
      and `bias`, measurements of the bias update in training. With a bounded buffer, also the sum
      `buffer_overflow` and the maxima `buffer_rows` and `buffer_factor` (see `Buffer`).
    """
    valid_GS, batch_shape = inputs.valid_GS, (shape[0], shape[1])
    kept_GSK = jnp.broadcast_to(kept_GSK, routing.chosen_GSK.shape)
    aux = routing_aux(routing, kept_GSK, valid_GS, batch_shape)
    losses = named_losses(moe.losses)
    router_loss = jnp.zeros((), jnp.float32)
    if routing.loss_GS is not None:
        router_loss = jnp.sum(routing.loss_GS * valid_GS)
    bias: dict[str, jax.Array] = {}
    if moe.bias is not None and inputs.bias_E is not None and call.training:
        bias = moe.bias.measure(routing, inputs.bias_E, valid_GS)
    measured = {name: loss.measure(routing, valid_GS, batch_shape) for name, loss in losses}
    by_sequence = {
        name: loss.measure_sequences(routing, valid_GS, batch_shape) for name, loss in losses
    }
    own = {"losses": measured, "router_loss": router_loss, "router": routing.sums, "bias": bias}
    sums = {**aux.sums, **own}
    maxima = dict(aux.maxima)
    if buffer is not None:
        sums["buffer_overflow"] = buffer.overflow
        maxima |= {"buffer_rows": buffer.rows, "buffer_factor": buffer.factor}
    return aux._replace(
        sums=sums,
        maxima=maxima,
        sequences={**aux.sequences, "losses": by_sequence},
        choices=record_choices(routing, kept_GSK, valid_GS, batch_shape) if call.record else None,
        logits_BLE=routing.logits_GSE.reshape(*batch_shape, -1) if call.record else None,
    )


def routing_aux(
    routing: Routing, kept_GSK: jax.Array, valid_GS: jax.Array, batch_shape: tuple[int, int]
) -> Aux:
    """Sums over a routing and its kept choices, excluding padding; without gradient.

    Returns:
      `sums`: `assigned_KE`, int32, tokens whose choice k is expert e, before drops; `kept_KE`, the
      same after drops (Soft MoE has one choice: the expert with the largest combine weight);
      `prob_sum_E`, float32, the sum of router distributions; `num_tokens`, int32; `entropy`, nats.
      `maxima`: `max_logit`, the largest absolute logit. `sequences`: `assigned_BE`, int32, choices
      of expert e in each sequence, before drops.
    """
    num_experts = routing.probs_GSE.shape[-1]
    assigned_GSKE = count_choices(routing.expert_index_GSK, routing, valid_GS)
    choice_GSKE = jax.nn.one_hot(routing.expert_index_GSK, num_experts, dtype=jnp.int32)
    assigned_BLKE = assigned_GSKE.reshape(*batch_shape, -1, num_experts)
    probs_GSE = jax.lax.stop_gradient(routing.probs_GSE).astype(jnp.float32)
    logits = jax.lax.stop_gradient(routing.logits_GSE)
    sums = {
        "assigned_KE": jnp.sum(assigned_GSKE, axis=(0, 1)),
        "kept_KE": jnp.sum(choice_GSKE * kept_GSK[..., None], axis=(0, 1)),
        "prob_sum_E": jnp.sum(probs_GSE * valid_GS[..., None], axis=(0, 1)),
        "num_tokens": jnp.sum(valid_GS),
        "entropy": jnp.sum(entropy(probs_GSE) * valid_GS),
    }
    max_logit = jnp.max(jnp.abs(logits) * valid_GS[..., None]).astype(jnp.float32)
    sequences = {"assigned_BE": jnp.sum(assigned_BLKE, axis=(1, 2))}
    return Aux(sums, {"max_logit": max_logit}, sequences)


def routing_metrics(aux: Aux) -> dict[str, jax.Array]:
    """Metrics of layers from sums over a whole batch; all have a leading dim of layers.

    Returns:
      `expert_load` [X, E], each expert's share of the choices before drops, with its maximum,
      minimum and `max_violation`; `dropped_fraction` [X] of all choices, and by choice [X, K] (0 if
      there was none); `router_entropy`, nats, and `router_max_logit`. With a bounded buffer also
      `buffer_overflow`, `buffer_rows` and `buffer_factor`, [X] (see `Buffer`).
    """
    assigned_XKE, kept_XKE = aux.sums["assigned_KE"], aux.sums["kept_KE"]
    assigned_XE = jnp.sum(assigned_XKE, axis=1)
    total_X = jnp.maximum(jnp.sum(assigned_XE, axis=-1), 1)
    load_XE = assigned_XE / total_X[:, None]
    num_tokens_X = jnp.maximum(aux.sums["num_tokens"], 1).astype(jnp.float32)
    measured = {**aux.sums, **aux.maxima}
    return {
        "expert_load": load_XE,
        "expert_load_max": jnp.max(load_XE, axis=-1),
        "expert_load_min": jnp.min(load_XE, axis=-1),
        "max_violation": max_violation(assigned_XE),
        "dropped_fraction": dropped_fraction(assigned_XE, jnp.sum(kept_XKE, axis=1)),
        "dropped_fraction_by_choice": dropped_fraction(assigned_XKE, kept_XKE),
        "router_entropy": aux.sums["entropy"] / num_tokens_X,
        "router_max_logit": aux.maxima["max_logit"],
        **{name: measured[name] for name in BUFFER if name in measured},
    }


def dropped_fraction(assigned_KE: Any, kept_KE: Any) -> jax.Array:
    """Fraction of the choices k that were dropped: float32 [..., K] from [..., K, E].

    0 if there was no choice k.
    """
    assigned_K, kept_K = jnp.sum(assigned_KE, axis=-1), jnp.sum(kept_KE, axis=-1)
    return (assigned_K - kept_K) / jnp.maximum(assigned_K, 1)
