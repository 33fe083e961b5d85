"""Expert choice: every expert takes the tokens of the group it scores best (legend: `moe_jax.moe`).

Not causal: whether an expert takes a token depends on the scores of all tokens of the group. A
learned predictor sees only the token, and guesses which experts would take it. It makes evaluation
and generation causal. On a mesh, groups exchange nothing.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.moe.routing import Options, RouterInputs, Routing, choose, top_k
from moe_jax.moe.routing.logits import LogitRouter, project, router_matrix, router_vector
from moe_jax.part import Dims

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


@dataclasses.dataclass(frozen=True)
class ExpertChoice(LogitRouter):
    """Fills the slots of every expert with the tokens it scores best; ties go to the earlier token.

    On average, `num_selected_experts` times the capacity factor experts take a token; the number
    ranges from 0 to E. The number of slots counts padding, so the tokens of a padded group get more
    experts. If there are no more tokens than slots, every expert takes every token.

    Source: Zhou et al. 2022, arXiv:2202.09368, sec. 3.2, eq. 1-2: S = softmax(x W) over experts,
      then the top C of every column. The limit keeps a token's best experts after the choice and
      leaves other slots empty; the paper's limit (sec. 3.3) refills them. The predictor: Raposo et
      al. 2024, Mixture-of-depths, arXiv:2404.02258, sec. 3.5, linear here.
    """

    max_experts: int = setting(0, at_least=0)  # most experts per token, its best; 0: all E
    predictor_loss_weight: float = setting(0.0, at_least=0)  # > 0: trains the evaluation predictor

    def looks_ahead(self, training: bool) -> bool:
        """See `Router`."""
        return self.fills_slots(training)

    def fills_slots(self, training: bool) -> bool:
        """See `Router`: unless the predictor decides."""
        return training or self.predictor_loss_weight == 0

    def num_choices(self, options: Options) -> int:
        """See `Router`."""
        return self.max_experts or options.num_experts

    def mean_experts(self, options: Options, group_size: int) -> float:
        """See `Router`: every slot is filled."""
        filled = options.num_experts * options.slots / group_size
        return min(filled, self.num_choices(options))

    def check_block(self, moe: "MoE") -> None:
        """See `Router`."""
        require(
            moe.capacity.train_factor > 0,
            "expert choice needs a capacity, since experts choose as many tokens as they have "
            "slots",
            f"capacity.train_factor={moe.capacity.train_factor}",
            "Set it above 0: a token gets train_factor * num_selected_experts experts on average",
        )
        require(
            self.max_experts <= moe.num_experts,
            "router.max_experts must be at most num_experts",
            f"max_experts={self.max_experts}, num_experts={moe.num_experts}",
            "Lower it, or set it to 0 for no limit",
        )
        queue = moe.capacity.queue
        require(
            not queue.needs_rng,
            "expert choice cannot use a random queue, since its evaluations have a capacity but "
            "no random key",
            f"capacity.queue={queue}",
            "Use another queue",
        )
        require(
            self.predictor_loss_weight == 0
            or moe.capacity.eval_factor == 0
            or not queue.looks_ahead(num_choices=self.max_experts or moe.num_experts),
            "router.predictor_loss_weight makes evaluation causal, which needs a causal queue too",
            f"predictor_loss_weight={self.predictor_loss_weight}, capacity.queue={queue}, "
            f"capacity.eval_factor={moe.capacity.eval_factor}",
            "Use capacity.queue='token_major', or eval_factor=0",
        )

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """Specs of the logits and `predictor`: `weight` [M, E] and `bias` [E], initialised to 0."""
        specs = super().specs(dims, options)
        if self.predictor_loss_weight > 0:
            specs["predictor"] = {
                "weight": router_matrix(dims.model_dim, options.num_options, 0),
                "bias": router_vector(options.num_options),
            }
        return specs

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """A `Routing` with up to `max_experts` choices per token, best first; see `Router`.

        Gates are probabilities; at most C tokens choose an expert. In evaluation with a predictor,
        the predicted experts take a token, and the number of tokens per expert has no limit.
        """
        logits = self.logits(params, x_GSM, inputs)
        probs_GSE = jax.nn.softmax(logits.logits_GSE, axis=-1)
        valid_GS1 = inputs.valid_GS[..., None]
        scores_GSE = jnp.where(valid_GS1, jax.lax.stop_gradient(probs_GSE), -1)
        loss_GS = None
        if self.fills_slots(training=inputs.training):
            is_taken_GSE = best_of_columns(scores_GSE, inputs.options.slots)
            if self.predictor_loss_weight > 0:
                predicted_GSE = self.predict(params, x_GSM)
                nats_GSE = jax.nn.softplus(predicted_GSE) - predicted_GSE * is_taken_GSE
                nats_GS = jnp.mean(nats_GSE.astype(jnp.float32), axis=-1)
                loss_GS = self.predictor_loss_weight * nats_GS
        else:
            is_taken_GSE = self.predict(params, x_GSM) > 0
        is_taken_GSE &= valid_GS1

        best = top_k(jnp.where(is_taken_GSE, scores_GSE, -1), self.num_choices(inputs.options))
        expert_index_GSK, chosen_GSK = best[1], best[0] >= 0
        if inputs.replay is not None:
            expert_index_GSK, chosen_GSK = inputs.replay.expert_index, inputs.replay.chosen
        gate_GSK = choose(probs_GSE, expert_index_GSK)
        return self.routing(
            logits, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK, loss_GS=loss_GS
        )

    def predict(self, params: Any, x_GSM: jax.Array) -> jax.Array:
        """Logits [G, S, E] in `dtype`, above 0 if the expert is likely to take the token.

        Only the predictor learns from them: the token carries no gradient.
        """
        x_GSM = jax.lax.stop_gradient(x_GSM).astype(self.dtype)
        predictor = params["predictor"]
        return project(x_GSM, predictor["weight"]) + predictor["bias"].astype(self.dtype)


def best_of_columns(scores_GSE: jax.Array, slots: int) -> jax.Array:
    """True for the `slots` best tokens of each expert in a group, [G, S, E]."""
    scores_GES = scores_GSE.swapaxes(1, 2)
    token_GEC = top_k(scores_GES, min(slots, scores_GES.shape[-1]))[1]
    # Row by row, so that on a mesh each device marks its own tokens.
    is_best_GES = jax.vmap(jax.vmap(mark))(jnp.zeros(scores_GES.shape, jnp.bool_), token_GEC)
    return is_best_GES.swapaxes(1, 2)


def mark(no_S: jax.Array, token_C: jax.Array) -> jax.Array:
    """`no_S` with True at the indices `token_C`."""
    return no_S.at[token_C].set(True)
