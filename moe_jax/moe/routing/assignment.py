"""Balanced assignments in training, each token's best in evaluation (legend: `moe_jax.moe`).

Training is not causal: a token's expert depends on all tokens of its group. Evaluation treats
tokens separately. On a mesh, groups exchange nothing. Both assignments are computed in float32 for
any router dtype, since bfloat16 cannot resolve their last steps.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.moe.routing import RouterInputs, Routing, choose, top_k
from moe_jax.moe.routing.auction import balanced_assignment
from moe_jax.moe.routing.logits import LogitRouter, Score, Softmax, check_gate
from moe_jax.moe.routing.token_choice import selected_gates
from moe_jax.parallel.rules import mesh_in_use, partition_spec

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

# Sinkhorn's iteration ends when every expert's load in the plan is within this relative tolerance
# of the mean load, or after this many rounds.
SHARE_TOLERANCE, MAX_ROUNDS = 0.01, 200


@dataclasses.dataclass(frozen=True)
class Sinkhorn(LogitRouter):
    """In training, the K experts of largest weight in a balanced plan; gates as in token choice.

    Loads are only nearly even: the plan is balanced, but its largest entries need not be.

    Source: Clark et al. 2022, arXiv:2202.01169 (Sinkhorn-BASE: a plan between tokens and experts,
      regularised by its entropy); choices by the plan and gates by the logits as in Megatron-LM's
      `sinkhorn_load_balancing`.
    """

    score: Score = Softmax()  # "softmax", "softmax_over_selected", "sigmoid"
    renormalize: bool = False  # divide the K selected gates by their sum; refused for K = 1

    def looks_ahead(self, training: bool) -> bool:
        """See `Router`."""
        return training

    def check_block(self, moe: "MoE") -> None:
        """See `Router`."""
        check_gate(self.score, self.renormalize, moe)

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """See `Router`; without a random key, experts are chosen by their logits."""
        logits = self.logits(params, x_GSM, inputs)
        logits_GSE = logits.logits_GSE
        probs_GSE = jax.nn.softmax(self.score.log_scores(logits_GSE), axis=-1)
        scores_GSE = self.score.scores(logits_GSE, probs_GSE)
        if inputs.replay is None:
            selection_GSE = jax.lax.stop_gradient(logits_GSE).astype(jnp.float32)
            if inputs.training:
                potential_GE = by_group(sinkhorn_potentials, selection_GSE, inputs.valid_GS)
                selection_GSE += potential_GE[:, None]
            expert_index_GSK = top_k(selection_GSE, inputs.options.num_selected)[1]
            chosen_GSK = jnp.ones(expert_index_GSK.shape, jnp.bool_)
        else:
            expert_index_GSK, chosen_GSK = inputs.replay.expert_index, inputs.replay.chosen
        gate_GSK = selected_gates(
            self.score, self.renormalize, logits_GSE, scores_GSE, expert_index_GSK,
            summed_GSK=jnp.ones(expert_index_GSK.shape, jnp.bool_),
        )  # fmt: skip
        return self.routing(logits, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK)


@dataclasses.dataclass(frozen=True)
class Base(LogitRouter):
    """In training, the balanced assignment of largest affinity; the gate is the affinity's sigmoid.

    In training, no expert gets more than ceil(tokens / E) tokens of a group.

    Source: Lewis et al. 2021, BASE layers, arXiv:2103.16716 (linear assignment in training, greedy
      in evaluation); there the expert adds its output to the token, as the residual does here.
    """

    def looks_ahead(self, training: bool) -> bool:
        """See `Router`."""
        return training

    def check_block(self, moe: "MoE") -> None:
        """See `Router`."""
        require(
            moe.num_selected_experts == moe.num_selected(training=False) == 1,
            "a balanced assignment needs one expert per token",
            f"router='base', num_selected_experts={moe.num_selected_experts}, "
            f"eval_num_selected_experts={moe.eval_num_selected_experts}",
            "Set num_selected_experts=1, or router='sinkhorn'",
        )

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """See `Router`; without a random key, each token gets its best expert."""
        logits = self.logits(params, x_GSM, inputs)
        logits_GSE = logits.logits_GSE
        affinity_GSE = jax.lax.stop_gradient(logits_GSE).astype(jnp.float32)
        chosen_GSK = jnp.ones((*x_GSM.shape[:2], 1), jnp.bool_)
        if inputs.replay is not None:
            expert_index_GSK, chosen_GSK = inputs.replay.expert_index, inputs.replay.chosen
        elif not inputs.training:
            expert_index_GSK = top_k(affinity_GSE, 1)[1]
        else:
            expert_index_GSK = by_group(balanced_assignment, affinity_GSE, inputs.valid_GS)
            expert_index_GSK = expert_index_GSK[..., None]
        gate_GSK = choose(jax.nn.sigmoid(logits_GSE), expert_index_GSK)
        probs_GSE = jax.nn.softmax(jax.nn.log_sigmoid(logits_GSE), axis=-1)
        return self.routing(logits, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK)


def sinkhorn_potentials(logits_SE: jax.Array, valid_S: jax.Array) -> jax.Array:
    """Potentials per expert that make softmax(logits + potentials) a balanced plan.

    Args:
      logits_SE: float32.
      valid_S: bool, False for padding, which is not in the plan.

    Returns:
      [E]: softmax(logits + potentials), summed over valid tokens, is the same for every expert to
      within `SHARE_TOLERANCE`.
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
    # A group of only padding needs no plan.
    change = jnp.where(num_valid > 0, jnp.inf, 0).astype(logits_SE.dtype)
    return jax.lax.while_loop(unbalanced, balance, (zero_E, change, jnp.zeros((), jnp.int32)))[0]


def by_group(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    values_GSE: jax.Array,
    valid_GS: jax.Array,
) -> jax.Array:
    """Runs a function of [S, E] and [S] per group; on a mesh each device runs its own groups."""
    function = jax.vmap(function)
    mesh = mesh_in_use()
    if mesh is None:
        return function(values_GSE, valid_GS)
    groups = partition_spec(("group",), mesh)
    # Unchecked: otherwise a loop's state must be marked as varying between devices.
    return jax.shard_map(function, mesh=mesh, in_specs=groups, out_specs=groups, check_vma=False)(
        values_GSE, valid_GS
    )
