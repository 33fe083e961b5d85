"""The MoE block: router, dispatch, experts, combine (legend: `moe_jax.moe`)."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.moe import balance
from moe_jax.moe.capacity import Assignment, assign_slots
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.experts import Layout, Shared, ffn
from moe_jax.moe.routing import Routing, route, single_expert


class MoEAux(NamedTuple):
    """What a block says of one call; means are over its valid tokens, counts are exact.

    Attributes:
      load_balance_loss: float32 scalar, unweighted, in the config's convention and scope. Scope
        "global" is that of this call: `training` puts the calls of a step together.
      router_z_loss: float32 scalar, unweighted: the mean of logsumexp(logits)^2.
      assigned_KE: int32, tokens that have expert e as their choice k, before drops.
      kept_KE: int32, the same after drops.
      mean_prob_E: float32, mean of the full router distribution.
      num_tokens: int32 scalar, valid tokens.
      router_entropy: float32 scalar, nats, mean entropy of the router distribution.
      max_logit: float32 scalar, the largest absolute logit.
      max_violation: float32 scalar, MaxVio of the choices before drops.
      dropped_fraction_K: float32, share of the choices k that found their expert full.
    """

    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    assigned_KE: jax.Array
    kept_KE: jax.Array
    mean_prob_E: jax.Array
    num_tokens: jax.Array
    router_entropy: jax.Array
    max_logit: jax.Array
    max_violation: jax.Array
    dropped_fraction_K: jax.Array


def moe_block(
    params: Mapping[str, jax.Array],
    x_BLM: jax.Array,
    config: MoEConfig,
    *,
    capacity_factor: float | None = None,
    valid_BL: jax.Array | None = None,
    bias_E: jax.Array | None = None,
    rng: jax.Array | None = None,
) -> tuple[jax.Array, MoEAux]:
    """Sends every token through its experts.

    Args:
      params: arrays by name, as `parameters.moe_specs` declares them.
      x_BLM: tokens, in the compute dtype.
      config: the block's settings.
      capacity_factor: slots over the mean load, 0 for dropless; None: `capacity.train_factor`.
      valid_BL: bool, False for padding: not routed, not counted, output 0; None: all valid.
      bias_E: float32 selection bias of loss-free balancing, or None.
      rng: key for jitter, noise, dropout and random queues; None: deterministic.

    Returns:
      y_BLM in the dtype of `x_BLM`, to be added to the residual (a token all of whose choices were
      dropped gets 0 from the routed experts), and the `MoEAux`.

    Raises:
      ValueError: the group size does not fit the tokens.
    """
    batch, length, model_dim = x_BLM.shape
    if capacity_factor is None:
        capacity_factor = config.capacity.train_factor
    if valid_BL is None:
        valid_BL = jnp.ones((batch, length), jnp.bool_)
    group_size = tokens_per_group(batch, length, config.group_size)
    x_GSM = x_BLM.reshape(-1, group_size, model_dim)
    valid_GS = valid_BL.reshape(-1, group_size)
    keys = [None] * 3 if rng is None else list(jax.random.split(rng, 3))

    with jax.named_scope("router"):
        if config.num_experts == 1:
            routing = single_expert(x_GSM, config.router)
        else:
            routing = route(
                x_GSM,
                params["router"],
                config.num_selected_experts,
                config.router,
                bias_E=bias_E,
                rng=keys[0],
            )
        assignment = assign_slots(
            routing, capacity_factor, config.capacity, valid_GS=valid_GS, rng=keys[1]
        )

    def experts(rows: jax.Array, layout: Layout) -> jax.Array:
        with jax.named_scope("experts"):
            return ffn(
                rows,
                params,
                config.activation,
                layout,
                dropout_rate=config.expert_dropout_rate,
                rng=keys[2],
            )

    dispatch = DISPATCHERS[dispatcher_name(config.dispatch)]
    with jax.named_scope("dispatch"):
        y_GSM = dispatch(x_GSM, assignment, config.num_experts, experts)
    if config.num_shared_experts > 0:
        with jax.named_scope("shared_experts"):
            y_GSM += shared_experts(x_GSM, params, config) * valid_GS[..., None]
    aux = describe(routing, assignment, valid_GS, length, config)
    return y_GSM.reshape(batch, length, model_dim), aux


def tokens_per_group(batch: int, length: int, group_size: int) -> int:
    """S of a call: `group_size`, or one sequence if that is 0.

    Raises:
      ValueError: S neither divides a sequence nor is made of whole sequences of the batch.
    """
    group_size = group_size or length
    fits = batch * length % group_size == 0
    if not fits or (length % group_size and group_size % length):
        raise ValueError(
            "moe.group_size divides the sequence, or is a number of whole sequences that divides "
            f"the batch: group_size={group_size}, batch of {batch} sequences of {length} tokens. "
            "Set moe.group_size=0 for one sequence, or to a divisor."
        )
    return group_size


def dispatcher_name(name: str) -> str:
    """Resolves "auto" to the fastest dispatcher of the platform (docs/parallelism.md)."""
    if name != "auto":
        return name
    return "ragged" if jax.default_backend() == "cpu" else "gather"


def shared_experts(
    x_GSM: jax.Array, params: Mapping[str, jax.Array], config: MoEConfig
) -> jax.Array:
    """What every token gets, whatever its routing: one FFN as wide as all shared experts."""
    weights = {
        name.removeprefix("shared_"): value
        for name, value in params.items()
        if name.startswith("shared_")
    }
    y_GSM = ffn(x_GSM, weights, config.activation, Shared())
    if config.shared_expert_gate:
        y_GSM *= jax.nn.sigmoid(x_GSM @ weights["gate"].astype(x_GSM.dtype))
    return y_GSM


def describe(
    routing: Routing, assignment: Assignment, valid_GS: jax.Array, length: int, config: MoEConfig
) -> MoEAux:
    """Losses and statistics of a routing, padding left out (see `MoEAux`)."""
    num_experts = config.num_experts
    valid_GS1 = valid_GS[..., None].astype(jnp.float32)
    num_tokens = jnp.sum(valid_GS)
    safe_tokens = jnp.maximum(num_tokens, 1).astype(jnp.float32)
    choice_GSKE = jax.nn.one_hot(assignment.expert_index_GSK, num_experts, dtype=jnp.int32)
    assigned_GSKE = choice_GSKE * valid_GS[..., None, None]
    assigned_KE = jnp.sum(assigned_GSKE, axis=(0, 1))
    kept_KE = jnp.sum(choice_GSKE * assignment.kept_GSK[..., None], axis=(0, 1))
    assigned_K, kept_K = jnp.sum(assigned_KE, axis=-1), jnp.sum(kept_KE, axis=-1)

    probs_GSE = routing.probs_GSE.astype(jnp.float32)
    scope = config.balance.load_balance_scope
    unit = {"group": valid_GS.shape[1], "sequence": length}.get(scope, valid_GS.size)
    load_balance_loss = balance.load_balance_loss(
        jnp.sum(assigned_GSKE.reshape(-1, unit, *choice_GSKE.shape[2:]), axis=1),
        jnp.sum((probs_GSE * valid_GS1).reshape(-1, unit, num_experts), axis=1),
        jnp.sum(valid_GS.reshape(-1, unit), axis=1),
        config.balance.load_balance_convention,
    )
    entropy_GS = -jnp.sum(jax.scipy.special.xlogy(probs_GSE, probs_GSE), axis=-1)
    return MoEAux(
        load_balance_loss=load_balance_loss,
        router_z_loss=balance.router_z_loss(routing.logits_GSE, valid_GS),
        assigned_KE=assigned_KE,
        kept_KE=kept_KE,
        mean_prob_E=jnp.sum(probs_GSE * valid_GS1, axis=(0, 1)) / safe_tokens,
        num_tokens=num_tokens,
        router_entropy=jax.lax.stop_gradient(jnp.sum(entropy_GS * valid_GS) / safe_tokens),
        max_logit=jax.lax.stop_gradient(
            jnp.max(jnp.abs(routing.logits_GSE) * valid_GS1).astype(jnp.float32)
        ),
        max_violation=balance.max_violation(jnp.sum(assigned_KE, axis=0)),
        dropped_fraction_K=1 - kept_K / jnp.maximum(assigned_K, 1),
    )
