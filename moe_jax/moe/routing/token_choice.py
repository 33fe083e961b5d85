"""Token-choice top-K routing: every token selects its K best experts (legend: `moe_jax.moe`)."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import RouterConfig
from moe_jax.moe.routing.logits import router_logits
from moe_jax.moe.routing.selection import later_choices, only, perturb_selection, within_top_p
from moe_jax.parallel.rules import mesh_in_use, partition_spec


class Routing(NamedTuple):
    """What the router decided.

    Attributes:
      logits_GSE: router logits, noise included.
      probs_GSE: >= 0, each row sums to 1; what the balance losses see. Softmax of the logits, or
        the sigmoid scores over their sum.
      expert_index_GSK: int32 in [0, E), the choices of a token, best first, all different.
      gate_GSK: the weight of each choice in the token's output, >= 0; 0 where it does not count.
      chosen_GSK: bool, which choices count: K is then the most a token may have. The others take no
        slot, compute nothing and are in no statistic. None: all count.
      clean_GSE: the logits without noise, or None if they have none.
      noise_std_GSE: standard deviation of their noise, broadcastable to GSE, or None.
      predictor_nats_GS: >= 0, how badly the predictor of expert choice knew a token's experts; None
        without one, and in evaluation.
      unbiased_GSK: int32, the K best by the scores alone, where a selection bias or a limit to
        groups of experts is in the choices; None where it is not.
    """

    logits_GSE: jax.Array
    probs_GSE: jax.Array
    expert_index_GSK: jax.Array
    gate_GSK: jax.Array
    chosen_GSK: jax.Array | None = None
    clean_GSE: jax.Array | None = None
    noise_std_GSE: jax.Array | None = None
    predictor_nats_GS: jax.Array | None = None
    unbiased_GSK: jax.Array | None = None


class Replay(NamedTuple):
    """Choices made elsewhere, to be taken in place of a router's own.

    Attributes:
      expert_index_GSK: int32 in [0, E); those that count are all different.
      chosen_GSK: bool, which choices count, or None: all.
    """

    expert_index_GSK: jax.Array
    chosen_GSK: jax.Array | None


class RouterInputs(NamedTuple):
    """What a router is told besides the tokens' representations.

    Attributes:
      bias_E: float32 selection bias of loss-free balancing, or None.
      rng: key; None in evaluation, which is how a router tells it from training.
      valid_GS: bool, False for padding.
      slots: C, slots of an expert in a group, a Python int.
      positions_GS: int32, of each token in its sequence or document.
      tokens_GS: int32 token ids, or None if the block was not given them.
      previous_GS: int32, the id before each token in its document, -1 at the start; or None.
      replay: the choices to take, or None: the router's own.
      step: int32 scalar, of training, for settings that are annealed; None: at their ends.
    """

    bias_E: jax.Array | None
    rng: jax.Array | None
    valid_GS: jax.Array
    slots: int
    positions_GS: jax.Array
    tokens_GS: jax.Array | None
    previous_GS: jax.Array | None
    replay: Replay | None = None
    step: jax.Array | None = None


def route(
    x_GSM: jax.Array,
    params: Mapping[str, jax.Array],
    num_selected: int,
    config: RouterConfig,
    *,
    bias_E: jax.Array | None = None,
    rng: jax.Array | None = None,
    replay: Replay | None = None,
    step: jax.Array | None = None,
) -> Routing:
    """Selects `num_selected` experts for every token.

    Args:
      x_GSM: token representations, any float dtype. Never changed: jitter goes on a copy.
      params: of the router, as `parameters.router_specs` declares them.
      num_selected: K.
      config: the options; arithmetic is in `config.dtype`, float32 unless a study says otherwise.
      bias_E: float32 selection bias of loss-free balancing: added to the scores for the selection
        only, never to the gates (DeepSeek-V3, eq. 16). No gradient flows to it.
      rng: key for jitter, noise, sampling and random choices; None, in evaluation: without them.
      replay: choices to take in place of the best ones. Logits and gates are computed all the same,
        and the gradient reaches the router through the gates of these choices.
      step: of training, for settings that are annealed; None: at their ends.

    Returns:
      The `Routing`. Ties go to the expert of the lower index.

    Source: Shazeer et al. 2017, arXiv:1701.06538 (top-K, noise); Fedus et al. 2021,
      arXiv:2101.03961 (jitter, float32 router); DeepSeek-V3, arXiv:2412.19437, eqs. 12-16; replay:
      Ma et al. 2025, arXiv:2510.11370, and Megatron-LM's router_replay.py.
    """
    logits_GSE, clean_GSE, noise_std_GSE = router_logits(x_GSM, params, config, rng, step)
    scores_GSE, probs_GSE = score_logits(logits_GSE, config)
    if replay is None:
        expert_index_GSK = select_experts(
            logits_GSE, scores_GSE, probs_GSE, num_selected, config, bias_E, rng
        )
    else:
        expert_index_GSK = replay.expert_index_GSK
    replayed_GSK = None if replay is None else replay.chosen_GSK
    gate_GSK, chosen_GSK = gates(
        logits_GSE, scores_GSE, probs_GSE, expert_index_GSK, config, rng, replayed_GSK
    )
    unbiased_GSK = None
    if bias_E is not None or config.num_selected_groups < config.num_expert_groups:
        unbiased_GSK = top_k(jax.lax.stop_gradient(logits_GSE), num_selected)[1]
    return Routing(
        logits_GSE, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK, clean_GSE, noise_std_GSE,
        unbiased_GSK=unbiased_GSK,
    )  # fmt: skip


def select_experts(
    logits_GSE: jax.Array,
    scores_GSE: jax.Array,
    probs_GSE: jax.Array,
    num_selected: int,
    config: RouterConfig,
    bias_E: jax.Array | None,
    rng: jax.Array | None,
) -> jax.Array:
    """The experts of every token, int32 [G, S, K], best first; no gradient. Arguments: `route`."""
    softmax_after_topk = config.score == "softmax" and not config.score_before_topk
    selection_GSE = logits_GSE if softmax_after_topk else scores_GSE
    if bias_E is not None:
        selection_GSE += jax.lax.stop_gradient(bias_E).astype(selection_GSE.dtype)
    if config.num_selected_groups < config.num_expert_groups:
        selection_GSE = limit_to_best_groups(selection_GSE, config)
    if rng is not None and config.selection != "best":
        selection_GSE = perturb_selection(selection_GSE, probs_GSE, config, rng)
    return top_k(jax.lax.stop_gradient(selection_GSE), num_selected)[1]


def score_logits(logits_GSE: jax.Array, config: RouterConfig) -> tuple[jax.Array, jax.Array]:
    """The scores, softmax or sigmoid of the logits, and the scores as probabilities."""
    probs_GSE = jax.nn.softmax(log_scores(logits_GSE, config), axis=-1)
    return (probs_GSE if config.score == "softmax" else jax.nn.sigmoid(logits_GSE)), probs_GSE


def log_scores(logits_GSE: jax.Array, config: RouterConfig) -> jax.Array:
    """The logs of the scores, of softmax up to a number a token.

    Scores are divided by their sum as a softmax of these, with a finite gradient where all of them
    underflow.
    """
    return logits_GSE if config.score == "softmax" else jax.nn.log_sigmoid(logits_GSE)


def gates(
    logits_GSE: jax.Array,
    scores_GSE: jax.Array,
    probs_GSE: jax.Array,
    expert_index_GSK: jax.Array,
    config: RouterConfig,
    rng: jax.Array | None,
    replayed_GSK: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The gates of the choices, and which choices count.

    Args:
      logits_GSE: router logits.
      scores_GSE: their softmax or sigmoids.
      probs_GSE: the scores as probabilities.
      expert_index_GSK: int32 in [0, E), best first.
      config: the options.
      rng: key of random later choices; None: evaluation.
      replayed_GSK: bool, which choices count, if that was decided elsewhere.

    Returns:
      gate_GSK, 0 where a choice does not count, and chosen_GSK, None if all count. top_p comes
      before renormalisation, the policies of later choices after it.
    """
    chosen_GSK = replayed_GSK if config.top_p < 1 else None
    if config.top_p < 1 and replayed_GSK is None:
        chosen_GSK = within_top_p(choose(probs_GSE, expert_index_GSK), config.top_p)
    if config.renormalize or (config.score == "softmax" and not config.score_before_topk):
        selected_GSK = choose(log_scores(logits_GSE, config), expert_index_GSK)
        gate_GSK = jax.nn.softmax(only(chosen_GSK, selected_GSK, -jnp.inf), axis=-1)
    else:
        gate_GSK = only(chosen_GSK, choose(scores_GSE, expert_index_GSK), 0)
    policy = config.eval_choice_policy if rng is None else config.choice_policy
    if replayed_GSK is not None:
        chosen_GSK = replayed_GSK
    elif policy != "all":
        kept_GSK = later_choices(gate_GSK, policy, config.choice_threshold, rng)
        chosen_GSK = kept_GSK if chosen_GSK is None else chosen_GSK & kept_GSK
    gate_GSK = only(chosen_GSK, gate_GSK, 0)
    return gate_GSK * config.scaling_factor, chosen_GSK


def choose(values_GSE: jax.Array, expert_index_GSK: jax.Array) -> jax.Array:
    """The values of the selected experts, [G, S, K].

    A one-hot product, which fuses into a sum: the gradient of an indexed read would be a scatter,
    slow on every platform.
    """
    chosen_GSKE = jax.nn.one_hot(expert_index_GSK, values_GSE.shape[-1], dtype=values_GSE.dtype)
    return jnp.sum(chosen_GSKE * values_GSE[..., None, :], axis=-1)


def top_k(values_GSE: jax.Array, k: int) -> Sequence[jax.Array]:
    """The k largest values of each token and their indices, [G, S, k]; no gradient.

    On a mesh each device looks at its own tokens: the compiler would gather everyone's.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return jax.lax.top_k(values_GSE, k)
    tokens = partition_spec(("group", None, None), mesh)
    own_top_k = functools.partial(jax.lax.top_k, k=k)
    return jax.shard_map(own_top_k, mesh=mesh, in_specs=tokens, out_specs=tokens)(values_GSE)


def limit_to_best_groups(selection_GSE: jax.Array, config: RouterConfig) -> jax.Array:
    """Masks (with -inf) every expert outside a token's `num_selected_groups` best expert groups.

    Expert groups are runs of E / num_expert_groups neighbouring experts (one node's, say). A group
    is worth its best expert (DeepSeek-V2, arXiv:2405.04434, sec. 2.2.2) or the sum of its best two
    (DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2).
    """
    num_groups = config.num_expert_groups
    groups, tokens, num_experts = selection_GSE.shape
    by_group = selection_GSE.reshape(groups, tokens * num_groups, num_experts // num_groups)
    best = top_k(by_group, 2 if config.group_score == "top2_sum" else 1)[0]
    worth = jnp.sum(best, axis=-1).reshape(groups, tokens, num_groups)
    chosen = top_k(worth, config.num_selected_groups)[1]
    allowed = jnp.any(jax.nn.one_hot(chosen, num_groups, dtype=jnp.bool_), axis=-2)
    allowed_GSE = jnp.repeat(allowed, num_experts // num_groups, axis=-1)
    return jnp.where(allowed_GSE, selection_GSE, -jnp.inf)


def single_expert(x_GSM: jax.Array, config: RouterConfig) -> Routing:
    """The routing of a layer with one expert: every token, gate 1 (times the scaling factor)."""
    dtype = jnp.dtype(config.dtype)
    ones_GS1 = jnp.ones((*x_GSM.shape[:-1], 1), dtype)
    index_GS1 = jnp.zeros_like(ones_GS1, jnp.int32)
    return Routing(jnp.zeros_like(ones_GS1), ones_GS1, index_GS1, ones_GS1 * config.scaling_factor)
