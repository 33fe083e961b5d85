"""Balanced assignments in training, every token's best in evaluation (legend: `moe_jax.moe`).

Training is not causal: which expert a token gets depends on all tokens of its group. Evaluation
looks at one token at a time. On a mesh nothing leaves a group. Both assignments are sought in
float32 whatever the router's dtype: bfloat16 does not tell their last steps apart.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.moe.routing.auction import balanced_assignment
from moe_jax.moe.routing.logits import router_logits
from moe_jax.moe.routing.selection import only
from moe_jax.moe.routing.token_choice import (
    RouterInputs,
    Routing,
    choose,
    gates,
    route,
    score_logits,
    top_k,
)
from moe_jax.parallel.rules import mesh_in_use, partition_spec

# Sinkhorn's iteration ends when no expert's share in the plan is further from 1 / E, or after so
# many rounds.
SHARE_TOLERANCE, MAX_ROUNDS = 0.01, 200


def sinkhorn_routing(
    x_GSM: jax.Array, params: Mapping[str, jax.Array], config: MoEConfig, inputs: RouterInputs
) -> Routing:
    """In training the K experts of most weight in a balanced plan; gates are those of token choice.

    Args:
      x_GSM: tokens, any float dtype.
      params: of the router, as `parameters.router_specs` declares them.
      config: the block's settings.
      inputs: its `rng`, without which experts are chosen by their scores; `valid_GS`.

    Returns:
      The `Routing`. Loads are nearly even, not exactly: the plan is, its largest entries need not.

    Source: Clark et al. 2022, arXiv:2202.01169 (Sinkhorn-BASE: a plan between tokens and experts,
      regularised by its entropy); choices by the plan and gates by the logits as in Megatron-LM's
      `sinkhorn_load_balancing`.
    """
    router = config.router
    if inputs.replay is not None:
        num_selected = config.num_selected_experts
        return route(
            x_GSM, params, num_selected, router,
            rng=inputs.rng, replay=inputs.replay, step=inputs.step,
        )  # fmt: skip
    logits_GSE, clean_GSE, noise_std_GSE = router_logits(
        x_GSM, params, router, inputs.rng, inputs.step
    )
    scores_GSE, probs_GSE = score_logits(logits_GSE, router)
    selection_GSE = jax.lax.stop_gradient(logits_GSE).astype(jnp.float32)
    if inputs.rng is not None:
        potential_GE = by_group(sinkhorn_potentials, selection_GSE, inputs.valid_GS)
        selection_GSE += potential_GE[:, None]
    expert_index_GSK = top_k(selection_GSE, config.num_selected_experts)[1]
    gate_GSK, chosen_GSK = gates(
        logits_GSE, scores_GSE, probs_GSE, expert_index_GSK, router, inputs.rng
    )
    return Routing(
        logits_GSE, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK, clean_GSE, noise_std_GSE
    )


def base_routing(
    x_GSM: jax.Array, params: Mapping[str, jax.Array], config: MoEConfig, inputs: RouterInputs
) -> Routing:
    """In training the balanced assignment of most affinity; the gate is the affinity's sigmoid.

    Args:
      x_GSM: tokens, any float dtype.
      params: of the router, as `parameters.router_specs` declares them.
      config: the block's settings; K = 1.
      inputs: its `rng`, without which a token gets its best expert; `valid_GS`.

    Returns:
      The `Routing`. In training no expert has more than ceil(tokens / E) tokens of a group.

    Source: Lewis et al. 2021, BASE layers, arXiv:2103.16716 (linear assignment in training, greedy
      in evaluation); its expert adds to the token what it computes, as the residual does here.
    """
    logits_GSE, clean_GSE, noise_std_GSE = router_logits(
        x_GSM, params, config.router, inputs.rng, inputs.step
    )
    scores_GSE = jax.nn.sigmoid(logits_GSE)
    affinity_GSE = jax.lax.stop_gradient(logits_GSE).astype(jnp.float32)
    chosen_GSK = None
    if inputs.replay is not None:
        expert_index_GSK, chosen_GSK = inputs.replay
    elif inputs.rng is None:
        expert_index_GSK = top_k(affinity_GSE, 1)[1]
    else:
        expert_index_GSK = by_group(balanced_assignment, affinity_GSE, inputs.valid_GS)[..., None]
    gate_GSK = only(chosen_GSK, choose(scores_GSE, expert_index_GSK), 0)
    gate_GSK *= config.router.scaling_factor
    probs_GSE = jax.nn.softmax(jax.nn.log_sigmoid(logits_GSE), axis=-1)
    return Routing(
        logits_GSE, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK, clean_GSE, noise_std_GSE
    )


def sinkhorn_potentials(logits_SE: jax.Array, valid_S: jax.Array) -> jax.Array:
    """What, added to the logits of an expert, makes a softmax over experts a balanced plan.

    Args:
      logits_SE: float32.
      valid_S: bool, False for padding, which is no part of the plan.

    Returns:
      [E]: with them, softmax(logits + potentials) sums over the valid tokens to the same number for
      every expert, to within `SHARE_TOLERANCE`.
    """
    num_valid = jnp.sum(valid_S)
    log_load = jnp.log(num_valid / logits_SE.shape[-1])
    State = tuple[jax.Array, jax.Array, jax.Array]

    def unbalanced(state: State) -> jax.Array:
        _, change, rounds = state
        return (change > SHARE_TOLERANCE) & (rounds < MAX_ROUNDS)

    def balance(state: State) -> State:
        potential_E, _, rounds = state
        log_plan_SE = jax.nn.log_softmax(logits_SE + potential_E, axis=-1)
        log_load_E = jax.nn.logsumexp(log_plan_SE, axis=0, where=valid_S[:, None])
        change_E = log_load - log_load_E
        return potential_E + change_E, jnp.max(jnp.abs(change_E)), rounds + 1

    zero_E = jnp.zeros(logits_SE.shape[-1], logits_SE.dtype)
    # A group of padding alone needs no plan.
    change = jnp.where(num_valid > 0, jnp.inf, 0).astype(logits_SE.dtype)
    return jax.lax.while_loop(unbalanced, balance, (zero_E, change, jnp.zeros((), jnp.int32)))[0]


def by_group(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    values_GSE: jax.Array,
    valid_GS: jax.Array,
) -> jax.Array:
    """Runs a function of [S, E] and [S] for every group, on a mesh each device for its own."""
    function = jax.vmap(function)
    mesh = mesh_in_use()
    if mesh is None:
        return function(values_GSE, valid_GS)
    groups = partition_spec(("group",), mesh)
    # Unchecked: a loop's state would have to be marked as differing between devices.
    return jax.shard_map(function, mesh=mesh, in_specs=groups, out_specs=groups, check_vma=False)(
        values_GSE, valid_GS
    )
