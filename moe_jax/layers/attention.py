"""Self-attention with shared key and value heads (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.costs import FLOAT32, Bytes, Cost
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import rotate
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import ParameterSpec, dense, linear, scaled_init, zeros
from moe_jax.part import Call, Dims, Output, Own, Part, RunShape, check_divides


@dataclasses.dataclass(frozen=True)
class Attention(Part):
    """Multi-head attention within documents; causal if the stack is.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, GQA, arXiv:2305.13245;
      QK-norm: Henry et al. 2020, arXiv:2010.04245.
    """

    num_heads: int = setting(4, at_least=1)  # N: query heads
    num_kv_heads: int = setting(0, at_least=0)  # key and value heads (GQA); 0: as many as N
    head_dim: int = setting(32, at_least=1)  # D; num_heads * head_dim need not be model_dim
    qkv_bias: bool = False  # biases on queries, keys and values
    output_bias: bool = False  # a bias on the output
    qk_norm: bool = False  # RMSNorm of queries and keys, per head
    norm_epsilon: float = setting(1e-6, above=0)  # of qk_norm
    rotary: bool = True  # turn queries and keys by their positions
    rope_base: float = setting(10_000.0, above=0)  # base of the rotary frequencies
    init_scale: float = setting(1.0, above=0)  # variance of weights over fan-in

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.head_dim % 2 == 0 or not self.rotary,
            "rotary positions need an even head_dim",
            f"head_dim={self.head_dim}",
            "Change head_dim, or set rotary=False",
        )
        require(
            self.num_kv_heads <= self.num_heads and self.num_heads % self.kv_heads == 0,
            "num_kv_heads must divide num_heads",
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}",
            "Use a divisor",
        )

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    def specs(self, dims: Dims) -> dict[str, Any]:
        """`wq`, `wk`, `wv` [M, ND], `wo` [ND, M], their biases `bq` ..., `q_norm`, `k_norm`."""
        heads, kv_heads = (n * self.head_dim for n in (self.num_heads, self.kv_heads))
        specs: dict[str, Any] = {}
        for name, dim in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            init = scaled_init(self.init_scale, dims.model_dim)
            specs[f"w{name}"] = ParameterSpec(
                (dims.model_dim, dim), ("model", "heads"), init, "attention"
            )
            if self.qkv_bias:
                specs[f"b{name}"] = ParameterSpec((dim,), ("heads",), zeros, "attention", False)
        init = scaled_init(self.init_scale, heads)
        specs["wo"] = ParameterSpec((heads, dims.model_dim), ("heads", "model"), init, "attention")
        if self.output_bias:
            shape = (dims.model_dim,)
            specs["bo"] = ParameterSpec(shape, ("model",), zeros, "attention", False)
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                specs[name] = RMSNorm(self.norm_epsilon).specs(self.head_dim, "attention")
        return specs

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`."""
        return False

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: projections; scores and weighted values, of the whole L x L square.

        Saved are queries, keys and values before and after rotation, the output of the heads, and
        a row of probabilities for each head, in float32 and in `dtype`.
        """
        size, width = jnp.dtype(dtype).itemsize, dims.model_dim
        heads, kv_heads = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        probs = self.num_heads * length
        projections = Cost(
            "attention",
            flops=2 * width * (2 * heads + 2 * kv_heads),
            saved=Bytes(split=(3 * heads + 3 * kv_heads) * size),
            saved_dots=Bytes(width * size, (heads + 2 * kv_heads) * size),
            traffic=Bytes(4 * width * size, (3 * heads + 5 * kv_heads) * size),
            sums=width * size,
            cache=Bytes(split=2 * kv_heads * size),
        )
        scores = Cost(
            "attention",
            flops=2 * 2 * length * heads,
            batched=True,
            saved=Bytes(split=probs * (FLOAT32 + (size if size != FLOAT32 else 0))),
            largest=Bytes(split=probs * FLOAT32),
            traffic=Bytes(split=2 * probs * FLOAT32),
        )
        return (projections, scores)

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """Attends to tokens of the same document, in a causal stack to earlier ones; see `Part`."""
        assert call.segments_BL is not None and call.positions_BL is not None, "with_defaults"
        q_BLND, k_BTND, v_BTND = (
            split_heads(affine(x_BLM, params, name), self.head_dim) for name in "qkv"
        )
        if self.qk_norm:
            norm = RMSNorm(self.norm_epsilon)
            q_BLND = norm.apply(params["q_norm"], q_BLND)
            k_BTND = norm.apply(params["k_norm"], k_BTND)
        if self.rotary:
            q_BLND = rotate(q_BLND, call.positions_BL, self.rope_base)
            k_BTND = rotate(k_BTND, call.positions_BL, self.rope_base)
        segments = call.segments_BL
        same_B1LT = segments[:, None, :, None] == segments[:, None, None, :]
        out_BLND = jax.nn.dot_product_attention(
            q_BLND, k_BTND, v_BTND, mask=same_B1LT, is_causal=call.causal
        )
        out_BLND = constrain(out_BLND, "batch", None, "heads", None)
        return affine(out_BLND.reshape(*x_BLM.shape[:2], -1), params, "o"), None, None

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """See `Part`: heads stay whole."""
        check_divides(self.specs(dims), run)
        for name, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            require(
                heads % run.shards["heads"] == 0,
                f"mesh.tensor must divide the heads ({name})",
                f"tensor={run.shards['heads']}, {heads} heads",
                "Change one of them",
            )


def affine(x: jax.Array, params: Mapping[str, Any], name: str) -> jax.Array:
    """[..., I] -> [..., O] by the weight `w{name}` and, if there is one, the bias."""
    out = linear(x, params[f"w{name}"])
    bias = params.get(f"b{name}")
    return out if bias is None else out + dense(bias).astype(x.dtype)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[B, L, N * D] -> [B, L, N, D]."""
    x_BLND = x.reshape(*x.shape[:2], -1, head_dim)
    return constrain(x_BLND, "batch", None, "heads", None)
