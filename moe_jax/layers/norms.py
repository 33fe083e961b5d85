"""RMSNorm and LayerNorm, in float32 whatever the compute dtype (legend: `moe_jax.moe`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm: x / rms(x) * scale over the last dim; float32 inside, the dtype of `x` outside.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm: (x - mean) / std * scale + bias over the last dim; float32 inside.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(x.dtype)


class Norm(nn.Module):
    """A norm over the last dim with its learned scale (and bias, for LayerNorm)."""

    kind: str
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., M] -> [..., M], same dtype."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        if self.kind == "rmsnorm":
            return rms_norm(x, scale, self.epsilon)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        return layer_norm(x, scale, bias, self.epsilon)
