"""Causal self-attention with shared key and value heads (legend: `moe_jax.moe`)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.layers.norms import Norm
from moe_jax.layers.rotary import rotate
from moe_jax.moe.parameters import ParameterSpec, scaled_init, zeros
from moe_jax.parallel.rules import constrain


def attention_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """The projections of queries, keys, values and output, and their biases."""
    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.kv_heads))
    specs = {}
    for name, dim in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        init = scaled_init(config.init_scale, config.model_dim)
        specs[f"w{name}"] = ParameterSpec((config.model_dim, dim), init, ("model", "heads"))
        specs[f"b{name}"] = ParameterSpec((dim,), zeros, ("heads",))
    init = scaled_init(config.init_scale, heads)
    specs["wo"] = ParameterSpec((heads, config.model_dim), init, ("heads", "model"))
    specs["bo"] = ParameterSpec((config.model_dim,), zeros, ("model",))
    if config.attention_bias:
        return specs
    return {name: spec for name, spec in specs.items() if name.startswith("w")}


class Attention(nn.Module):
    """Multi-head attention; `kv_heads` < `num_heads` shares keys and values (GQA).

    Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, GQA, arXiv:2305.13245;
      QK-norm: Henry et al. 2020, arXiv:2010.04245.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BLM: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array
    ) -> jax.Array:
        """Attends to earlier tokens of the same document.

        Args:
          x_BLM: normed tokens, in the compute dtype.
          positions_BL: int32.
          segment_ids_BL: int32, the document of a token within its sequence; 0 is padding.

        Returns:
          [B, L, M], to be added to the residual.
        """
        c = self.config
        params = {
            name: self.param(name, s.init, s.shape, jnp.float32)
            for name, s in attention_specs(c).items()
        }
        q_BLND, k_BTND, v_BTND = (split_heads(linear(x_BLM, params, n), c.head_dim) for n in "qkv")
        if c.qk_norm:
            q_BLND = Norm("rmsnorm", c.norm_epsilon, name="q_norm")(q_BLND)
            k_BTND = Norm("rmsnorm", c.norm_epsilon, name="k_norm")(k_BTND)
        q_BLND = rotate(q_BLND, positions_BL, c.rope_base)
        k_BTND = rotate(k_BTND, positions_BL, c.rope_base)
        same_B1LT = segment_ids_BL[:, None, :, None] == segment_ids_BL[:, None, None, :]
        out_BLND = jax.nn.dot_product_attention(
            q_BLND, k_BTND, v_BTND, mask=same_B1LT, is_causal=True
        )
        out = constrain(out_BLND, "batch", None, "heads", None).reshape(*x_BLM.shape[:2], -1)
        return linear(out, params, "o")


def linear(x: jax.Array, params: Mapping[str, jax.Array], name: str) -> jax.Array:
    """[..., I] -> [..., O] by the weight and, if there is one, the bias of a name."""
    out = x @ params[f"w{name}"].astype(x.dtype)
    bias = params.get(f"b{name}")
    return out if bias is None else out + bias.astype(x.dtype)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[B, L, N * D] -> [B, L, N, D]."""
    x_BLND = x.reshape(*x.shape[:2], -1, head_dim)
    return constrain(x_BLND, "batch", None, "heads", None)
