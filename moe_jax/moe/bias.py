"""The selection bias of loss-free balancing, and its updates (legend: `moe_jax.moe`).

The bias affects the choice of experts, never their gates. It is not a parameter. It is updated once
after each step, from the choices of the whole batch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.moe.routing import Routing, top_k

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

NUM_BINS = 1000  # Q, histogram bins per expert, over `histogram_range`
SCHEDULES = {
    "constant": jnp.ones_like,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
}


@dataclasses.dataclass(frozen=True)
class BiasUpdate(Settings):
    """A rule that updates the selection bias after each step."""

    family: ClassVar[str] = "bias_update"

    rate: float = setting(1e-3, above=0)  # size of a step (DeepSeek-V3: 1e-3)
    schedule: str = setting("constant", choices=tuple(SCHEDULES))  # decay of the rate to 0
    frozen_fraction: float = setting(0.0, at_least=0, below=1)  # last fraction of a run: no updates

    def check_block(self, moe: "MoE") -> None:
        """Checks the block that uses this bias.

        Raises:
          ValueError: by `require`.
        """
        require(
            moe.router.takes_bias,
            "a selection bias needs a router that selects by scores",
            f"router={moe.router}, bias={self}",
            "Set bias=None. A router of your own that adds `inputs.bias_E` to its scores says so: "
            "takes_bias = True",
        )

    def measure(
        self, routing: Routing, bias_E: jax.Array, valid_GS: jax.Array
    ) -> dict[str, jax.Array]:
        """Arrays for the update, in addition to counts of choices; they add up over a batch."""
        del routing, bias_E, valid_GS
        return {}

    def update(
        self,
        bias_E: jax.Array,
        assigned_E: jax.Array,
        measured: Mapping[str, Any],
        rate: float | jax.Array,
        num_selected: int,
    ) -> jax.Array:
        """The bias after a step, float32 [..., E].

        Args:
          bias_E: float32 [..., E], the bias before the step.
          assigned_E: int32 [..., E], choices per expert in the global batch, before drops.
          measured: what `measure` returned, summed over the whole batch.
          rate: learning rate of the bias in this step.
          num_selected: K.
        """
        raise NotImplementedError

    def steps_independent_of_length(self, num_steps: int) -> float:
        """The number of first steps that keep their rate if `num_steps` is raised; inf: all."""
        if self.schedule != "constant":
            return 0
        return round(num_steps * (1 - self.frozen_fraction)) if self.frozen_fraction else math.inf

    def rate_at(self, step: jax.Array, num_steps: int) -> jax.Array:
        """The rate of a step: float32 scalar, 0 in the frozen last steps.

        Linear and cosine schedules decay from the rate to 0 at the first frozen step.

        Args:
          step: int32 scalar, 0 for the first.
          num_steps: steps of the run.

        Source: DeepSeek-V3, arXiv:2412.19437: 0.001 for the first 14.3T tokens, 0 for the last
          500B, which is a frozen fraction of 0.034.
        """
        moving = round(num_steps * (1 - self.frozen_fraction))
        progress = jnp.minimum(step / max(moving, 1), 1.0)
        return self.rate * jnp.where(step < moving, SCHEDULES[self.schedule](progress), 0.0)


@dataclasses.dataclass(frozen=True)
class SignUpdate(BiasUpdate):
    """Adds the rate for experts below the mean load, and subtracts it for experts above.

    Source: Wang et al. 2024, Auxiliary-loss-free load balancing, arXiv:2408.15664, alg. 1. Centred
      steps: torchtitan's load-balancing hook.
    """

    centered: bool = False  # subtract the mean step, so that the biases keep summing to 0

    def direction(self, assigned_E: jax.Array) -> jax.Array:
        """The step at rate 1, float32 [..., E]."""
        # In integers: rounded float32 means of large counts could flip the sign.
        num_experts = assigned_E.shape[-1]
        total = jnp.sum(assigned_E, axis=-1, keepdims=True)
        below_mean_E = assigned_E < -(-total // num_experts)
        above_mean_E = assigned_E > total // num_experts
        return below_mean_E.astype(jnp.float32) - above_mean_E.astype(jnp.float32)

    def update(
        self,
        bias_E: jax.Array,
        assigned_E: jax.Array,
        measured: Mapping[str, Any],
        rate: float | jax.Array,
        num_selected: int,
    ) -> jax.Array:
        """See `BiasUpdate`."""
        step_E = self.direction(assigned_E)
        if self.centered:
            step_E -= jnp.mean(step_E, axis=-1, keepdims=True)
        return bias_E + rate * step_E


@dataclasses.dataclass(frozen=True)
class ErrorUpdate(SignUpdate):
    """Adds rate * (1 - load / mean): the full rate for an expert without load.

    Source: Wang et al. 2024, arXiv:2408.15664, table 3; here relative to the mean load, so that the
      rate does not depend on the batch size.
    """

    def direction(self, assigned_E: jax.Array) -> jax.Array:
        """See `SignUpdate`."""
        total = jnp.sum(assigned_E, axis=-1, keepdims=True)
        load_E = assigned_E.astype(jnp.float32) / jnp.maximum(total, 1)
        return jnp.where(total > 0, 1 - assigned_E.shape[-1] * load_E, 0.0)


@dataclasses.dataclass(frozen=True)
class QuantileUpdate(BiasUpdate):
    """Moves the bias by a fraction `rate` towards the bias that would have given equal loads.

    Source: see `count_needed_biases`.
    """

    rate: float = setting(1.0, above=0, at_most=1)  # 1: the quantile itself; less: moving average

    def check_block(self, moe: "MoE") -> None:
        """See `BiasUpdate`."""
        super().check_block(moe)
        require(
            moe.num_selected_experts < moe.num_options,
            "the quantile update needs an expert that is not selected",
            f"num_selected_experts={moe.num_selected_experts}, {moe.num_options} experts",
            "Lower num_selected_experts, or set bias=None: all are selected",
        )
        require(
            moe.router.has_independent_scores,
            "the quantile update counts scores in a thousand bins between 0 and 1, too coarse for "
            "a softmax over many experts",
            f"router={moe.router}",
            "Use router.score='sigmoid' without groups, or another bias update",
        )

    def measure(
        self, routing: Routing, bias_E: jax.Array, valid_GS: jax.Array
    ) -> dict[str, jax.Array]:
        """See `BiasUpdate`."""
        num_selected = routing.expert_index_GSK.shape[-1]
        assert routing.scores_GSE is not None, "has_independent_scores"
        needed_EQ = count_needed_biases(routing.scores_GSE, bias_E, num_selected, valid_GS)
        return {"needed_EQ": needed_EQ}

    def update(
        self,
        bias_E: jax.Array,
        assigned_E: jax.Array,
        measured: Mapping[str, Any],
        rate: float | jax.Array,
        num_selected: int,
    ) -> jax.Array:
        """See `BiasUpdate`."""
        target_E = quantile_bias(bias_E, measured["needed_EQ"], num_selected)
        return bias_E + rate * (target_E - bias_E)


def count_needed_biases(
    scores_GSE: jax.Array, bias_E: jax.Array, num_selected: int, valid_GS: jax.Array
) -> jax.Array:
    """For each expert, a histogram of the bias that each token would need to select it.

    A token selects expert e if score + bias of e exceeds the (K + 1)-th largest score + bias. The
    needed bias is this threshold minus the score of e.

    Args:
      scores_GSE: sigmoids, in [0, 1]. Scores of a softmax over many experts would differ by less
        than a bin.
      bias_E: float32, the bias in use.
      num_selected: K < E.
      valid_GS: bool, False for padding, which is not counted.

    Returns:
      int32 [E, Q], tokens that need a bias in each of the Q equal bins of `histogram_range`. Counts
      of parts of a batch add up to those of the batch.

    Source: Kimi K3 technical report, sec. 2.3.3 and app. D, as torchtitan (pull request 4577) and
      Megatron-LM (6637) implement it; Su 2026, kexue.fm/archives/11619.
    """
    num_experts = scores_GSE.shape[-1]
    scores_GSE = jax.lax.stop_gradient(scores_GSE).astype(jnp.float32)
    last_GS1 = top_k(scores_GSE + bias_E, num_selected + 1)[0][..., -1:]
    low, width = histogram_range(bias_E)
    bin_GSE = jnp.floor((last_GS1 - scores_GSE - low) / width).astype(jnp.int32)
    bin_GSE = jnp.clip(bin_GSE, 0, NUM_BINS - 1)
    expert_GSE = jnp.broadcast_to(jnp.arange(num_experts), bin_GSE.shape)
    counted_GSE = jnp.broadcast_to(valid_GS[..., None], bin_GSE.shape).astype(jnp.int32)
    return jnp.zeros((num_experts, NUM_BINS), jnp.int32).at[expert_GSE, bin_GSE].add(counted_GSE)


def histogram_range(bias_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The start of the first bin and the bin width, [..., 1]; bins span min b - 1 to max b + 1.

    No token needs a bias outside this range, since scores are between 0 and 1.
    """
    low = jnp.min(bias_E, axis=-1, keepdims=True) - 1
    return low, (jnp.max(bias_E, axis=-1, keepdims=True) + 1 - low) / NUM_BINS


def quantile_bias(bias_E: jax.Array, needed_EQ: jax.Array, num_selected: int) -> jax.Array:
    """The bias with which each expert would have been selected by K / E of the tokens.

    Each expert is treated separately, with all thresholds as they were. Repeated over steps, this
    approaches balance.

    Args:
      bias_E: float32 [..., E], the bias in use when tokens were counted.
      needed_EQ: int32 [..., E, Q], from `count_needed_biases`.
      num_selected: K.

    Returns:
      float32 [..., E] of mean 0: the K / E quantile of the needed biases, interpolated within a
      bin; `bias_E` where no token was counted. Source: see `count_needed_biases`.
    """
    num_experts = needed_EQ.shape[-2]
    upto_EQ = jnp.cumsum(needed_EQ, axis=-1)
    wanted_E1 = upto_EQ[..., -1:] * (num_selected / num_experts)
    bin_E1 = jnp.argmax(upto_EQ >= wanted_E1, axis=-1, keepdims=True)
    count_E1 = jnp.take_along_axis(needed_EQ, bin_E1, axis=-1)
    before_E1 = jnp.take_along_axis(upto_EQ, bin_E1, axis=-1) - count_E1
    within_E1 = (wanted_E1 - before_E1) / jnp.maximum(count_E1, 1)
    low, width = histogram_range(bias_E)
    target_E = low + width * (bin_E1 + within_E1)[..., 0]
    target_E -= jnp.mean(target_E, axis=-1, keepdims=True)
    return jnp.where(upto_EQ[..., -1] > 0, target_E, bias_E)
