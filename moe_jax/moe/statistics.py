"""What a block says of its routing: losses, counts, means (legend: `moe_jax.moe`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.moe import balance
from moe_jax.moe.routing import Routing
from moe_jax.moe.routing.replay import Choices


class MoEAux(NamedTuple):
    """What a block says of one call; means are over its valid tokens, counts are exact.

    E counts experts that compute nothing too: behind the others, in all statistics and losses.

    Attributes:
      load_balance_loss: float32 scalar, unweighted, in the config's convention and scope. Scope
        "global" is that of this call: `training` puts the calls of a step together.
      router_z_loss: float32 scalar, unweighted: the mean of logsumexp(logits)^2.
      importance_loss: float32 scalar, unweighted, over the tokens of this call; 0 (not computed)
        where its weight is 0.
      load_loss: the same for the smooth loads; 0 without noise too.
      predictor_loss: float32 scalar, unweighted, nats: the mean cross-entropy of expert choice's
        predictor; 0 without one, and in evaluation.
      assigned_KE: int32, tokens that have expert e as their choice k, before drops; choices that do
        not count (`Routing.chosen_GSK`) are left out. Soft MoE has one choice: the expert of the
        most combine weight.
      kept_KE: int32, the same after drops.
      balanced_KE: int32, what the load-balance loss counts, see `balanced_choices`.
      assigned_BE: int32, choices of expert e in each sequence, before drops: what statistics by
        domain are made of; None where it was not kept.
      mean_prob_E: float32, mean of the full router distribution; of Soft MoE, the mean combine
        weight, which has no gradient.
      num_tokens: int32 scalar, valid tokens.
      router_entropy: float32 scalar, nats, mean entropy of the router distribution; with a gradient
        where its weight is not 0.
      max_logit: float32 scalar, the largest absolute logit.
      max_violation: float32 scalar, MaxVio of the choices before drops.
      dropped_fraction_K: float32, share of the choices k that found their expert full.
      needed_bias_EQ: int32, see `bias.count_needed_biases`; None but in training with quantile
        balancing.
      choices: of every token, if the block was asked to record them; None otherwise.
    """

    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    importance_loss: jax.Array
    load_loss: jax.Array
    predictor_loss: jax.Array
    assigned_KE: jax.Array
    kept_KE: jax.Array
    balanced_KE: jax.Array
    assigned_BE: jax.Array | None
    mean_prob_E: jax.Array
    num_tokens: jax.Array
    router_entropy: jax.Array
    max_logit: jax.Array
    max_violation: jax.Array
    dropped_fraction_K: jax.Array
    needed_bias_EQ: jax.Array | None = None
    choices: Choices | None = None


def describe(
    routing: Routing,
    kept_GSK: jax.Array,
    valid_GS: jax.Array,
    batch_shape: tuple[int, int],
    config: MoEConfig,
) -> MoEAux:
    """Losses and statistics of a routing and of the choices it kept, padding left out."""
    num_experts, (batch, length) = config.num_options, batch_shape
    valid_BL = valid_GS.reshape(batch, length)
    valid_BL1 = valid_BL[..., None].astype(jnp.float32)
    num_tokens = jnp.sum(valid_BL)
    safe_tokens = jnp.maximum(num_tokens, 1).astype(jnp.float32)

    choice_GSKE = jax.nn.one_hot(routing.expert_index_GSK, num_experts, dtype=jnp.int32)
    kept_KE = jnp.sum(choice_GSKE * kept_GSK[..., None], axis=(0, 1))
    assigned_GSKE = choices_that_count(routing.expert_index_GSK, routing, valid_GS)
    assigned_BKE = jnp.sum(assigned_GSKE.reshape(batch, length, -1, num_experts), axis=1)
    assigned_KE = jnp.sum(assigned_BKE, axis=0)
    balanced_GSKE = choices_that_count(balanced_choices(routing, config), routing, valid_GS)
    balanced_BKE = jnp.sum(balanced_GSKE.reshape(batch, length, -1, num_experts), axis=1)
    balanced_KE = jnp.sum(balanced_BKE, axis=0)

    probs_BLE = routing.probs_GSE.astype(jnp.float32).reshape(batch, length, num_experts)
    entropy = jnp.sum(balance.entropy(probs_BLE) * valid_BL) / safe_tokens
    learned = config.balance.token_entropy_weight > 0
    prob_sum_BE = jnp.sum(probs_BLE * valid_BL1, axis=1)
    scope = config.balance.load_balance_scope
    if scope == "sequence":
        units = (balanced_BKE, prob_sum_BE, jnp.sum(valid_BL, axis=1))
    elif scope == "group":
        prob_sum_GE = jnp.sum((probs_BLE * valid_BL1).reshape(*valid_GS.shape, -1), axis=1)
        units = (jnp.sum(balanced_GSKE, axis=1), prob_sum_GE, jnp.sum(valid_GS, axis=1))
    else:
        units = (balanced_KE[None], jnp.sum(prob_sum_BE, axis=0)[None], num_tokens[None])

    zero, nats_GS = jnp.zeros((), jnp.float32), routing.predictor_nats_GS
    weights = (config.balance.importance_loss_weight, config.balance.load_loss_weight)
    return MoEAux(
        load_balance_loss=balance.load_balance_loss(*units, config.balance.load_balance_convention),
        router_z_loss=balance.router_z_loss(routing.logits_GSE, valid_GS),
        importance_loss=balance.importance_loss(routing, valid_GS) if weights[0] else zero,
        load_loss=balance.load_loss(routing, valid_GS) if weights[1] else zero,
        predictor_loss=zero if nats_GS is None else jnp.sum(nats_GS * valid_GS) / safe_tokens,
        assigned_KE=assigned_KE,
        kept_KE=kept_KE,
        balanced_KE=balanced_KE,
        assigned_BE=jnp.sum(assigned_BKE, axis=1),
        mean_prob_E=jnp.sum(prob_sum_BE, axis=0) / safe_tokens,
        num_tokens=num_tokens,
        router_entropy=entropy if learned else jax.lax.stop_gradient(entropy),
        max_logit=jax.lax.stop_gradient(
            jnp.max(jnp.abs(routing.logits_GSE) * valid_GS[..., None]).astype(jnp.float32)
        ),
        max_violation=balance.max_violation(jnp.sum(assigned_KE, axis=0)),
        dropped_fraction_K=dropped_fraction(assigned_KE, kept_KE),
    )


def choices_that_count(index_GSK: jax.Array, routing: Routing, valid_GS: jax.Array) -> jax.Array:
    """One-hot choices, int32 [G, S, K, E], 0 for padding and where a choice does not count."""
    choice_GSKE = jax.nn.one_hot(index_GSK, routing.probs_GSE.shape[-1], dtype=jnp.int32)
    choice_GSKE *= valid_GS[..., None, None]
    if routing.chosen_GSK is not None:
        choice_GSKE *= routing.chosen_GSK[..., None]
    return choice_GSKE


def balanced_choices(routing: Routing, config: MoEConfig) -> jax.Array:
    """The choices that the load-balance loss counts, int32 [G, S, K].

    They are those that were made, but in convention "megatron": there, beside a selection bias or a
    limit to groups of experts, the K best by the scores alone, so that the loss goes by what its
    gradient can change. Where not all K of a token count, as many of these do.
    """
    by_scores = config.balance.load_balance_convention == "megatron"
    if by_scores and routing.unbiased_GSK is not None:
        return routing.unbiased_GSK
    return routing.expert_index_GSK


def dropped_fraction(assigned_KE: jax.Array, kept_KE: jax.Array) -> jax.Array:
    """Share of the choices k that found their expert full: float32 [..., K] from [..., K, E].

    0 where there was no choice, as in a part of a batch that is all padding.
    """
    assigned_K, kept_K = jnp.sum(assigned_KE, axis=-1), jnp.sum(kept_KE, axis=-1)
    return (assigned_K - kept_K) / jnp.maximum(assigned_K, 1)


def merge_aux(parts: MoEAux, config: MoEConfig) -> MoEAux:
    """Puts what a block said of the parts of a batch together, as if it had seen the whole.

    Args:
      parts: every field with a leading dim of parts (and any more after it, layers say).
      config: the block's settings.

    Returns:
      The `MoEAux` of the whole, without `assigned_BE` and `choices`. Counts add up; means are
      weighted by tokens. The load-balance loss is a mean over the parts too, but in scope "global",
      where it is of the whole.
    """
    total = jnp.sum(parts.num_tokens, axis=0)
    weight = parts.num_tokens / jnp.maximum(total, 1)

    def mean(values: jax.Array) -> jax.Array:
        trailing = (1,) * (values.ndim - weight.ndim)
        return jnp.sum(values * weight.reshape(weight.shape + trailing), axis=0)

    assigned_KE, kept_KE = jnp.sum(parts.assigned_KE, axis=0), jnp.sum(parts.kept_KE, axis=0)
    balanced_KE = jnp.sum(parts.balanced_KE, axis=0)
    whole = MoEAux(
        load_balance_loss=mean(parts.load_balance_loss),
        router_z_loss=mean(parts.router_z_loss),
        importance_loss=mean(parts.importance_loss),
        load_loss=mean(parts.load_loss),
        predictor_loss=mean(parts.predictor_loss),
        assigned_KE=assigned_KE,
        kept_KE=kept_KE,
        balanced_KE=balanced_KE,
        assigned_BE=None,
        mean_prob_E=mean(parts.mean_prob_E),
        num_tokens=total,
        router_entropy=mean(parts.router_entropy),
        max_logit=jnp.max(parts.max_logit, axis=0),
        max_violation=balance.max_violation(jnp.sum(assigned_KE, axis=-2)),
        dropped_fraction_K=dropped_fraction(assigned_KE, kept_KE),
        needed_bias_EQ=jax.tree.map(lambda a: jnp.sum(a, axis=0), parts.needed_bias_EQ),
    )
    if config.balance.load_balance_scope != "global":
        return whole
    convention = config.balance.load_balance_convention
    load_E = balance.load_share(balanced_KE, total, convention)
    loss = config.num_options * jnp.sum(load_E * whole.mean_prob_E, axis=-1)
    return whole._replace(load_balance_loss=loss)
