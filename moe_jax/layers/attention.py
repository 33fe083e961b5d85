"""Self-attention with shared key and value heads (legend: `moe_jax.moe`).

K counts key and value heads.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.costs import Bytes, Cost
from moe_jax.layers.attention_costs import scores_cost
from moe_jax.layers.attention_kernels import KERNELS, Task, attend_by_rules, chosen
from moe_jax.layers.cache import cache_tokens, slots, write
from moe_jax.layers.dot_product import Prefix
from moe_jax.layers.masks import Rules, Tokens
from moe_jax.layers.norms import Norm
from moe_jax.layers.rotary import Rotary
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import ParameterSpec, dense, linear, normal_init, scaled_init, zeros
from moe_jax.part import Call, Dims, Output, Own, Part, RunShape, check_divides

QK_NORM_AT = ("heads", "projection", "rotated")


@dataclasses.dataclass(frozen=True)
class Temperature(Settings):
    """Multiplies queries by ln(1 + floor((i + 1) / F)) * scale + 1 at position i.

    F is the setting `floor`.

    Source: Nakanishi 2025, arXiv:2501.19399; Llama 4, in layers without rotary positions.
    """

    floor: int = setting(8192, at_least=1)  # positions i < floor - 1 are unchanged
    scale: float = setting(0.1, at_least=0)

    def factors(self, positions_BL: jax.Array) -> jax.Array:
        """float32 [B, L], at least 1."""
        whole_BL = jnp.floor((positions_BL.astype(jnp.float32) + 1) / self.floor)
        return jnp.log1p(whole_BL) * self.scale + 1


@dataclasses.dataclass(frozen=True)
class Attention(Part):
    """Multi-head attention within documents; causal if the stack is.

    The order is: projections; `qk_norm` of the projection or of heads; `clip_qkv`; rotary
    positions; `qk_norm` after rotation; `temperature`; scores, then scale, cap and position bias.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, GQA, arXiv:2305.13245;
      QK-norm: Henry et al. 2020, arXiv:2010.04245; prefix: Li and Liang 2021, arXiv:2101.00190,
      without their reparametrisation network.
    """

    cache_can_rewind: ClassVar[bool] = True
    reads_prefix: ClassVar[bool] = True

    num_heads: int = setting(4, at_least=1)  # N: query heads
    num_kv_heads: int = setting(0, at_least=0)  # key and value heads (GQA); 0: N
    head_dim: int = setting(32, at_least=1)  # D; num_heads * head_dim may differ from model_dim
    biases: tuple[str, ...] = setting((), choices=tuple("qkvo"))  # projections with a bias
    qk_norm: Norm | None = None  # of queries and keys
    # Per head (Qwen3), over all heads (OLMoE), or per head after rotary positions (Llama 4).
    qk_norm_at: str = setting("heads", choices=QK_NORM_AT)
    clip_qkv: float | None = setting(None, above=0)  # queries, keys, values to [-clip, clip]
    clip_first: bool = False  # clip before qk_norm (OLMo code); else after
    rotary: Rotary | None = Rotary()  # rotates queries and keys by position
    temperature: Temperature | None = None  # scales queries up with position
    scale: float | None = setting(None, above=0)  # of the scores; None: head_dim**-0.5
    window: int | None = setting(None, at_least=1)  # W: keys per query; see `masks.Rules`
    chunk: int | None = setting(None, at_least=1)  # C: size of chunks, which do not see each other
    softcap: float | None = setting(None, above=0)  # c: scores become c * tanh(score / c)
    sink: bool = False  # a learned score per head in the denominator of the softmax (gpt-oss)
    position_bias: str | None = None  # the shared part whose output is added to the scores (T5)
    prefix: int = setting(0, at_least=0)  # P: learned keys that every token sees (prefix tuning)
    init_scale: float = setting(1.0, above=0)  # variance of weights x fan-in
    query_init_scale: float | None = setting(None, above=0)  # of queries; None: init_scale
    # What computes attention; "auto": the best kernel that supports the settings.
    kernel: str = setting("auto", choices=KERNELS, changes_results=False)

    def check(self) -> None:
        """See `Settings`."""
        if self.rotary is not None:
            self.rotary.check_head_dim(self.head_dim)
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
        """`wq`, `wk`, `wv` [M, ND], `wo` [ND, M], their biases `bq` ..., norms, `sink` [N].

        `prefix` contains `keys` and `values` [P, K, D], neither normed nor rotated.
        """
        heads, kv_heads = (n * self.head_dim for n in (self.num_heads, self.kv_heads))
        specs: dict[str, Any] = {}
        for name, dim in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            scale = self.query_init_scale if name == "q" else None
            init = scaled_init(scale or self.init_scale, dims.model_dim)
            specs[f"w{name}"] = ParameterSpec(
                (dims.model_dim, dim), ("model", "heads"), init, "attention"
            )
            if name in self.biases:
                specs[f"b{name}"] = ParameterSpec((dim,), ("heads",), zeros, "attention", False)
        init = scaled_init(self.init_scale, heads)
        specs["wo"] = ParameterSpec((heads, dims.model_dim), ("heads", "model"), init, "attention")
        if "o" in self.biases:
            shape = (dims.model_dim,)
            specs["bo"] = ParameterSpec(shape, ("model",), zeros, "attention", False)
        if self.qk_norm is not None:
            for name, dim in (("q_norm", heads), ("k_norm", kv_heads)):
                whole = self.qk_norm_at == "projection"
                sizes = (dim, "attention", "heads") if whole else (self.head_dim, "attention", None)
                specs[name] = self.qk_norm.specs(*sizes)
        if self.sink:
            specs["sink"] = ParameterSpec(
                (self.num_heads,), ("heads",), normal_init(0.02), "attention", False
            )
        if self.prefix:
            own = ParameterSpec(
                (self.prefix, self.kv_heads, self.head_dim), (None, "heads", None),
                normal_init(0.02), "attention", False,
            )  # fmt: skip
            specs["prefix"] = {"keys": own, "values": own}
        return specs

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """See `Part`: `keys` and `values` [B, T, K, D] with their `positions`.

        With a window or chunks, a ring buffer of the slots that a query can see.
        """
        shape, axes = (self.kv_heads, self.head_dim), ("heads", None)
        spans = [span for span in (self.window, self.chunk) if span is not None]
        span = min(spans) if spans and self.position_bias is None else None
        return slots(batch, length, span, keys=(shape, axes), values=(shape, axes))

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`."""
        return False

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: projections, and `scores_cost` of the whole L x L square.

        Windows and chunks do not reduce the square, although kernels skip blocks of it. Saved are
        queries, keys and values before and after rotation, before a norm and before a clip, and
        the output of the heads.
        """
        size, width = jnp.dtype(dtype).itemsize, dims.model_dim
        heads, kv_heads = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        saved = 3 * heads + 3 * kv_heads
        saved += 0 if self.qk_norm is None else heads + kv_heads
        saved += 0 if self.clip_qkv is None else heads + 2 * kv_heads
        projections = Cost(
            "attention",
            flops=2 * width * (2 * heads + 2 * kv_heads),
            saved=Bytes(split=saved * size),
            saved_dots=Bytes(width * size, (heads + 2 * kv_heads) * size),
            traffic=Bytes(4 * width * size, (3 * heads + 5 * kv_heads) * size),
            sums=width * size,
        )
        scores = scores_cost(
            self.kernel, dtype=dtype, length=length + self.prefix, heads=self.num_heads,
            kv_heads=self.kv_heads, dims=(self.head_dim, self.head_dim),
            is_capped=self.softcap is not None,
        )  # fmt: skip
        return (projections, scores)

    def decode_flops(self, dims: Dims, length: int, dtype: str) -> float:
        """See `Part`: a score for each slot of the cache, which may be a ring buffer."""
        num_slots = self.cache_specs(dims, 1, length)["keys"].shape[1]
        return super().decode_flops(dims, num_slots, dtype)

    def resolved(self, dtype: str, in_prefix: bool = False) -> Part:
        """See `Part`: the kernel."""
        rules = Rules(True, self.window, self.chunk)
        task = Task(
            rules, (self.head_dim, self.head_dim), dtype, bias=self.position_bias is not None,
            softcap=self.softcap is not None, sink=self.sink, learned_keys=self.prefix > 0,
            in_prefix=in_prefix,
        )  # fmt: skip
        return dataclasses.replace(self, kernel=chosen(self.kernel, task))

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """Attends to tokens of the same document, if causal to earlier tokens only; see `Part`."""
        positions, segments, cache = call.positions_BL, call.segments_BL, own.cache
        assert segments is not None and positions is not None, "with_defaults"
        q_BLND, k_BTKD, v_BTKD = self.projected(params, x_BLM)
        if self.rotary is not None:
            q_BLND = self.rotary.rotate(q_BLND, positions, segments, call.lengths_B)
            k_BTKD = self.rotary.rotate(k_BTKD, positions, segments, call.lengths_B)
        if self.qk_norm_at == "rotated":
            q_BLND, k_BTKD = self.normed(params, q_BLND, k_BTKD)
        if self.temperature is not None:
            factors_BL11 = self.temperature.factors(positions)[:, :, None, None]
            q_BLND = (q_BLND * factors_BL11).astype(x_BLM.dtype)
        queries, keys = Tokens(positions, segments, call.in_prefix_BL), None
        kernel = self.kernel
        if cache is not None:
            cache = write(cache, call, keys=k_BTKD, values=v_BTKD)
            if not call.prefill:
                k_BTKD, v_BTKD = (cache[name].astype(x_BLM.dtype) for name in ("keys", "values"))
                (queries, keys), kernel = cache_tokens(cache, call), "xla"
        out_BLND = attend_by_rules(
            q_BLND,
            k_BTKD,
            v_BTKD,
            Rules(call.causal, self.window, self.chunk),
            queries,
            keys,
            kernel=kernel,
            contiguous=call.contiguous,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            bias_BNLT=self.bias_of(call),
            softcap=self.softcap,
            sink_N=dense(params["sink"]) if self.sink else None,
            prefix=self.prefix_of(params),
        )
        out_BLND = constrain(out_BLND, "batch", None, "heads", None)
        return affine(out_BLND.reshape(*x_BLM.shape[:2], -1), params, "o"), None, cache

    def projected(self, params: Any, x_BLM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, N, D], keys and values [B, L, K, D], before rotation."""
        q, k, v = (affine(x_BLM, params, name) for name in "qkv")
        if self.clip_first:
            q, k, v = self.clipped(q, k, v)
        if self.qk_norm_at == "projection":
            q, k = self.normed(params, q, k)
        q, k, v = (split_heads(x, self.head_dim) for x in (q, k, v))
        if self.qk_norm_at == "heads":
            q, k = self.normed(params, q, k)
        return (q, k, v) if self.clip_first else self.clipped(q, k, v)

    def prefix_of(self, params: Any) -> Prefix | None:
        """The learned keys and values, or None."""
        if not self.prefix:
            return None
        return Prefix(dense(params["prefix"]["keys"]), dense(params["prefix"]["values"]))

    def normed(self, params: Any, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys after any `qk_norm`."""
        if self.qk_norm is None:
            return q, k
        return self.qk_norm.apply(params["q_norm"], q), self.qk_norm.apply(params["k_norm"], k)

    def clipped(
        self, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values after any `clip_qkv`."""
        limit = self.clip_qkv
        if limit is None:
            return q, k, v
        return jnp.clip(q, -limit, limit), jnp.clip(k, -limit, limit), jnp.clip(v, -limit, limit)

    def bias_of(self, call: Call) -> jax.Array | None:
        """The output of the shared part `position_bias`, [1 or B, N, L, T]; None without one.

        Raises:
          ValueError: the stack has no shared part of that name.
        """
        if self.position_bias is None:
            return None
        shared = call.shared or {}
        require(
            self.position_bias in shared,
            "position_bias must name a shared part of the stack",
            f"{self.position_bias!r}, the shared parts of this stack are {sorted(shared)}",
            "Add the part to shared of this stack (stack.shared or encoder.shared), or correct the "
            "name",
        )
        return shared[self.position_bias]

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """See `Part`: a head is not split."""
        check_divides(self.specs(dims), run)
        for name, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.kv_heads)):
            require(
                heads % run.shards["heads"] == 0,
                f"mesh.tensor must divide the heads ({name})",
                f"tensor={run.shards['heads']}, {heads} heads",
                "Change one of them",
            )


def affine(x: jax.Array, params: Mapping[str, Any], name: str) -> jax.Array:
    """[..., I] -> [..., O] by the weight `w{name}` and the bias `b{name}`, if any."""
    out = linear(x, params[f"w{name}"])
    bias = params.get(f"b{name}")
    return out if bias is None else out + dense(bias).astype(x.dtype)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[B, L, N * D] -> [B, L, N, D]."""
    x_BLND = x.reshape(*x.shape[:2], -1, head_dim)
    return constrain(x_BLND, "batch", None, "heads", None)
