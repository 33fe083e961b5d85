"""Expert choice: every expert takes the tokens of the group it scores best (legend: `moe_jax.moe`).

Not causal: whether an expert takes a token depends on the scores of all tokens of the group. A
predictor, learned beside it, tells from a token alone which experts would take it, and makes
evaluation and generation causal. On a mesh nothing leaves a group.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.moe.routing.logits import project, router_logits
from moe_jax.moe.routing.selection import only
from moe_jax.moe.routing.token_choice import Replay, RouterInputs, Routing, choose, top_k


def fills_slots(config: MoEConfig, *, training: bool) -> bool:
    """Whether experts choose tokens for all their slots, so that there must be a capacity.

    A single expert has no choice: it is given every token.
    """
    by_predictor = config.router.predictor_loss_weight > 0 and not training
    return config.router.kind == "expert_choice" and config.num_options > 1 and not by_predictor


def expert_choice_routing(
    x_GSM: jax.Array, params: Mapping[str, jax.Array], config: MoEConfig, inputs: RouterInputs
) -> Routing:
    """Fills the slots of every expert with the tokens it scores best; ties to the earlier token.

    Args:
      x_GSM: tokens, any float dtype.
      params: of the router, as `parameters.router_specs` declares them.
      config: the block's settings. Over the places of a group, a token is taken by
        `num_selected_experts` times the capacity factor experts in the mean, by none or by all.
        Slots are reckoned with padding, so that the tokens of a padded group get more: where there
        are no more of them than slots, every expert takes every one.
      inputs: its `slots` C, `valid_GS` (padding is not taken) and `rng`; without this and with a
        predictor, the experts that it foretells take a token, however many tokens that are.

    Returns:
      A `Routing` in which a token has up to K = `max_experts` choices (E without that limit), those
      of its best probabilities. Gates are probabilities; no more than C tokens choose an expert.

    Source: Zhou et al. 2022, arXiv:2202.09368, sec. 3.2, eq. 1-2: S = softmax(x W) over experts,
      then the top C of every column. The limit takes a token's best experts after the choice and
      leaves the slots of the others empty, where the paper's (sec. 3.3) fills them again. The
      predictor: Raposo et al. 2024, Mixture-of-depths, arXiv:2404.02258, sec. 3.5, linear here.
    """
    router, num_experts = config.router, config.num_experts
    logits_GSE, clean_GSE, noise_std_GSE = router_logits(
        x_GSM, params, router, inputs.rng, inputs.step
    )
    probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
    scores_GSE = jnp.where(inputs.valid_GS[..., None], jax.lax.stop_gradient(probs_GSE), -1)
    nats_GS = None
    if fills_slots(config, training=inputs.rng is not None):
        is_taken_GSE = best_of_columns(scores_GSE, inputs.slots)
        if router.predictor_loss_weight > 0:
            foretold_GSE = predictor_logits(x_GSM, params, router)
            nats_GSE = jax.nn.softplus(foretold_GSE) - foretold_GSE * is_taken_GSE
            nats_GS = jnp.mean(nats_GSE.astype(jnp.float32), axis=-1)
    else:
        is_taken_GSE = predictor_logits(x_GSM, params, router) > 0
    is_taken_GSE &= inputs.valid_GS[..., None]

    best = top_k(jnp.where(is_taken_GSE, scores_GSE, -1), router.max_experts or num_experts)
    expert_index_GSK, chosen_GSK = inputs.replay or Replay(best[1], best[0] >= 0)
    gate_GSK = only(chosen_GSK, choose(probs_GSE, expert_index_GSK), 0)
    gate_GSK *= router.scaling_factor
    return Routing(
        logits_GSE, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK, clean_GSE, noise_std_GSE,
        nats_GS,
    )  # fmt: skip


def predictor_logits(
    x_GSM: jax.Array, params: Mapping[str, jax.Array], config: RouterConfig
) -> jax.Array:
    """Above 0 for an expert that is likely to take the token; [G, S, E] in `config.dtype`.

    Only the predictor learns from it: the token carries no gradient.
    """
    x_GSM = jax.lax.stop_gradient(x_GSM).astype(config.dtype)
    bias_E = params["router_predictor_bias"].astype(config.dtype)
    return project(x_GSM, params["router_predictor"]) + bias_E


def best_of_columns(scores_GSE: jax.Array, slots: int) -> jax.Array:
    """True for the `slots` tokens of a group that score best with each expert, [G, S, E]."""
    scores_GES = scores_GSE.swapaxes(1, 2)
    token_GEC = top_k(scores_GES, min(slots, scores_GES.shape[-1]))[1]
    # Row by row, so that on a mesh each device marks its own tokens.
    is_best_GES = jax.vmap(jax.vmap(mark))(jnp.zeros(scores_GES.shape, jnp.bool_), token_GEC)
    return is_best_GES.swapaxes(1, 2)


def mark(no_S: jax.Array, token_C: jax.Array) -> jax.Array:
    """True at some places."""
    return no_S.at[token_C].set(True)
