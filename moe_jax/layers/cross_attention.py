"""Attention of a decoder to the output of its encoder (legend: `moe_jax.moe`).

K counts key and value heads.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.settings import setting
from moe_jax.costs import Bytes, Cost
from moe_jax.layers.attention import Attention, affine, split_heads
from moe_jax.layers.attention_costs import scores_cost
from moe_jax.layers.attention_kernels import KERNELS, Task, attend_by_rules, chosen
from moe_jax.layers.masks import Rules, Tokens
from moe_jax.layers.norms import Norm
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import ParameterSpec, zeros
from moe_jax.part import Call, Dims, Output, Own, Part, RunShape


@dataclasses.dataclass(frozen=True)
class CrossAttention(Part):
    """Multi-head attention from tokens to `Call.memory`, within segments of the same number.

    A token whose segment has no memory gets 0 from the heads. Positions are ignored, since the
    memory is another text.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2.3; with scale=1.0 as in T5, Raffel et
      al. 2020, arXiv:1910.10683.
    """

    reads_memory: ClassVar[bool] = True
    cache_can_rewind: ClassVar[bool] = True  # its cache has no tokens of the decoder
    prefill_only: ClassVar[tuple[str, ...]] = ("wk", "wv", "bk", "bv", "k_norm")

    num_heads: int = setting(4, at_least=1)  # N: query heads
    num_kv_heads: int = setting(0, at_least=0)  # key and value heads (GQA); 0: N
    head_dim: int = setting(32, at_least=1)  # D; num_heads * head_dim may differ from model_dim
    biases: tuple[str, ...] = setting((), choices=tuple("qkvo"))  # projections with a bias
    qk_norm: Norm | None = None  # of queries and keys, per head
    scale: float | None = setting(None, above=0)  # of the scores; None: head_dim**-0.5 (T5: 1.0)
    init_scale: float = setting(1.0, above=0)  # variance of weights x fan-in
    query_init_scale: float | None = setting(None, above=0)  # of queries; None: init_scale
    # What computes attention; "auto": the best kernel that supports the settings.
    kernel: str = setting("auto", choices=KERNELS, changes_results=False)

    def check(self) -> None:
        """See `Settings`."""
        assert self.attention  # which checks the heads

    @property
    def attention(self) -> Attention:
        """Self-attention with the same parameters."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Attention(rotary=None, **fields)

    def specs(self, dims: Dims) -> dict[str, Any]:
        """As `Attention`: `wq`, `wk`, `wv` [M, ND], `wo` [ND, M], biases and norms."""
        return self.attention.specs(dims)

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """See `Part`: `keys` and `values` of the memory, [B, memory_length, K, D]."""
        del length
        shape = (batch, dims.memory_length, self.attention.kv_heads, self.head_dim)
        axes = ("batch", None, "heads", None)
        spec = ParameterSpec(shape, axes, zeros, "cache", decays=False)
        return {"keys": spec, "values": spec}

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`: the memory contains no token of the decoder."""
        return False

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """Attends to the memory of the token's own segment; see `Part`."""
        assert call.memory is not None and call.segments_BL is not None, "the model lacks a memory"
        memory_BTM, memory_segments_BT = call.memory, call.memory_segments_BT
        if memory_segments_BT is None:
            memory_segments_BT = jnp.ones(memory_BTM.shape[:2], jnp.int32)
        q_BLND = split_heads(affine(x_BLM, params, "q"), self.head_dim)
        kernel = self.kernel
        if own.cache is None or call.prefill:
            k_BTKD, v_BTKD = (
                split_heads(affine(memory_BTM, params, name), self.head_dim) for name in "kv"
            )
            q_BLND, k_BTKD = self.attention.normed(params, q_BLND, k_BTKD)
        else:
            k_BTKD, v_BTKD = (own.cache[name].astype(x_BLM.dtype) for name in ("keys", "values"))
            q_BLND, _ = self.attention.normed(params, q_BLND, k_BTKD)
            kernel = "xla"
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        out_BLND = attend_by_rules(
            q_BLND,
            k_BTKD,
            v_BTKD,
            Rules(causal=False),
            Tokens(jnp.zeros_like(call.segments_BL), call.segments_BL),
            Tokens(jnp.zeros_like(memory_segments_BT), memory_segments_BT),
            kernel=kernel,
            contiguous=False,
            scale=scale,
        )
        # Otherwise a query that sees no key would get a mean over other texts of its row.
        same_BLT = call.segments_BL[:, :, None] == memory_segments_BT[:, None, :]
        out_BLND = jnp.where(jnp.any(same_BLT, axis=-1)[..., None, None], out_BLND, 0)
        out_BLND = constrain(out_BLND, "batch", None, "heads", None)
        y_BLM = affine(out_BLND.reshape(*x_BLM.shape[:2], -1), params, "o")
        if own.cache is None:
            return y_BLM, None, None
        kept = {"keys": k_BTKD, "values": v_BTKD}
        return y_BLM, None, {n: x.astype(own.cache[n].dtype) for n, x in kept.items()}

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: the whole L x T rectangle, and T / L keys and values per token.

        Without `memory_length`, the memory counts as long as the sequence.
        """
        size, width = jnp.dtype(dtype).itemsize, dims.model_dim
        heads = self.num_heads * self.head_dim
        kv_heads = self.attention.kv_heads * self.head_dim
        memory = dims.memory_length or length
        share = memory / length
        projections = Cost(
            "attention",
            flops=2 * width * 2 * (heads + share * kv_heads),
            saved=Bytes(split=2 * (heads + share * kv_heads) * size),
            saved_dots=Bytes(width * size, (heads + 2 * share * kv_heads) * size),
            traffic=Bytes((2 + 2 * share) * width * size, 2 * (heads + share * kv_heads) * size),
            sums=width * size,
        )
        scores = scores_cost(
            self.kernel, dtype=dtype, length=memory, heads=self.num_heads,
            kv_heads=self.attention.kv_heads, dims=(self.head_dim, self.head_dim), share=share,
        )  # fmt: skip
        return (projections, scores)

    def decode_flops(self, dims: Dims, length: int, dtype: str) -> float:
        """See `Part`: queries and outputs; the cache has the keys and values of the memory."""
        _, scores = self.costs(dims, length, dtype)
        return 2 * dims.model_dim * 2 * self.num_heads * self.head_dim + scores.flops

    def resolved(self, dtype: str, in_prefix: bool = False) -> Part:
        """See `Part`: the kernel."""
        task = Task(Rules(causal=False), (self.head_dim, self.head_dim), dtype, own_keys=False)
        return dataclasses.replace(self, kernel=chosen(self.kernel, task))

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """See `Part`: a head is not split."""
        self.attention.check_run(dims, run)
