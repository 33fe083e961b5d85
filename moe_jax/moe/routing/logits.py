"""Router logits: what a token has to do with each expert (legend: `moe_jax.moe`)."""

import jax
import jax.numpy as jnp

from moe_jax.config import RouterConfig


def router_logits(
    x_GSM: jax.Array, router_ME: jax.Array, config: RouterConfig, rng: jax.Array | None
) -> jax.Array:
    """Logits over the experts, jitter, temperature and noise included.

    Args:
      x_GSM: tokens, any float dtype; jitter goes on a copy in `config.dtype`.
      router_ME: router weights.
      config: the options.
      rng: key for jitter and noise; None switches both off.

    Returns:
      [G, S, E] in `config.dtype`: x W / temperature + noise.
    """
    dtype = jnp.dtype(config.dtype)
    router_input_GSM = x_GSM.astype(dtype)
    if rng is not None and config.input_jitter > 0:
        low, high = 1 - config.input_jitter, 1 + config.input_jitter
        key = jax.random.fold_in(rng, 0)
        router_input_GSM *= jax.random.uniform(key, x_GSM.shape, dtype, low, high)
    logits_GSE = jnp.einsum(
        "GSM,ME->GSE",
        router_input_GSM,
        router_ME.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,  # a TPU would multiply in bfloat16
    )
    if config.temperature != 1:
        logits_GSE /= config.temperature
    if rng is not None and config.logit_noise_std > 0:
        key = jax.random.fold_in(rng, 1)
        logits_GSE += config.logit_noise_std * jax.random.normal(key, logits_GSE.shape, dtype)
    return logits_GSE
