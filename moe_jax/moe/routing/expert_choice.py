"""Expert choice: every expert takes the tokens of the group it scores best (legend: `moe_jax.moe`).

Not causal: whether an expert takes a token depends on the scores of all tokens of the group. On a
mesh nothing leaves a group.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.moe.routing.logits import router_logits
from moe_jax.moe.routing.token_choice import RouterInputs, Routing, choose, top_k


def expert_choice_routing(
    x_GSM: jax.Array, params: Mapping[str, jax.Array], config: MoEConfig, inputs: RouterInputs
) -> Routing:
    """Fills the slots of every expert with the tokens it scores best; ties to the earlier token.

    Args:
      x_GSM: tokens, any float dtype.
      params: of the router, as `parameters.router_specs` declares them.
      config: the block's settings. A token is taken by `num_selected_experts` times the capacity
        factor experts in the mean, by none or by all.
      inputs: its `slots` C, `valid_GS` (padding is not taken) and `rng`.

    Returns:
      A `Routing` in which a token has up to K = `max_experts` choices (E without that limit), those
      of its best probabilities. Gates are probabilities; no more than C tokens choose an expert.

    Source: Zhou et al. 2022, arXiv:2202.09368, sec. 3.2, eq. 1-2: S = softmax(x W) over experts,
      then the top C of every column. The limit takes a token's best experts after the choice and
      leaves the slots of the others empty, where the paper's (sec. 3.3) fills them again.
    """
    router, num_experts = config.router, config.num_experts
    logits_GSE, clean_GSE, noise_std_GSE = router_logits(x_GSM, params, router, inputs.rng)
    probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
    scores_GSE = jnp.where(inputs.valid_GS[..., None], jax.lax.stop_gradient(probs_GSE), -1)
    scores_GES = scores_GSE.swapaxes(1, 2)
    slots = min(inputs.slots, scores_GES.shape[-1])
    token_GEC = top_k(scores_GES, slots)[1]
    # Row by row, so that on a mesh each device marks its own tokens.
    is_taken_GES = jax.vmap(jax.vmap(mark))(jnp.zeros(scores_GES.shape, jnp.bool_), token_GEC)
    is_taken_GSE = is_taken_GES.swapaxes(1, 2) & inputs.valid_GS[..., None]

    most = router.max_experts or num_experts
    best = top_k(jnp.where(is_taken_GSE, scores_GSE, -1), most)
    expert_index_GSK, chosen_GSK = best[1], best[0] >= 0
    gate_GSK = jnp.where(chosen_GSK, choose(probs_GSE, expert_index_GSK), 0)
    gate_GSK *= router.scaling_factor
    return Routing(
        logits_GSE, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK, clean_GSE, noise_std_GSE
    )


def mark(no_S: jax.Array, token_C: jax.Array) -> jax.Array:
    """True at some places."""
    return no_S.at[token_C].set(True)
