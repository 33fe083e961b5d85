"""The load-balance loss in the conventions of the field: share of choices times mean probability.

Legend: `moe_jax.moe`; U: units over which a mean is taken.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.moe.balance import BalanceLoss, BatchShape, count_choices, over
from moe_jax.moe.routing import Routing
from moe_jax.part import Sums

SCOPES = ("group", "sequence", "microbatch", "global")


@dataclasses.dataclass(frozen=True)
class LoadBalance(BalanceLoss):
    """E * sum_e f_e * P_e: an expert's share of the choices times its mean probability.

    f_e counts all K choices before drops, divided by their number: the loss is 1 at uniform routing
    for every K. With a selection bias or groups, f_e counts the K best by score only, which the
    gradient can change. P_e is the mean of the full distribution. No gradient flows through f.

    Scopes: f and P are means over a group, a sequence, a microbatch, or the global batch; units are
    weighted by their tokens.

    Source: Fedus et al. 2021, arXiv:2101.03961, eqs. 4-6; the counts: DeepSeek-V3's sequence-wise
      loss, arXiv:2412.19437, and Megatron-LM's `compute_routing_scores_for_aux_loss`. OLMo-core
      counts the actual choices instead.
    """

    metric: ClassVar[str] = "load_balance_loss"

    scope: str = setting("global", choices=SCOPES)  # f_e and P_e are means over this

    @property
    def needs_batch_sums(self) -> bool:
        """See `BalanceLoss`."""
        return self.scope == "global"

    @property
    def depends_on_microbatches(self) -> bool:
        """See `BalanceLoss`."""
        return self.scope == "microbatch"

    def counted(self, routing: Routing) -> jax.Array:
        """The choices that are counted, int32 [G, S, K]."""
        return routing.expert_index_GSK if routing.unbiased_GSK is None else routing.unbiased_GSK

    def share(self, counted_KE: jax.Array, tokens: jax.Array) -> jax.Array:
        """f_e: float32 [..., E] from counts [..., K, E] and tokens [...]."""
        del tokens
        counted_E = jnp.sum(counted_KE, axis=-2)
        return over(counted_E, jnp.sum(counted_E, axis=-1))

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `BalanceLoss`: counts and probabilities, and a total unless the scope is global."""
        counted_GSKE = count_choices(self.counted(routing), routing, valid_GS)
        probs_GSE = routing.probs_GSE.astype(jnp.float32) * valid_GS[..., None]
        sums = {
            "counted_KE": jnp.sum(counted_GSKE, axis=(0, 1)),
            "prob_sum_E": jnp.sum(probs_GSE, axis=(0, 1)),
        }
        if self.scope == "global":
            return sums
        units = {"group": valid_GS.shape[:1], "sequence": shape[:1], "microbatch": (1,)}[self.scope]
        counted_UKE = jnp.sum(counted_GSKE.reshape(*units, -1, *counted_GSKE.shape[2:]), axis=1)
        prob_sum_UE = jnp.sum(probs_GSE.reshape(*units, -1, probs_GSE.shape[-1]), axis=1)
        tokens_U = jnp.sum(valid_GS.reshape(*units, -1), axis=1)
        load_UE = self.share(counted_UKE, tokens_U)
        num_experts = probs_GSE.shape[-1]
        # tokens_U * mean probability is the sum of probabilities
        return sums | {"total": num_experts * jnp.sum(load_UE * prob_sum_UE)}

    def by_layer(self, sums: Sums, num_tokens: jax.Array) -> jax.Array:
        """See `BalanceLoss`."""
        if "total" in sums:
            return sums["total"] / num_tokens
        return self.product(sums, sums, num_tokens)

    def product(self, counts: Sums, sums: Sums, num_tokens: jax.Array) -> jax.Array:
        """E * sum_e f_e * P_e per layer: f from `counts`, P from `sums` over `num_tokens`."""
        load_XE = self.share(counts["counted_KE"], num_tokens)
        prob_XE = sums["prob_sum_E"] / num_tokens
        return prob_XE.shape[-1] * jnp.sum(load_XE * prob_XE, axis=-1)

    def loss(self, sums: Sums, num_tokens: jax.Array, batch: Sums | None) -> jax.Array:
        """See `BalanceLoss`."""
        if self.scope != "global":
            return self.reduce(self.by_layer(sums, num_tokens))
        return self.reduce(self.product(batch or sums, sums, num_tokens))


@dataclasses.dataclass(frozen=True)
class SwitchLoadBalance(LoadBalance):
    """`LoadBalance` with f_e = first choices / tokens: 1 at uniform routing.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 5 (Mesh TensorFlow, GShard, V-MoE).
    """

    def counted(self, routing: Routing) -> jax.Array:
        """See `LoadBalance`."""
        return routing.expert_index_GSK

    def share(self, counted_KE: jax.Array, tokens: jax.Array) -> jax.Array:
        """See `LoadBalance`."""
        return over(counted_KE[..., 0, :], tokens)


@dataclasses.dataclass(frozen=True)
class FlaxformerLoadBalance(LoadBalance):
    """`LoadBalance` with f_e = all K choices / tokens: K at uniform routing (also MaxText)."""

    def counted(self, routing: Routing) -> jax.Array:
        """See `LoadBalance`."""
        return routing.expert_index_GSK

    def share(self, counted_KE: jax.Array, tokens: jax.Array) -> jax.Array:
        """See `LoadBalance`."""
        return over(jnp.sum(counted_KE, axis=-2), tokens)


@dataclasses.dataclass(frozen=True)
class HuggingFaceLoadBalance(FlaxformerLoadBalance):
    """f_e and P_e are averaged over all layers, then multiplied: K at uniform routing.

    Source: `load_balancing_loss_func` of transformers' Mixtral and its successors. In metrics, the
      value per layer is that of `FlaxformerLoadBalance`.
    """

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.scope in ("microbatch", "global"),
            "the Hugging Face loss takes means over all layers and tokens, so its scope must be "
            "'microbatch' or 'global'",
            f"scope={self.scope!r}",
            "Change the scope or the kind",
        )
        require_pooled(self)

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `LoadBalance`; also counts tokens, since some may have no choice that counts."""
        sums = super().measure(routing, valid_GS, shape)
        return sums | {"num_valid": jnp.sum(valid_GS, dtype=jnp.int32)}

    def loss(self, sums: Sums, num_tokens: jax.Array, batch: Sums | None) -> jax.Array:
        """See `BalanceLoss`."""
        own = sums["num_valid"][0] if self.scope == "microbatch" else None
        tokens = num_tokens if own is None else jnp.maximum(own, 1).astype(jnp.float32)
        counts = sums if self.scope == "microbatch" else batch or sums
        load_E = jnp.mean(self.share(counts["counted_KE"], tokens), axis=0)
        prob_E = jnp.mean(sums["prob_sum_E"], axis=0) / num_tokens
        return prob_E.shape[-1] * jnp.sum(load_E * prob_E)


@dataclasses.dataclass(frozen=True)
class HuggingFaceSwitchLoadBalance(BalanceLoss):
    """Switch's loss as transformers computes it: layers joined along each sequence before f * P.

    f_e is the share of first choices and P_e the mean probability, over the tokens of a sequence in
    all layers. The loss is the mean over sequences, weighted by their tokens: 1 at uniform routing.

    Source: `SwitchTransformersForConditionalGeneration._unpack_router_logits` and
      `load_balancing_loss_func` of transformers' Switch.
    """

    metric: ClassVar[str] = "load_balance_loss"
    depends_on_microbatches = False

    def check(self) -> None:
        """See `Settings`."""
        require_pooled(self)

    def measure(self, routing: Routing, valid_GS: jax.Array, shape: BatchShape) -> dict[str, Any]:
        """See `BalanceLoss`: the loss of a single layer, for metrics."""
        by_sequence = self.measure_sequences(routing, valid_GS, shape)
        tokens_B = jnp.maximum(by_sequence["tokens_B"], 1)
        load_BE = over(by_sequence["first_BE"], tokens_B)
        num_experts = load_BE.shape[-1]
        return {"total": num_experts * jnp.sum(load_BE * by_sequence["prob_sum_BE"])}

    def measure_sequences(
        self, routing: Routing, valid_GS: jax.Array, shape: BatchShape
    ) -> dict[str, Any]:
        """See `BalanceLoss`."""
        first_GS1E = count_choices(routing.expert_index_GSK, routing, valid_GS)[:, :, :1]
        probs_GSE = routing.probs_GSE.astype(jnp.float32) * valid_GS[..., None]
        num_experts = probs_GSE.shape[-1]
        return {
            "first_BE": jnp.sum(first_GS1E.reshape(*shape, num_experts), axis=1),
            "prob_sum_BE": jnp.sum(probs_GSE.reshape(*shape, num_experts), axis=1),
            "tokens_B": jnp.sum(valid_GS.reshape(shape), axis=1),
        }

    def loss(self, sums: Sums, num_tokens: jax.Array, batch: Sums | None) -> jax.Array:
        """See `BalanceLoss`."""
        del batch
        tokens_XB = jnp.maximum(sums["tokens_B"], 1)
        load_BE = jnp.mean(over(sums["first_BE"], tokens_XB), axis=0)
        prob_sum_BE = jnp.mean(sums["prob_sum_BE"], axis=0)
        return load_BE.shape[-1] * jnp.sum(load_BE * prob_sum_BE) / num_tokens


def require_pooled(loss: BalanceLoss) -> None:
    """Refuses a sum over layers for a loss that pools layers before f * P."""
    require(
        loss.over_layers == "mean",
        "the Hugging Face losses pool all layers into one number",
        f"over_layers={loss.over_layers!r}",
        "Use another kind, or multiply the weight",
    )
