"""Token choice: every token selects its K best experts (legend: `moe_jax.moe`)."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.moe.routing import Options, RouterInputs, Routing, choose, top_k
from moe_jax.moe.routing.logits import LogitRouter, Score, Softmax, check_gate
from moe_jax.moe.routing.noise import draw_allowed
from moe_jax.moe.routing.selection import ChoicePolicy, ExpertGroups, Selection, within_top_p

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


@dataclasses.dataclass(frozen=True)
class TokenChoice(LogitRouter):
    """Every token selects the K experts that score best.

    Source: Shazeer et al. 2017, arXiv:1701.06538 (top-K, noise); Fedus et al. 2021,
      arXiv:2101.03961 (jitter, float32 router); DeepSeek-V3, arXiv:2412.19437, eqs. 12-16; replay:
      Ma et al. 2025, arXiv:2510.11370, and Megatron-LM's router_replay.py.
    """

    takes_bias: ClassVar[bool] = True
    takes_zero_computation_experts: ClassVar[bool] = True

    score: Score = Softmax()  # "softmax", "softmax_over_selected", "sigmoid"
    renormalize: bool = False  # divide the K selected gates by their sum
    # Accept a gate that is always 1, such as a renormalised gate with K = 1. Then only balance
    # losses train the router.
    allow_constant_gate: bool = False
    groups: ExpertGroups | None = None  # group-limited selection; None: among all experts
    selection: Selection | None = None  # in training: "sampled", "sampled_rest"; None: the K best
    # In training: probability that an expert is excluded from all choices of a layer in a step.
    drop_rate: float = setting(0.0, at_least=0, below=1)
    top_p: float = setting(1.0, above=0, at_most=1)  # fewest experts whose probabilities reach p
    choices: ChoicePolicy | None = None  # which later choices count, in training; None: all
    eval_choices: ChoicePolicy | None = None  # the same in evaluation

    def check(self) -> None:
        """See `Settings`."""
        super().check()
        require(
            self.eval_choices is None or not self.eval_choices.is_random,
            "eval_choices cannot be random, since an evaluation has no random key",
            f"eval_choices={self.eval_choices}",
            "Use None, 'first' or 'threshold'",
        )

    @property
    def gates_need_all_choices(self) -> bool:
        """See `Router`: policies of later choices act after gates are normalised, top_p before."""
        return (self.renormalize or self.score.over_selected) and self.top_p == 1

    @property
    def has_smooth_load(self) -> bool:
        """See `Router`."""
        is_plain = self.groups is None and self.selection is None and self.drop_rate == 0
        return is_plain and any(one.always_on for one in self.noise)

    @property
    def has_independent_scores(self) -> bool:
        """See `Router`."""
        return self.score.independent and self.groups is None

    def looks_ahead(self, training: bool) -> bool:
        """See `Router`: a token sees only itself."""
        return False

    def mean_experts(self, options: Options, group_size: int) -> float:
        """K, or the mean number that the choice policy leaves; see `Router`."""
        selected = options.num_selected
        return selected if self.choices is None else self.choices.mean_choices(selected)

    def check_block(self, moe: "MoE") -> None:
        """See `Router`."""
        check_gate(self.score, self.renormalize, moe, allowed=self.allow_constant_gate)
        require(
            self.allow_constant_gate
            or moe.num_options == 1
            or self.top_p * moe.num_options > 1
            or not (self.renormalize or self.score.over_selected),
            "with top_p of at most 1 / num_experts every token keeps one expert, whose "
            "renormalised gate is always 1, and the router gets no gradient from the task",
            f"router.top_p={self.top_p}, experts to choose from: {moe.num_options}",
            f"Set top_p above {1 / moe.num_options:.3g}, or set allow_constant_gate=True",
        )
        if self.groups is not None:
            self.groups.check_block(moe)
        require(
            self.groups is None or self.drop_rate == 0,
            "drop_rate drops among all experts, so it excludes groups",
            f"router.drop_rate={self.drop_rate}, router.groups={self.groups}",
            "Set one of them to 0 or None",
        )
        require(
            self.selection is None or moe.bias is None,
            "a selection that draws experts cannot be combined with a selection bias",
            f"router.selection={self.selection}, bias={moe.bias}",
            "Set one of them to None",
        )

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """Selects K experts for every token; ties go to the lower index.

        The selection bias is added to the scores for the selection only, never to the gates
        (DeepSeek-V3, eq. 16); no gradient flows to it. Replayed choices replace the best choices,
        and the gradient reaches the router through their gates.
        """
        logits = self.logits(params, x_GSM, inputs)
        logits_GSE = logits.logits_GSE
        probs_GSE = jax.nn.softmax(self.score.log_scores(logits_GSE), axis=-1)
        scores_GSE = self.score.scores(logits_GSE, probs_GSE)
        num_selected, replay = inputs.options.num_selected, inputs.replay
        if replay is None:
            selection_GSE = self.select_by(logits_GSE, scores_GSE, probs_GSE, inputs)
            expert_index_GSK = top_k(jax.lax.stop_gradient(selection_GSE), num_selected)[1]
            chosen_GSK = jnp.ones(expert_index_GSK.shape, jnp.bool_)
            if self.top_p < 1:
                chosen_GSK = within_top_p(choose(probs_GSE, expert_index_GSK), self.top_p)
        else:
            self.check_replay()
            expert_index_GSK, chosen_GSK = replay.expert_index, replay.chosen
        # top_p acts before gates are renormalised, a policy of later choices after: what a policy
        # removes is part of the sum, also in a replay.
        summed_GSK = chosen_GSK if self.top_p < 1 else jnp.ones_like(chosen_GSK)
        gate_GSK = selected_gates(
            self.score, self.renormalize, logits_GSE, scores_GSE, expert_index_GSK, summed_GSK
        )
        policy = self.choices if inputs.training else self.eval_choices
        if policy is not None and replay is None:
            chosen_GSK &= policy.counts(gate_GSK, inputs.rng)
        unbiased_GSK = None
        if inputs.bias_E is not None or self.groups is not None:
            unbiased_GSK = top_k(jax.lax.stop_gradient(logits_GSE), num_selected)[1]
        return self.routing(
            logits, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK,
            scores_GSE=scores_GSE, unbiased_GSK=unbiased_GSK,
        )  # fmt: skip

    def select_by(
        self,
        logits_GSE: jax.Array,
        scores_GSE: jax.Array,
        probs_GSE: jax.Array,
        inputs: RouterInputs,
    ) -> jax.Array:
        """The numbers that a token selects by, [G, S, E], with bias, groups and draws.

        Without bias and groups, logits select instead of scores. Their order is the same, and a
        sigmoid or softmax of large logits would round to equal numbers. Dropped experts affect only
        the selection: gates are still computed over all experts.
        """
        is_plain = inputs.bias_E is None and self.groups is None
        selection_GSE = logits_GSE if is_plain else scores_GSE
        if inputs.bias_E is not None:
            bias_E = jax.lax.stop_gradient(inputs.bias_E)
            selection_GSE = selection_GSE + bias_E.astype(scores_GSE.dtype)
        if self.groups is not None:
            selection_GSE = self.groups.limit(selection_GSE)
        if inputs.rng is not None and self.drop_rate > 0:
            options = inputs.options
            allowed_E = draw_allowed(
                inputs.rng, self.drop_rate, options.num_options, options.num_selected
            )
            selection_GSE = jnp.where(allowed_E, selection_GSE, -jnp.inf)
        if inputs.rng is not None and self.selection is not None:
            selection_GSE = self.selection.perturb(selection_GSE, probs_GSE, inputs.rng)
        return selection_GSE

    def check_replay(self) -> None:
        """Checks that recorded choices are enough for a replay."""
        require(
            self.top_p == 1 or self.choices is self.eval_choices is None,
            "a replay cannot combine top_p with choices or eval_choices, since gates are "
            "renormalised between the two",
            f"router.top_p={self.top_p}, choices={self.choices}, eval_choices={self.eval_choices}",
            "Replay with one of them",
        )


def selected_gates(
    score: Score,
    renormalize: bool,
    logits_GSE: jax.Array,
    scores_GSE: jax.Array,
    expert_index_GSK: jax.Array,
    summed_GSK: jax.Array,
) -> jax.Array:
    """The gates of the choices, unscaled: [G, S, K], 0 where `summed_GSK` is False.

    They are the scores, divided by their sum if `renormalize` or `score.over_selected`. In log
    space this is exact even if scores underflow.
    """
    if not (renormalize or score.over_selected):
        return jnp.where(summed_GSK, choose(scores_GSE, expert_index_GSK), 0)
    selected_GSK = choose(score.log_scores(logits_GSE), expert_index_GSK)
    return jax.nn.softmax(jnp.where(summed_GSK, selected_GSK, -jnp.inf), axis=-1)
