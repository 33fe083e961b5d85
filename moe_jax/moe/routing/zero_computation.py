"""Zero-computation experts, as extra options of a token (legend: `moe_jax.moe`).

The E experts that compute are followed by zero experts, which add nothing to the token, and copy
experts, which add the token itself. They take no slots, are never full, and exist on every device.

Source: Jin et al. 2024, MoE++, arXiv:2410.07348, sec. 3.1 (without its constant expert); Meituan
2025, LongCat-Flash, arXiv:2509.01322 (copy experts only).
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.routing import Options, Routing


def computing_choices(routing: Routing, options: Options) -> Routing:
    """The choices of experts that compute, which get slots and run.

    Probabilities are also limited to these experts, so a queue ranks a token only by experts that
    can be full.
    """
    num_experts = options.num_experts
    if num_experts == options.num_options:
        return routing
    return routing._replace(
        logits_GSE=routing.logits_GSE[..., :num_experts],
        probs_GSE=routing.probs_GSE[..., :num_experts],
        expert_index_GSK=jnp.minimum(routing.expert_index_GSK, num_experts - 1),
        chosen_GSK=routing.chosen_GSK & (routing.expert_index_GSK < num_experts),
    )


def add_zero_computation(
    x_GSM: jax.Array,
    y_GSM: jax.Array,
    routing: Routing,
    kept_GSK: jax.Array,
    valid_GS1: jax.Array,
    options: Options,
    first_copy: int,
) -> tuple[jax.Array, jax.Array]:
    """Adds the choices of zero-computation experts, which are never dropped.

    Args:
      x_GSM: tokens.
      y_GSM: their expert outputs.
      routing: all choices.
      kept_GSK: bool, which choices of experts that compute were kept.
      valid_GS1: bool, False for padding.
      options: the options of the router.
      first_copy: index of the first copy expert; all later experts are copy experts.

    Returns:
      `y_GSM` plus each token times its gates for copy experts, and `kept_GSK` including the choices
      of zero-computation experts.
    """
    if options.num_experts == options.num_options:
        return y_GSM, kept_GSK
    index_GSK = routing.expert_index_GSK
    is_zero_computation_GSK = (index_GSK >= options.num_experts) & valid_GS1 & routing.chosen_GSK
    gate_GSK = jnp.where(is_zero_computation_GSK & (index_GSK >= first_copy), routing.gate_GSK, 0)
    share_GS1 = jnp.sum(gate_GSK, axis=-1, keepdims=True)
    return y_GSM + share_GS1.astype(x_GSM.dtype) * x_GSM, kept_GSK | is_zero_computation_GSK
