"""Balance: the losses that keep expert load even; the bias is in `bias` (legend: `moe_jax.moe`)."""

import math

import jax
import jax.numpy as jnp

from moe_jax.moe.routing import Routing
from moe_jax.moe.routing.token_choice import choose, top_k


def load_balance_loss(
    assigned_UKE: jax.Array, prob_sum_UE: jax.Array, tokens_U: jax.Array, convention: str
) -> jax.Array:
    """E * sum_e f_e * P_e: the share of an expert in the choices times its mean probability.

    Counts are taken before any drop and carry no gradient.

    Args:
      assigned_UKE: counts, how many tokens of a unit have expert e as their choice k, of the
        choices that `statistics.balanced_choices` names.
      prob_sum_UE: float32, sum of the full router distribution over the valid tokens of a unit.
      tokens_U: valid tokens of a unit.
      convention: what f_e is, and so the value at uniform routing:
        "megatron": all choices over their number, K * tokens where tokens do not differ in how many
          they make: 1 for every K (ours). Beside a selection bias or groups these are the K best by
          the scores alone (DeepSeek-V3's sequence-wise loss, arXiv:2412.19437; Megatron-LM's
          `compute_routing_scores_for_aux_loss`), where OLMo-core counts the choices made;
        "switch": first choices over tokens: 1 (Mesh TensorFlow, GShard, V-MoE);
        "flaxformer": all K choices over tokens: K (also MaxText);
        "huggingface": as flaxformer, K. There f and P are means over all layers before they are
          multiplied: the trained loss is that of `training.loss.load_balance`, and what this
          function says of one layer is for the metrics.

    Returns:
      float32 scalar: the mean over units, each weighted by its tokens, so that a batch gives the
      same loss however it is cut.

    Source: Fedus et al. 2021, arXiv:2101.03961, eqs. 4-6.
    """
    num_experts = prob_sum_UE.shape[-1]
    safe_tokens_U1 = jnp.maximum(tokens_U, 1).astype(jnp.float32)[:, None]
    load_UE = load_share(assigned_UKE, tokens_U, convention)
    loss_U = num_experts * jnp.sum(load_UE * prob_sum_UE / safe_tokens_U1, axis=-1)
    weight_U = tokens_U / jnp.maximum(jnp.sum(tokens_U), 1)
    return jnp.sum(loss_U * weight_U)


def load_share(assigned_KE: jax.Array, tokens: jax.Array, convention: str) -> jax.Array:
    """f_e of `load_balance_loss`: float32 [..., E] from counts [..., K, E] and tokens [...]."""
    counted = assigned_KE[..., 0, :] if convention == "switch" else jnp.sum(assigned_KE, axis=-2)
    total = jnp.sum(counted, axis=-1) if convention == "megatron" else tokens
    denominator = jnp.maximum(total, 1).astype(jnp.float32)
    return jax.lax.stop_gradient(counted.astype(jnp.float32) / denominator[..., None])


def router_z_loss(logits_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Mean over valid tokens of logsumexp(logits)^2, float32, >= 0.

    Source: Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5. Padding is left out of the mean (as
      in Mesh TensorFlow and Megatron; flaxformer counts it).
    """
    lse_GS = jax.nn.logsumexp(logits_GSE.astype(jnp.float32), axis=-1)
    weight_GS = valid_GS.astype(jnp.float32)
    return jnp.sum(lse_GS**2 * weight_GS) / jnp.maximum(jnp.sum(weight_GS), 1)


def importance_loss(routing: Routing, valid_GS: jax.Array) -> jax.Array:
    """CV^2 of the importance of the experts, which is the sum of their gates over valid tokens.

    Returns:
      float32 scalar in [0, E - 1], 0 where all experts weigh the same.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eqs. 6-7.
    """
    num_experts = routing.logits_GSE.shape[-1]
    choice_GSKE = jax.nn.one_hot(routing.expert_index_GSK, num_experts, dtype=jnp.float32)
    gate_GSK = routing.gate_GSK.astype(jnp.float32) * valid_GS[..., None]
    return squared_variation(jnp.einsum("GSK,GSKE->E", gate_GSK, choice_GSKE))


def load_loss(routing: Routing, valid_GS: jax.Array) -> jax.Array:
    """CV^2 of the smooth loads: of how many tokens would choose an expert if its noise came anew.

    P(x, e) = Phi((clean_e - T_e) / deviation_e), where T_e is the K-th largest of the other
    experts' noisy logits: what expert e has to exceed. The load of e is the sum of P over tokens.

    Args:
      routing: plain top-K choices by noisy logits; without noise the loss is 0.
      valid_GS: bool, False for padding.

    Returns:
      float32 scalar >= 0, differentiable in the logits and the deviation.

    Source: Shazeer et al. 2017, arXiv:1701.06538, app. A, eqs. 8-11.
    """
    num_selected, num_experts = routing.gate_GSK.shape[-1], routing.logits_GSE.shape[-1]
    clean_GSE, std_GSE = routing.clean_GSE, routing.noise_std_GSE
    if clean_GSE is None or std_GSE is None or num_selected == num_experts:
        return jnp.zeros((), jnp.float32)
    noisy_GSE = routing.logits_GSE
    best_GSK = top_k(jax.lax.stop_gradient(noisy_GSE), num_selected + 1)[1]
    is_best_GSKE = jax.nn.one_hot(best_GSK[..., :num_selected], num_experts, dtype=jnp.bool_)
    is_selected_GSE = jnp.any(is_best_GSKE, axis=-2)
    last_GS2 = choose(noisy_GSE, best_GSK[..., num_selected - 1 :])
    threshold_GSE = jnp.where(is_selected_GSE, last_GS2[..., 1:], last_GS2[..., :1])
    # A learned deviation may underflow, and the gradient has its square as a divisor.
    safe_std_GSE = jnp.maximum(std_GSE.astype(jnp.float32), 1e-10)
    margin_GSE = (clean_GSE - threshold_GSE).astype(jnp.float32) / safe_std_GSE
    chosen_GSE = jax.scipy.stats.norm.cdf(margin_GSE) * valid_GS[..., None]
    return squared_variation(jnp.sum(chosen_GSE, axis=(0, 1)))


def entropy(probs: jax.Array) -> jax.Array:
    """Of distributions over the last dim, in nats; the gradient is finite where one is 0."""
    smallest = jnp.finfo(probs.dtype).tiny
    return -jnp.sum(probs * jnp.log(jnp.maximum(probs, smallest)), axis=-1)


def batch_entropy_loss(mean_prob_E: jax.Array, target: float) -> jax.Array:
    """What the mean distribution of many tokens lacks in entropy: max(0, target - H), in nats.

    A target of log n asks for n experts in use, however evenly; 0 stands for log E, all of them.

    Source: Shen et al. 2023, ModuleFormer, arXiv:2306.04640, whose mutual-information loss is this
      and the mean entropy of the tokens' own distributions; with a target: Mustafa et al. 2022,
      LIMoE, arXiv:2206.02770.
    """
    target = target or math.log(mean_prob_E.shape[-1])
    return jnp.maximum(target - entropy(mean_prob_E), 0.0)


def squared_variation(values_E: jax.Array) -> jax.Array:
    """CV^2: variance over squared mean; 0 where all are 0."""
    return jnp.var(values_E) / (jnp.mean(values_E) ** 2 + 1e-10)


def max_violation(assigned_E: jax.Array) -> jax.Array:
    """MaxVio: the largest load over the mean load, minus 1; float32 [...], 0 when balanced.

    Source: Wang et al. 2024, arXiv:2408.15664, eq. 4.
    """
    load_E = assigned_E.astype(jnp.float32)
    mean = jnp.mean(load_E, axis=-1)
    return jnp.where(mean > 0, jnp.max(load_E, axis=-1) / jnp.maximum(mean, 1e-9) - 1, 0.0)
