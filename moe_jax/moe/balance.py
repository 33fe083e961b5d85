"""Balance: the losses and the bias that keep expert load even (legend: `moe_jax.moe`)."""

import jax
import jax.numpy as jnp


def load_balance_loss(
    assigned_UKE: jax.Array, prob_sum_UE: jax.Array, tokens_U: jax.Array, convention: str
) -> jax.Array:
    """E * sum_e f_e * P_e: the share of an expert in the choices times its mean probability.

    Counts are taken before any drop and carry no gradient.

    Args:
      assigned_UKE: counts, how many tokens of a unit have expert e as their choice k.
      prob_sum_UE: float32, sum of the full router distribution over the valid tokens of a unit.
      tokens_U: valid tokens of a unit.
      convention: what f_e is, and so the value at uniform routing:
        "megatron": all choices over their number, K * tokens where tokens do not differ in how many
          they make: 1 for every K (also OLMo-core, and ours);
        "switch": first choices over tokens: 1 (Mesh TensorFlow, GShard, V-MoE);
        "flaxformer": all K choices over tokens: K (also MaxText);
        "huggingface": as flaxformer, K; means are over all layers, which `pooled_over_layers` does.

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


def update_router_bias(bias_E: jax.Array, assigned_E: jax.Array, rate: float) -> jax.Array:
    """One step of loss-free balancing: an overloaded expert's bias falls by `rate`, else rises.

    Args:
      bias_E: float32 [..., E], selection bias.
      assigned_E: int32 [..., E], choices of the whole global batch, before drops.
      rate: gamma, the size of the step.

    Returns:
      float32 [..., E]. Not a gradient step: the bias is no parameter and has no optimizer.

    Source: Wang et al. 2024, Auxiliary-loss-free load balancing, arXiv:2408.15664, alg. 1.
    """
    # In integers: float32 means of large counts could turn the sign.
    num_experts = assigned_E.shape[-1]
    total = jnp.sum(assigned_E, axis=-1, keepdims=True)
    below_mean_E = assigned_E < -(-total // num_experts)
    above_mean_E = assigned_E > total // num_experts
    return bias_E + rate * (below_mean_E.astype(jnp.float32) - above_mean_E.astype(jnp.float32))


def max_violation(assigned_E: jax.Array) -> jax.Array:
    """MaxVio: the largest load over the mean load, minus 1; float32 [...], 0 when balanced.

    Source: Wang et al. 2024, arXiv:2408.15664, eq. 4.
    """
    load_E = assigned_E.astype(jnp.float32)
    mean = jnp.mean(load_E, axis=-1)
    return jnp.where(mean > 0, jnp.max(load_E, axis=-1) / jnp.maximum(mean, 1e-9) - 1, 0.0)
