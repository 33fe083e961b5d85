"""Causal self-attention with shared key and value heads (legend: `moe_jax.moe`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.layers.norms import Norm
from moe_jax.layers.rotary import rotate
from moe_jax.moe.parameters import scaled_init, zeros


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
        q_BLND = self._heads(x_BLM, "q", c.num_heads)
        k_BTND = self._heads(x_BLM, "k", c.kv_heads)
        v_BTND = self._heads(x_BLM, "v", c.kv_heads)
        if c.qk_norm:
            q_BLND = Norm("rmsnorm", c.norm_epsilon, name="q_norm")(q_BLND)
            k_BTND = Norm("rmsnorm", c.norm_epsilon, name="k_norm")(k_BTND)
        q_BLND = rotate(q_BLND, positions_BL, c.rope_base)
        k_BTND = rotate(k_BTND, positions_BL, c.rope_base)
        same_B1LT = segment_ids_BL[:, None, :, None] == segment_ids_BL[:, None, None, :]
        out_BLND = jax.nn.dot_product_attention(
            q_BLND, k_BTND, v_BTND, mask=same_B1LT, is_causal=True
        )
        out = out_BLND.reshape(*x_BLM.shape[:2], -1)
        return self._linear(out, "o", c.model_dim)

    def _heads(self, x_BLM: jax.Array, name: str, num_heads: int) -> jax.Array:
        out = self._linear(x_BLM, name, num_heads * self.config.head_dim)
        return out.reshape(*x_BLM.shape[:2], num_heads, self.config.head_dim)

    def _linear(self, x: jax.Array, name: str, out_dim: int) -> jax.Array:
        in_dim = x.shape[-1]
        init = scaled_init(self.config.init_scale, in_dim)
        weight = self.param(f"w{name}", init, (in_dim, out_dim), jnp.float32)
        out = x @ weight.astype(x.dtype)
        if self.config.attention_bias:
            out += self.param(f"b{name}", zeros, (out_dim,), jnp.float32).astype(x.dtype)
        return out
