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
    # Divide the K selected gates by their L_p norm with this p (DBRX); None: do not.
    norm_order: float | None = setting(None, above=0)
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
        require(
            self.norm_order is None or not self.renormalize,
            "gates are divided by their sum or by their L_p norm, not by both",
            f"renormalize={self.renormalize}, norm_order={self.norm_order}",
            "Set renormalize=False; norm_order=1 is the sum",
        )

    @property
    def gates_need_all_choices(self) -> bool:
        """See `Router`: policies of later choices act after gates are normalised, top_p before."""
        normalizes = self.renormalize or self.norm_order is not None or self.score.over_selected
        return normalizes and self.top_p == 1

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
        renormalizes = self.renormalize or self.norm_order is not None
        check_gate(self.score, renormalizes, moe, allowed=self.allow_constant_gate)
        require(
            self.allow_constant_gate
            or moe.num_options == 1
            or self.top_p * moe.num_options > 1
            or not (renormalizes or self.score.over_selected),
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
        else:
            expert_index_GSK = replay.expert_index
        gate_GSK, chosen_GSK = self.gates(logits_GSE, scores_GSE, probs_GSE, expert_index_GSK,
                                          inputs)  # fmt: skip
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
        if inputs.rng is None or self.selection is None:
            return selection_GSE
        return self.selection.perturb(selection_GSE, probs_GSE, inputs.rng)

    def gates(
        self,
        logits_GSE: jax.Array,
        scores_GSE: jax.Array,
        probs_GSE: jax.Array,
        expert_index_GSK: jax.Array,
        inputs: RouterInputs,
    ) -> tuple[jax.Array, jax.Array]:
        """The gates of all choices, unscaled, and which choices count.

        top_p applies before renormalisation, the policies of later choices after it.
        """
        chosen_GSK = jnp.ones(expert_index_GSK.shape, jnp.bool_)
        if inputs.replay is not None:
            self.check_replay()
            chosen_GSK = inputs.replay.chosen
        elif self.top_p < 1:
            chosen_GSK = within_top_p(choose(probs_GSE, expert_index_GSK), self.top_p)
        # Choices that a policy removes still count in the normalising sum, also in a replay.
        counted_GSK = chosen_GSK if self.top_p < 1 else jnp.ones_like(chosen_GSK)
        norm_order = 1.0 if self.renormalize else self.norm_order
        gate_GSK = plain_gates(
            self.score, norm_order, logits_GSE, scores_GSE, expert_index_GSK, counted_GSK
        )
        policy = self.eval_choices if inputs.rng is None else self.choices
        if policy is not None and inputs.replay is None:
            chosen_GSK &= policy.counts(gate_GSK, inputs.rng)
        return gate_GSK, chosen_GSK

    def check_replay(self) -> None:
        """Checks that recorded choices are enough for a replay."""
        require(
            self.top_p == 1 or self.choices is self.eval_choices is None,
            "a replay cannot combine top_p with choices or eval_choices, since gates are "
            "renormalised between the two",
            f"router.top_p={self.top_p}, choices={self.choices}, eval_choices={self.eval_choices}",
            "Replay with one of them",
        )


def plain_gates(
    score: Score,
    norm_order: float | None,
    logits_GSE: jax.Array,
    scores_GSE: jax.Array,
    expert_index_GSK: jax.Array,
    counted_GSK: jax.Array,
) -> jax.Array:
    """The scores of the choices, [G, S, K], 0 if not counted.

    They are divided by their L_p norm with p = `norm_order`; 1 means their sum. None means no
    division, or by the sum if `score.over_selected`. In log space this is exact even if scores
    underflow.
    """
    if norm_order is None and not score.over_selected:
        return jnp.where(counted_GSK, choose(scores_GSE, expert_index_GSK), 0)
    selected_GSK = choose(score.log_scores(logits_GSE), expert_index_GSK)
    selected_GSK = jnp.where(counted_GSK, selected_GSK, -jnp.inf)
    if norm_order in (None, 1):
        return jax.nn.softmax(selected_GSK, axis=-1)
    log_norm_GS1 = jax.nn.logsumexp(norm_order * selected_GSK, axis=-1, keepdims=True) / norm_order
    return jnp.exp(selected_GSK - log_norm_GS1)
