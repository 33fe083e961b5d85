"""The dense feed-forward layer: one expert's maths, for every token (legend: `moe_jax.moe`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.moe.experts import Shared, ffn
from moe_jax.moe.parameters import ffn_specs


class FeedForward(nn.Module):
    """MLP or GLU of `model.ffn_dim` hidden units."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLM: jax.Array) -> jax.Array:
        """[B, L, M] -> [B, L, M], to be added to the residual."""
        c = self.config
        specs = ffn_specs(
            c.model_dim, c.ffn_dim, gated=c.gated, use_bias=c.ffn_bias, init_scale=c.init_scale
        )
        params = {name: self.param(name, s.init, s.shape, jnp.float32) for name, s in specs.items()}
        return ffn(x_BLM, params, c.activation, Shared())
