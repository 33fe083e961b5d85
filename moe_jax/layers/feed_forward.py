"""The dense feed-forward layer: one expert's maths, for every token (legend: `moe_jax.moe`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.moe.experts import Shared, ffn
from moe_jax.moe.parameters import ParameterSpec, ffn_specs


def feed_forward_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """The parameters of the dense FFN."""
    return ffn_specs(
        config.model_dim,
        config.ffn_dim,
        gated=config.gated,
        use_bias=config.ffn_bias,
        init_scale=config.init_scale,
    )


class FeedForward(nn.Module):
    """MLP or GLU of `model.ffn_dim` hidden units."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLM: jax.Array) -> jax.Array:
        """[B, L, M] -> [B, L, M], to be added to the residual."""
        specs = feed_forward_specs(self.config)
        params = {name: self.param(name, s.init, s.shape, jnp.float32) for name, s in specs.items()}
        return ffn(x_BLM, params, self.config.activation, Shared())
