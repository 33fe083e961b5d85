"""Parts that a user of the library wrote. Nothing in `moe_jax` knows them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import Activation, BalanceLoss, ParameterSpec, Part, Router
from moe_jax.config.settings import setting
from moe_jax.moe.routing import routing_of
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import linear, scaled_init
from moe_jax.training.loss import TrainingLoss


@dataclasses.dataclass(frozen=True)
class RoundRobin(Router):
    """Token s of a document chooses the K experts from s K + offset on, modulo E."""

    offset: int = setting(0, at_least=0)

    def looks_ahead(self, training):
        return False

    def route(self, params, x_GSM, inputs):
        options = inputs.options
        first_GS = inputs.positions_GS * options.num_selected + self.offset
        index_GSK = (first_GS[..., None] + jnp.arange(options.num_selected)) % options.num_experts
        return routing_of(index_GSK, options.num_options)


@dataclasses.dataclass(frozen=True)
class GatedRecurrence(Part):
    """A mixer: h_t = a_t h_{t-1} + (1 - a_t) v_t within a document; a and v depend on token t."""

    dim: int = setting(16, at_least=1)  # H, the size of h

    def specs(self, dims):
        inward = scaled_init(1.0, dims.model_dim)
        spec = ParameterSpec((dims.model_dim, self.dim), ("model", "hidden"), inward, "mixer")
        outward = scaled_init(1.0, self.dim)
        out = ParameterSpec((self.dim, dims.model_dim), ("hidden", "model"), outward, "mixer")
        return {"decay": spec, "value": spec, "out": out}

    def looks_ahead(self, training):
        return False

    def apply(self, params, x_BLM, call, own):
        keep_BLH = jax.nn.sigmoid(linear(x_BLM, params["decay"]))
        new_BLH = (1 - keep_BLH) * linear(x_BLM, params["value"])
        segments_BL = call.segments_BL
        starts_BL = jnp.pad(segments_BL[:, 1:] != segments_BL[:, :-1], ((0, 0), (1, 0)))
        keep_BLH = jnp.where(starts_BL[..., None], 0, keep_BLH)

        def follow(one, other):
            return one[0] * other[0], one[1] * other[0] + other[1]

        _, h_BLH = jax.lax.associative_scan(follow, (keep_BLH, new_BLH), axis=1)
        return linear(h_BLH, params["out"]), None, None


@dataclasses.dataclass(frozen=True)
class Peakedness(BalanceLoss):
    """E times the mean of sum_e p_e^2: 1 for an undecided router, E for a decided one."""

    metric = "peakedness_loss"

    def measure(self, routing, valid_GS, shape):
        probs_GSE = routing.probs_GSE.astype(jnp.float32)
        peak_GS = probs_GSE.shape[-1] * jnp.sum(probs_GSE**2, axis=-1)
        return {"total": jnp.sum(peak_GS * valid_GS)}


@dataclasses.dataclass(frozen=True)
class SquaredRelu(Activation):
    """max(x wi, 0)^2 (So et al. 2021, Primer, arXiv:2109.08668)."""

    def apply(self, inner: jax.Array, gate: Any) -> jax.Array:
        return jax.nn.relu(inner) ** 2


@dataclasses.dataclass(frozen=True)
class Unsure(TrainingLoss):
    """A loss from outside the library: cross-entropy, plus weighted cross-entropy to a prior."""

    weight: float = 0.5

    def abstract_arrays(self, config: Any, mesh: Any) -> tuple[Any, ...]:
        where = named_sharding((None,), mesh)
        return (jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.float32, sharding=where),)

    def arrays(self, config: Any, mesh: Any) -> tuple[Any, ...]:
        (leaf,) = self.abstract_arrays(config, mesh)
        return (jnp.full(leaf.shape, 1 / leaf.shape[0], device=leaf.sharding),)

    def share(self, scored, microbatch, totals, arrays):
        nats_BL = -jax.nn.log_softmax(scored.logits_BLV) @ arrays[0]
        prior = jnp.sum(nats_BL * microbatch["loss_weights"]) / totals.loss_weight
        return scored.cross_entropy + self.weight * prior, {"prior_loss": prior}
