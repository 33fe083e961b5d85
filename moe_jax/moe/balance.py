"""Balance losses, which keep expert loads even by gradient; see `load_balance` and `bias`.

A loss measures sums in every call of a block, and reduces them to one number over all layers that
use it. Legend: `moe_jax.moe`.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.kinds import by_kind
from moe_jax.config.settings import Settings, setting
from moe_jax.moe.routing import Routing, choose, top_k
from moe_jax.part import Sums

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

BatchShape = tuple[int, int]  # B, L


@dataclasses.dataclass(frozen=True)
class BalanceLoss(Settings):
    """A loss on the routing of all layers that share it.

    Attributes:
      metric: name of the loss in metrics.
    """

    family: ClassVar[str] = "balance_loss"
    metric: ClassVar[str] = "balance_loss"

    weight: float = setting(0.0, at_least=0)  # in the training loss; 0: measured only
    _: dataclasses.KW_ONLY
    over_layers: str = setting("mean", choices=("mean", "sum"))  # over the layers of the part

    @property
    def needs_batch_sums(self) -> bool:
        """Whether `loss` needs the sums of the whole batch."""
        return False

    @property
    def depends_on_microbatches(self) -> bool:
        """Whether the sum over the microbatches depends on how the batch is split."""
        return True

    def check_block(self, moe: "MoE") -> None:
        """Checks the block that uses this loss.

        Raises:
          ValueError: by `require`.
        """

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """Measures one call of a block; the arrays add up over the calls of a batch.

        Args:
          routing: of one layer.
          valid_GS: bool, False for padding.
          shape: B and L of the tokens.

        Returns:
          Arrays by name. Most losses need only `total`, a sum over valid tokens.
        """
        raise NotImplementedError

    def measure_sequences(
        self, routing: Routing, valid_GS: jax.Array, shape: BatchShape
    ) -> dict[str, Any]:
        """Arrays by name with a leading B, kept per sequence instead of summed."""
        del routing, valid_GS, shape
        return {}

    def by_layer(self, sums: Sums, num_tokens: jax.Array) -> jax.Array:
        """The unweighted loss of each layer, float32 [X].

        Args:
          sums: what `measure` returned, with a leading dim of layers.
          num_tokens: float32 scalar, valid tokens of the whole batch.
        """
        return sums["total"] / num_tokens

    def loss(self, sums: Sums, num_tokens: jax.Array, batch: Sums | None) -> jax.Array:
        """The unweighted loss over all layers; the losses of microbatches add up.

        Args:
          sums: of a microbatch, including arrays per sequence, with a leading dim of layers.
          num_tokens: float32 scalar, valid tokens of the whole batch.
          batch: sums of the whole batch; None: `sums` covers the whole batch, or no loss of the
            model has `needs_batch_sums`.
        """
        del batch
        return self.reduce(self.by_layer(sums, num_tokens))

    def reduce(self, loss_X: jax.Array) -> jax.Array:
        """The mean or the sum of the losses of layers."""
        return jnp.mean(loss_X) if self.over_layers == "mean" else jnp.sum(loss_X)


@dataclasses.dataclass(frozen=True)
class RouterZ(BalanceLoss):
    """Mean over valid tokens of logsumexp(logits)^2.

    Source: Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5 (weight 1e-3). Padding is excluded
      from the mean (as in Mesh TensorFlow and Megatron; flaxformer counts it).
    """

    metric: ClassVar[str] = "router_z_loss"
    depends_on_microbatches = False

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `BalanceLoss`."""
        lse_GS = jax.nn.logsumexp(routing.logits_GSE.astype(jnp.float32), axis=-1)
        return {"total": jnp.sum(lse_GS**2 * valid_GS)}


@dataclasses.dataclass(frozen=True)
class Importance(BalanceLoss):
    """CV^2 of the importance of experts: the sum of an expert's gates over a microbatch.

    In [0, E - 1]; 0 if all experts are equally important.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eqs. 6-7 (weight 0.1).
    """

    metric: ClassVar[str] = "importance_loss"

    def check_block(self, moe: "MoE") -> None:
        """See `BalanceLoss`."""
        require_learning(self, moe)

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `BalanceLoss`."""
        num_experts = routing.probs_GSE.shape[-1]
        choice_GSKE = jax.nn.one_hot(routing.expert_index_GSK, num_experts, dtype=jnp.float32)
        gate_GSK = routing.gate_GSK.astype(jnp.float32) * valid_GS[..., None]
        variation = squared_variation(jnp.einsum("GSK,GSKE->E", gate_GSK, choice_GSKE))
        return {"total": jnp.sum(valid_GS) * variation}


@dataclasses.dataclass(frozen=True)
class Load(BalanceLoss):
    """CV^2 of the smooth loads of a microbatch: expected tokens per expert under resampled noise.

    P(x, e) = Phi((clean_e - T_e) / deviation_e), where T_e is the K-th largest of the other
    experts' noisy logits, which expert e must exceed. The load of e is the sum of P over tokens.

    Source: Shazeer et al. 2017, arXiv:1701.06538, app. A, eqs. 8-11.
    """

    metric: ClassVar[str] = "load_loss"

    def check_block(self, moe: "MoE") -> None:
        """See `BalanceLoss`."""
        require(
            moe.router.has_smooth_load and moe.bias is None,
            "the load loss needs a router that takes the K best of logits with noise at every step",
            f"router={moe.router}, bias={moe.bias}",
            "Drop the loss, or use router='token_choice' with 'gaussian' or 'learned' noise and "
            "without bias, groups, selection and drop_rate",
        )

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `BalanceLoss`; 0 without noise, in evaluation, and if all experts are selected."""
        num_selected, num_experts = routing.gate_GSK.shape[-1], routing.logits_GSE.shape[-1]
        clean_GSE, std_GSE = routing.clean_GSE, routing.noise_std_GSE
        if clean_GSE is None or std_GSE is None or num_selected == num_experts:
            return {"total": jnp.zeros((), jnp.float32)}
        noisy_GSE = routing.logits_GSE
        best_GSK = top_k(jax.lax.stop_gradient(noisy_GSE), num_selected + 1)[1]
        is_best_GSKE = jax.nn.one_hot(best_GSK[..., :num_selected], num_experts, dtype=jnp.bool_)
        is_selected_GSE = jnp.any(is_best_GSKE, axis=-2)
        last_GS2 = choose(noisy_GSE, best_GSK[..., num_selected - 1 :])
        threshold_GSE = jnp.where(is_selected_GSE, last_GS2[..., 1:], last_GS2[..., :1])
        # A learned deviation may underflow, and the gradient divides by its square.
        safe_std_GSE = jnp.maximum(std_GSE.astype(jnp.float32), 1e-10)
        margin_GSE = (clean_GSE - threshold_GSE).astype(jnp.float32) / safe_std_GSE
        chosen_GSE = jax.scipy.stats.norm.cdf(margin_GSE) * valid_GS[..., None]
        variation = squared_variation(jnp.sum(chosen_GSE, axis=(0, 1)))
        return {"total": jnp.sum(valid_GS) * variation}


@dataclasses.dataclass(frozen=True)
class TokenEntropy(BalanceLoss):
    """The mean entropy of the tokens' distributions, in nats; it sharpens them."""

    metric: ClassVar[str] = "token_entropy_loss"
    depends_on_microbatches = False

    def check_block(self, moe: "MoE") -> None:
        """See `BalanceLoss`."""
        require_learning(self, moe)

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `BalanceLoss`."""
        return {"total": jnp.sum(entropy(routing.probs_GSE.astype(jnp.float32)) * valid_GS)}


@dataclasses.dataclass(frozen=True)
class BatchEntropy(BalanceLoss):
    """max(0, target - H), in nats, with the entropy H of a microbatch's mean distribution.

    A target of log n asks for an effective number of experts, exp(H), of at least n.

    Source: Shen et al. 2023, ModuleFormer, arXiv:2306.04640, whose mutual-information loss is this
      plus `TokenEntropy`; the target: Mustafa et al. 2022, LIMoE, arXiv:2206.02770.
    """

    metric: ClassVar[str] = "batch_entropy_loss"

    target: float = setting(0.0, at_least=0)  # nats: log n for n experts; 0: log E

    def check_block(self, moe: "MoE") -> None:
        """See `BalanceLoss`."""
        require_learning(self, moe)
        require(
            self.target <= math.log(moe.num_options),
            "target must be at most the log of the number of experts, the largest entropy there is",
            f"target={self.target}, {moe.num_options} experts, log {math.log(moe.num_options):.4f}",
            "Lower it, or set it to 0 for the log of the number of experts",
        )

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `BalanceLoss`."""
        probs_GSE = routing.probs_GSE.astype(jnp.float32) * valid_GS[..., None]
        tokens = jnp.sum(valid_GS)
        mean_prob_E = jnp.sum(probs_GSE, axis=(0, 1)) / jnp.maximum(tokens, 1)
        target = self.target or math.log(probs_GSE.shape[-1])
        return {"total": tokens * jnp.maximum(target - entropy(mean_prob_E), 0.0)}


def by_settings(losses: tuple[BalanceLoss, ...]) -> tuple[BalanceLoss, ...]:
    """Losses sorted by kind and settings; the weight only breaks ties."""

    def place(loss: BalanceLoss) -> tuple[str, float]:
        return repr(dataclasses.replace(loss, weight=0.0)), loss.weight

    return tuple(sorted(losses, key=place))


def named_losses(losses: tuple[BalanceLoss, ...]) -> list[tuple[str, BalanceLoss]]:
    """Losses named by their metric, or by their kind if several share a metric."""
    metrics = [loss.metric for loss in losses]
    return [
        (loss.metric if metrics.count(loss.metric) == 1 else f"{kind}_loss", loss)
        for kind, loss in by_kind(losses).items()
    ]


def require_learning(loss: BalanceLoss, moe: "MoE") -> None:
    """Checks that the gradient of a loss reaches the router."""
    require(
        moe.router.learns or loss.weight == 0,
        f"{loss.metric} needs a router whose probabilities learn",
        f"router={moe.router}, weight={loss.weight}",
        "Drop the loss, or set its weight to 0 to measure it",
    )


def count_choices(index_GSK: jax.Array, routing: Routing, valid_GS: jax.Array) -> jax.Array:
    """One-hot choices, int32 [G, S, K, E]; 0 for padding and for choices that do not count."""
    choice_GSKE = jax.nn.one_hot(index_GSK, routing.probs_GSE.shape[-1], dtype=jnp.int32)
    return choice_GSKE * (valid_GS[..., None] & routing.chosen_GSK)[..., None]


def over(counted_E: jax.Array, total: jax.Array) -> jax.Array:
    """Counts [..., E] divided by totals [...] (at least 1): float32, without gradient."""
    denominator = jnp.maximum(total, 1).astype(jnp.float32)
    return jax.lax.stop_gradient(counted_E.astype(jnp.float32) / denominator[..., None])


def entropy(probs: jax.Array) -> jax.Array:
    """Entropy over the last dim, in nats; the gradient is finite where a probability is 0."""
    smallest = jnp.finfo(probs.dtype).tiny
    return -jnp.sum(probs * jnp.log(jnp.maximum(probs, smallest)), axis=-1)


def squared_variation(values_E: jax.Array) -> jax.Array:
    """CV^2: variance over squared mean; 0 if all values are 0."""
    return jnp.var(values_E) / (jnp.mean(values_E) ** 2 + 1e-10)


def max_violation(assigned_E: jax.Array) -> jax.Array:
    """MaxVio: the largest load over the mean load, minus 1; float32 [...], 0 when balanced.

    Source: Wang et al. 2024, arXiv:2408.15664, eq. 4.
    """
    load_E = assigned_E.astype(jnp.float32)
    mean = jnp.mean(load_E, axis=-1)
    return jnp.where(mean > 0, jnp.max(load_E, axis=-1) / jnp.maximum(mean, 1e-9) - 1, 0.0)
