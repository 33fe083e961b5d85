"""Choices other than a token's K best experts: sampled, limited to groups, or fewer than K.

Legend: `moe_jax.moe`. Everything here treats tokens separately, so it is causal.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.moe.routing import top_k

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


@dataclasses.dataclass(frozen=True)
class Selection(Settings):
    """How experts are drawn in training."""

    family: ClassVar[str] = "selection"

    def perturb(self, selection_GSE: jax.Array, probs_GSE: jax.Array, rng: jax.Array) -> jax.Array:
        """Scores whose K largest are the drawn experts.

        Args:
          selection_GSE: scores that would select the best; -inf for experts that may not be chosen.
          probs_GSE: probability of each expert.
          rng: random key of the router.

        Returns:
          [G, S, E], without gradient; -inf where `selection_GSE` is.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Sampled(Selection):
    """Draws K experts without replacement, by their probabilities.

    Source: Kool et al. 2019, arXiv:1903.06059, sec. 2.2-3: log probability plus Gumbel noise; their
      descending order is that of successive draws.
    """

    def perturb(self, selection_GSE: jax.Array, probs_GSE: jax.Array, rng: jax.Array) -> jax.Array:
        """See `Selection`."""
        probs_GSE = jax.lax.stop_gradient(probs_GSE)
        key = jax.random.fold_in(rng, 2)
        noise_GSE = jax.random.gumbel(key, probs_GSE.shape, probs_GSE.dtype)
        # A probability that underflowed counts as the smallest float: its expert is still allowed.
        log_probs_GSE = jnp.log(jnp.maximum(probs_GSE, jnp.finfo(probs_GSE.dtype).tiny))
        return jnp.where(jnp.isneginf(selection_GSE), -jnp.inf, log_probs_GSE + noise_GSE)


@dataclasses.dataclass(frozen=True)
class SampledRest(Sampled):
    """Takes the best expert, and draws the rest as `Sampled` (DeepSpeed's top-2 gate)."""

    def perturb(self, selection_GSE: jax.Array, probs_GSE: jax.Array, rng: jax.Array) -> jax.Array:
        """See `Selection`. The best expert gets inf, so it is always the first choice."""
        drawn_GSE = super().perturb(selection_GSE, probs_GSE, rng)
        best_GS = jnp.argmax(selection_GSE, axis=-1)
        is_best_GSE = jax.nn.one_hot(best_GS, probs_GSE.shape[-1], dtype=jnp.bool_)
        return jnp.where(is_best_GSE, jnp.inf, drawn_GSE)


@dataclasses.dataclass(frozen=True)
class ExpertGroups(Settings):
    """Limits the choices of a token to its best groups of experts.

    Groups are runs of E / num_groups neighbouring experts (for example, those of one node).
    """

    num_groups: int = setting(8, at_least=2)
    num_selected: int = setting(4, at_least=1)  # groups that a token may use
    worth: str = setting("max", choices=("max", "top2_sum"))  # of a group: best expert, best two

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.num_selected <= self.num_groups,
            "num_selected must be at most num_groups",
            f"{self.num_selected} of {self.num_groups}",
            "Lower num_selected, or set router.groups=None for selection among all experts",
        )

    def check_block(self, moe: "MoE") -> None:
        """Checks the block whose experts form the groups."""
        size, remainder = divmod(moe.num_experts, self.num_groups)
        require(
            remainder == 0,
            "router.groups.num_groups must divide num_experts",
            f"num_groups={self.num_groups}, num_experts={moe.num_experts}",
            "Use a divisor",
        )
        require(
            self.num_selected * size >= moe.num_selected(training=False),
            "the selected groups must hold at least num_selected_experts experts",
            f"{self.num_selected} groups of {size} experts, "
            f"K={moe.num_selected(training=False)} in evaluation",
            "Raise router.groups.num_selected",
        )
        require(
            self.worth == "max" or size >= 2,
            "router.groups.worth='top2_sum' needs groups of two experts or more",
            f"groups of {size}",
            "Use fewer groups or worth='max'",
        )
        require(
            moe.num_options == moe.num_experts,
            "groups of experts cannot be combined with zero and copy experts",
            f"num_zero_experts={moe.num_zero_experts}, num_copy_experts={moe.num_copy_experts}, "
            f"router.groups={self}",
            "Set router.groups=None",
        )

    def limit(self, selection_GSE: jax.Array) -> jax.Array:
        """Masks (with -inf) every expert outside a token's best groups.

        Source: DeepSeek-V2, arXiv:2405.04434, sec. 2.2.2 (a group is worth its best expert);
          DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2 (the sum of its best two).
        """
        groups, tokens, num_experts = selection_GSE.shape
        size = num_experts // self.num_groups
        by_group = selection_GSE.reshape(groups, tokens * self.num_groups, size)
        best = top_k(by_group, 2 if self.worth == "top2_sum" else 1)[0]
        worth = jnp.sum(best, axis=-1).reshape(groups, tokens, self.num_groups)
        chosen = top_k(worth, self.num_selected)[1]
        allowed = jnp.any(jax.nn.one_hot(chosen, self.num_groups, dtype=jnp.bool_), axis=-2)
        return jnp.where(jnp.repeat(allowed, size, axis=-1), selection_GSE, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class ChoicePolicy(Settings):
    """Decides which choices after the first count; their gates do not change.

    A renormalised first gate stays below 1. Names follow Mesh TensorFlow.
    """

    family: ClassVar[str] = "choice_policy"
    is_random: ClassVar[bool] = False

    def mean_choices(self, num_selected: int) -> float:
        """The mean number of choices that count; the maximum if it depends on the data."""
        return num_selected

    def counts(self, gate_GSK: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Bool [G, S, K]; the first choice always counts.

        Args:
          gate_GSK: gates, after renormalisation if any, before scaling.
          rng: random key of the router; None in evaluation.
        """
        raise NotImplementedError


def is_first(gate_GSK: jax.Array) -> jax.Array:
    """Bool [G, S, K], True for first choices."""
    return jnp.broadcast_to(jnp.arange(gate_GSK.shape[-1]) == 0, gate_GSK.shape)


@dataclasses.dataclass(frozen=True)
class FirstChoice(ChoicePolicy):
    """Only the first choice counts."""

    def mean_choices(self, num_selected: int) -> float:
        """See `ChoicePolicy`."""
        return 1

    def counts(self, gate_GSK: jax.Array, rng: jax.Array | None) -> jax.Array:
        """See `ChoicePolicy`."""
        return is_first(gate_GSK)


@dataclasses.dataclass(frozen=True)
class Threshold(ChoicePolicy):
    """Later choices count if the gate reaches a threshold (ST-MoE, arXiv:2202.08906, table 21)."""

    threshold: float = setting(0.2, above=0)  # smallest gate that counts

    def counts(self, gate_GSK: jax.Array, rng: jax.Array | None) -> jax.Array:
        """See `ChoicePolicy`."""
        return is_first(gate_GSK) | (jax.lax.stop_gradient(gate_GSK) >= self.threshold)


@dataclasses.dataclass(frozen=True)
class RandomChoices(ChoicePolicy):
    """Each later choice counts with probability min(1, gate / threshold).

    Source: Lepikhin et al. 2020, GShard, arXiv:2006.16668, alg. 1 (threshold 1/2).
    """

    is_random: ClassVar[bool] = True

    threshold: float = setting(0.5, above=0)  # smallest gate that always counts

    def counts(self, gate_GSK: jax.Array, rng: jax.Array | None) -> jax.Array:
        """See `ChoicePolicy`."""
        assert rng is not None, "no random policy in evaluation"
        gate_GSK = jax.lax.stop_gradient(gate_GSK)
        key = jax.random.fold_in(rng, 3)
        draw_GSK = jax.random.uniform(key, gate_GSK.shape, gate_GSK.dtype)
        return is_first(gate_GSK) | (draw_GSK * self.threshold < gate_GSK)


def within_top_p(prob_GSK: jax.Array, top_p: float) -> jax.Array:
    """Which choices are needed, best first, for their probabilities to sum to p.

    Args:
      prob_GSK: probability of each choice, best first.
      top_p: p in (0, 1].

    Returns:
      bool [G, S, K]: the first choice always, any other unless the choices before it reach p.

    Source: Huang et al. 2024, Harder tasks need more experts, arXiv:2403.07652.
    """
    reached_GSK = jax.lax.stop_gradient(jnp.cumsum(prob_GSK, axis=-1)) >= top_p
    return jnp.pad(~reached_GSK[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
