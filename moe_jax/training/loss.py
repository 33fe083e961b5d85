"""The loss of a batch, and of a part of it (legend: `moe_jax.moe`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import ModelConfig
from moe_jax.models import Decoder
from moe_jax.moe import balance
from moe_jax.moe.routing.replay import Choices
from moe_jax.moe.statistics import MoEAux

Batch = Mapping[str, jax.Array]


class Totals(NamedTuple):
    """What the losses of a whole batch are divided by; known before the model runs.

    Attributes:
      loss_weight: float32 scalar, sum of the loss weights of its targets.
      tokens: float32 scalar, its valid tokens.
      load_XE: float32, f_e of the whole batch for scope "global", or None to take this part's.
    """

    loss_weight: jax.Array
    tokens: jax.Array
    load_XE: jax.Array | None = None


class LossParts(NamedTuple):
    """The loss of a part of a batch: its additive share in the loss of the batch.

    Attributes:
      cross_entropy: float32 scalar, nats a target.
      aux: what the MoE layers said of this part, or None.
    """

    cross_entropy: jax.Array
    aux: MoEAux | None


def batch_totals(batch: Batch) -> Totals:
    """The denominators of a batch of any shape."""
    weight = jnp.sum(batch["loss_weights"].astype(jnp.float32))
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    return Totals(jnp.maximum(weight, 1e-9), jnp.maximum(tokens, 1))


def replayed_choices(batch: Batch) -> Choices | None:
    """The choices that a batch tells the routers to take, if it does.

    Its `expert_index` (int32) and, where not all choices count, `chosen` (bool) are [B, L, X, K],
    as `models.routing_record` has them.
    """
    if "expert_index" not in batch:
        return None
    chosen = jnp.moveaxis(batch["chosen"], 2, 0) if "chosen" in batch else None
    return Choices(jnp.moveaxis(batch["expert_index"], 2, 0), chosen)


def target_nats(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Cross-entropy of every target, float32 [B, L], nats."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV.astype(jnp.float32), targets_BL
    )


def partial_loss(
    params: Any,
    part: Batch,
    totals: Totals,
    config: ModelConfig,
    *,
    router_bias_XE: jax.Array | None,
    rng: jax.Array,
    step: jax.Array | None = None,
) -> tuple[jax.Array, LossParts]:
    """The share of some sequences in the training loss of their batch.

    Shares add up to the loss of the batch, and so do their gradients, however it is cut: every
    term is a sum over tokens, divided by a total of the whole batch.

    Args:
      params: parameters of the model.
      part: `inputs`, `targets`, `segment_ids`, `positions` int32 and `loss_weights` float32 [B, L],
        and perhaps what `replayed_choices` reads.
      totals: of the whole batch.
      config: the model.
      router_bias_XE: selection biases, or None.
      rng: key of dropout, jitter and noise.
      step: int32 scalar, for settings of the router that are annealed; None: at their ends.

    Returns:
      The share of the total loss (differentiate this), and its parts.
    """
    dropout_key, router_key = jax.random.split(rng)
    output = Decoder(config).apply(
        {"params": params},
        part["inputs"],
        part["positions"],
        part["segment_ids"],
        router_bias_XE=router_bias_XE,
        train=True,
        capacity_factor=config.moe.capacity.train_factor,
        replay=replayed_choices(part),
        step=step,
        rngs={"dropout": dropout_key, "router": router_key},
    )
    nats_BL = target_nats(output.logits_BLV, part["targets"])
    cross_entropy = jnp.sum(nats_BL * part["loss_weights"]) / totals.loss_weight
    loss = cross_entropy
    if output.aux is not None:
        settings = config.moe.balance
        share = jnp.sum(part["segment_ids"] > 0) / totals.tokens
        loss += settings.load_balance_weight * share * load_balance(output.aux, config, totals)
        loss += settings.router_z_loss_weight * share * jnp.mean(output.aux.router_z_loss)
        loss += settings.importance_loss_weight * share * jnp.mean(output.aux.importance_loss)
        loss += settings.load_loss_weight * share * jnp.mean(output.aux.load_loss)
        loss += settings.token_entropy_weight * share * jnp.mean(output.aux.router_entropy)
        if settings.batch_entropy_weight > 0:
            lacking_X = balance.batch_entropy_loss(
                output.aux.mean_prob_E, settings.batch_entropy_target
            )
            loss += settings.batch_entropy_weight * share * jnp.mean(lacking_X)
        predictor_weight = config.moe.router.predictor_loss_weight
        loss += predictor_weight * share * jnp.mean(output.aux.predictor_loss)
    return loss, LossParts(cross_entropy, output.aux)


def load_balance(aux: MoEAux, config: ModelConfig, totals: Totals) -> jax.Array:
    """The load-balance loss of some sequences, averaged over layers.

    Scope "global" uses the load of the whole batch, `totals.load_XE`. Convention "huggingface"
    averages loads and probabilities over layers before it multiplies them.
    """
    settings = config.moe.balance
    pooled = settings.load_balance_convention == "huggingface"
    if settings.load_balance_scope != "global" and not pooled:
        return jnp.mean(aux.load_balance_loss)
    load_XE = totals.load_XE
    if load_XE is None:
        tokens_X = aux.num_tokens
        load_XE = balance.load_share(aux.balanced_KE, tokens_X, settings.load_balance_convention)
    prob_XE = aux.mean_prob_E
    if pooled:
        load_XE, prob_XE = jnp.mean(load_XE, axis=0), jnp.mean(prob_XE, axis=0)
    return jnp.mean(config.moe.num_options * jnp.sum(load_XE * prob_XE, axis=-1))
