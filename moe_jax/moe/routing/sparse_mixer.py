"""SparseMixer: sampled choices whose gates estimate the router's gradient (`moe_jax.moe`)."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.moe.routing import RouterInputs, Routing, choose
from moe_jax.moe.routing.logits import LogitRouter

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

HEUN_SHARE = 0.75  # fraction of draws other than the best expert whose gates are cut to a third
HEUN_GATE = 0.3333  # a third, as in Phi-3.5-MoE


@dataclasses.dataclass(frozen=True)
class SparseMixer(LogitRouter):
    """K successive choices, each among the experts close to the best remaining expert.

    The gate of a choice is its probability among those experts. Gates of a token are independent of
    each other: all of them can be close to 1. In training an expert is drawn by its probability,
    and most gates of draws other than the best are cut to a third. They keep the gradient of the
    full gate: Heun's third-order estimate of the gradient through the draw.

    Source: Liu et al. 2024, GRIN, arXiv:2409.12136, sec. 2; Liu et al. 2023, arXiv:2310.00811;
      details as `sparsemixer` of Phi-3.5-MoE in transformers, which has K = 2.
    """

    jitter: float = setting(0.01, at_least=0, below=1)  # experts within 2 * jitter of the best

    def looks_ahead(self, training: bool) -> bool:
        """See `Router`: a token sees only itself."""
        return False

    def check_block(self, moe: "MoE") -> None:
        """See `Router`."""
        require(
            self.jitter > 0 or moe.num_options == 1,
            "without jitter only the best expert is eligible: every gate is 1, and the router "
            "gets no gradient from the task",
            f"router.jitter={self.jitter}",
            "Set it above 0",
        )

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """See `Router`; a replayed expert counts as close to the best."""
        logits = self.logits(params, x_GSM, inputs)
        logits_GSE = logits.logits_GSE
        left_GSE = jnp.ones(logits_GSE.shape, jnp.bool_)
        indices, gates = [], []
        for k in range(inputs.options.num_selected):
            draw = None if inputs.rng is None else jax.random.fold_in(inputs.rng, 2 + k)
            forced_GS = None if inputs.replay is None else inputs.replay.expert_index[..., k]
            index_GS, gate_GS = next_choice(logits_GSE, left_GSE, self.jitter, draw, forced_GS)
            left_GSE &= jnp.arange(logits_GSE.shape[-1]) != index_GS[..., None]
            indices.append(index_GS)
            gates.append(gate_GS)
        index_GSK, gate_GSK = jnp.stack(indices, -1), jnp.stack(gates, -1)
        chosen_GSK = jnp.ones(index_GSK.shape, jnp.bool_)
        if inputs.replay is not None:
            chosen_GSK = inputs.replay.chosen
        probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        return self.routing(logits, probs_GSE, index_GSK, gate_GSK, chosen_GSK)


def next_choice(
    logits_GSE: jax.Array,
    left_GSE: jax.Array,
    jitter: float,
    rng: jax.Array | None,
    forced_GS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The next choice of every token and its gate.

    Args:
      logits_GSE: of all experts.
      left_GSE: bool, experts that are not chosen yet.
      jitter: an expert with logit l is close to the best, with logit b, if b - l <= 2 jitter
        max(|l|, b).
      rng: key for a draw among close experts; None: the best, with its full gate.
      forced_GS: int32, the choice to make instead, or None.

    Returns:
      int32 [G, S] and [G, S] in the dtype of the logits.
    """
    fixed_GSE = jax.lax.stop_gradient(logits_GSE)
    left_logits_GSE = jnp.where(left_GSE, fixed_GSE, -jnp.inf)
    best_GS1 = jnp.max(left_logits_GSE, axis=-1, keepdims=True)
    scale_GSE = jnp.maximum(jnp.abs(fixed_GSE), best_GS1)
    scale_GSE = jnp.where(scale_GSE == 0, 1, scale_GSE)  # two zeros are close
    is_far_GSE = (best_GS1 - fixed_GSE) / scale_GSE > 2 * jitter
    close_GSE = left_GSE & ~is_far_GSE
    index_GS = jnp.argmax(left_logits_GSE, axis=-1)
    gumbel_key, heun_key = (None, None) if rng is None else jax.random.split(rng)
    if gumbel_key is not None:
        drawn_GSE = fixed_GSE + jax.random.gumbel(gumbel_key, fixed_GSE.shape, fixed_GSE.dtype)
        index_GS = jnp.argmax(jnp.where(close_GSE, drawn_GSE, -jnp.inf), axis=-1)
    if forced_GS is not None:
        index_GS = forced_GS
        close_GSE |= jnp.arange(fixed_GSE.shape[-1]) == index_GS[..., None]
    probs_GSE = jax.nn.softmax(jnp.where(close_GSE, logits_GSE, -jnp.inf), axis=-1)
    gate_GS = choose(probs_GSE, index_GS[..., None])[..., 0]
    if heun_key is None:
        return index_GS.astype(jnp.int32), gate_GS
    is_best_GS = index_GS == jnp.argmax(probs_GSE, axis=-1)
    is_whole_GS = is_best_GS | (jax.random.uniform(heun_key, gate_GS.shape) > HEUN_SHARE)
    value_GS = jax.lax.stop_gradient(gate_GS * jnp.where(is_whole_GS, 1.0, HEUN_GATE))
    # The difference is 0, with the gradient of the full gate.
    return index_GS.astype(jnp.int32), value_GS + (gate_GS - jax.lax.stop_gradient(gate_GS))
