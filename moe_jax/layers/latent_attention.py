"""Latent attention: keys and values from one small vector per token (legend: `moe_jax.moe`)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.costs import Bytes, Cost
from moe_jax.layers.attention import affine, split_heads
from moe_jax.layers.attention_costs import scores_cost
from moe_jax.layers.attention_kernels import KERNELS, Task, attend_by_rules, chosen
from moe_jax.layers.cache import cache_tokens, slots, write
from moe_jax.layers.dot_product import attend
from moe_jax.layers.masks import Rules, Tokens, visible
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import Axes, ParameterSpec, columns, dense, linear, scaled_init, zeros
from moe_jax.part import Call, Dims, Output, Own, Part, RunShape, check_divides


@dataclasses.dataclass(frozen=True)
class LatentAttention(Part):
    """Multi-head attention whose keys and values are linear in a latent of the token (MLA).

    A key has a part of its own head, without positions, and a rotary part that all heads share. The
    cache contains only the latent and the rotary key. With a cache, queries are projected into the
    space of the latent, so that keys and values are never computed; see `absorb`.

    Source: DeepSeek-AI 2024, arXiv:2405.04434, sec. 2.1 and appendix C; scale: YaRN in its code.
    """

    cache_can_rewind: ClassVar[bool] = True
    reads_prefix: ClassVar[bool] = True

    num_heads: int = setting(4, at_least=1)  # N
    q_rank: int = setting(0, at_least=0)  # dim of the latent of queries; 0: none
    kv_rank: int = setting(64, at_least=1)  # F: dim of the latent of keys and values
    nope_dim: int = setting(32, at_least=1)  # of queries and keys, per head, without positions
    rope_dim: int = setting(16, at_least=2)  # of queries per head, and of the shared rotary key
    value_dim: int = setting(32, at_least=1)  # of values, per head
    rotary: Rotary = Rotary(interleaved=True)  # rotates the rotary parts, scales scores
    norm_epsilon: float = setting(1e-6, above=0)  # of the norms of the latents
    use_bias: bool = False  # biases of the projections to latents and of the output
    init_scale: float = setting(1.0, above=0)  # variance of weights x fan-in
    # What computes attention; "auto": the best kernel that supports the settings.
    kernel: str = setting("auto", choices=KERNELS, changes_results=False)

    def check(self) -> None:
        """See `Settings`."""
        self.rotary.check_head_dim(self.rope_dim, "rope_dim")

    @property
    def head_dim(self) -> int:
        """Dims of a query or key, per head."""
        return self.nope_dim + self.rope_dim

    @property
    def scale(self) -> float:
        """Multiplies scores."""
        return self.head_dim**-0.5 * self.rotary.softmax_factor

    def specs(self, dims: Dims) -> dict[str, Any]:
        """The parameters.

        `wq_a` [M, Q], `q_norm`, `wq_b` [Q, N * head_dim], or only `wq` if q_rank is 0; `wkv_a`
        [M, F + rope_dim] to the latent and the rotary key, `kv_norm`, `wkv_b` [F, N * (nope_dim +
        value_dim)], head by head; `wo` [N * value_dim, M]; biases `bq_a`, `bkv_a`, `bo`.
        """
        model, heads = dims.model_dim, self.num_heads

        def matrix(rows: int, cols: int, *axes: str | None) -> ParameterSpec:
            init = scaled_init(self.init_scale, rows)
            return ParameterSpec((rows, cols), axes, init, "attention")

        def bias(size: int, *axes: str | None) -> ParameterSpec:
            return ParameterSpec((size,), axes, zeros, "attention", decays=False)

        norm = RMSNorm(self.norm_epsilon)
        latent, queries = self.kv_rank + self.rope_dim, heads * self.head_dim
        specs: dict[str, Any] = {
            "wkv_a": matrix(model, latent, "model", None),
            "kv_norm": norm.specs(self.kv_rank, "attention"),
            "wkv_b": matrix(
                self.kv_rank, heads * (self.nope_dim + self.value_dim), "model", "heads"
            ),
            "wo": matrix(heads * self.value_dim, model, "heads", "model"),
        }
        if self.q_rank:
            specs["wq_a"] = matrix(model, self.q_rank, "model", None)
            specs["q_norm"] = norm.specs(self.q_rank, "attention")
            specs["wq_b"] = matrix(self.q_rank, queries, "model", "heads")
        else:
            specs["wq"] = matrix(model, queries, "model", "heads")
        if self.use_bias:
            specs |= {"bkv_a": bias(latent, None), "bo": bias(model, "model")}
            specs |= {"bq_a": bias(self.q_rank, None)} if self.q_rank else {}
        return specs

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """Normed `latent` [B, T, F], rotated `rotary_key` [B, T, rope_dim]; see `slots`."""
        whole: Axes = (None,)
        return slots(
            batch, length, latent=((self.kv_rank,), whole), rotary_key=((self.rope_dim,), whole)
        )

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`."""
        return False

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """See `Part`; attends within documents, like `Attention`."""
        assert call.segments_BL is not None and call.positions_BL is not None, "with_defaults"
        nope_BLND, rope_BLND = self.queries(params, x_BLM, call)
        latent_BLF, key_BLD = self.latent(params, x_BLM, call)
        cache = own.cache
        if cache is not None:
            cache = write(cache, call, latent=latent_BLF, rotary_key=key_BLD)
        if cache is None or call.prefill:
            k_BTND, v_BTND = self.expand(params, latent_BLF, key_BLD)
            q_BLND = jnp.concatenate([nope_BLND, rope_BLND], axis=-1)
            out_BLND = attend_by_rules(
                q_BLND, k_BTND, v_BTND, Rules(call.causal),
                Tokens(call.positions_BL, call.segments_BL, call.in_prefix_BL),
                kernel=self.kernel, contiguous=call.contiguous, scale=self.scale,
            )  # fmt: skip
        else:
            latent_BTF, key_BTD = (
                cache[name].astype(x_BLM.dtype) for name in ("latent", "rotary_key")
            )
            heads = dense(params["wkv_b"]).astype(x_BLM.dtype)
            out_BLND = absorb(
                nope_BLND, rope_BLND, latent_BTF, key_BTD,
                heads.reshape(self.kv_rank, self.num_heads, -1),
                visible(Rules(call.causal), *cache_tokens(cache, call)), scale=self.scale,
            )  # fmt: skip
        out_BLND = constrain(out_BLND, "batch", None, "heads", None)
        return affine(out_BLND.reshape(*x_BLM.shape[:2], -1), params, "o"), None, cache

    def queries(self, params: Any, x_BLM: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
        """[B, L, N, nope_dim], and the rotated part [B, L, N, rope_dim]."""
        if self.q_rank:
            norm = RMSNorm(self.norm_epsilon)
            latent = norm.apply(params["q_norm"], affine(x_BLM, params, "q_a"))
            parts = self.parted(latent, params["wq_b"], self.head_dim)
        else:
            parts = self.parted(x_BLM, params["wq"], self.head_dim)
        nope_BLND, rope_BLND = parts
        return nope_BLND, self.turned(rope_BLND, call)

    def latent(self, params: Any, x_BLM: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
        """What the cache keeps: normed latent [B, L, F], rotated key [B, L, rope_dim]."""
        both = affine(x_BLM, params, "kv_a")
        latent_BLF, key_BLD = jnp.split(both, (self.kv_rank,), axis=-1)
        latent_BLF = RMSNorm(self.norm_epsilon).apply(params["kv_norm"], latent_BLF)
        return latent_BLF, self.turned(key_BLD[:, :, None], call)[:, :, 0]

    def parted(self, x_BLI: jax.Array, weight: Any, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """The product with a matrix of heads: the first nope_dim of each head, and the rest.

        For many tokens the matrix is split, since their heads are larger than it. For few tokens
        the heads are split.
        """
        batch, length, inputs = x_BLI.shape
        if batch * length < inputs:
            x_BLND = split_heads(linear(x_BLI, weight), head_dim)
            first_BLND, rest_BLND = jnp.split(x_BLND, (self.nope_dim,), axis=-1)
            return first_BLND, rest_BLND

        def of_heads(part: slice) -> jax.Array:
            def choose(matrix: jax.Array) -> jax.Array:
                heads = matrix.reshape(*matrix.shape[:-1], -1, head_dim)[..., part]
                return heads.reshape(*matrix.shape[:-1], -1)

            return linear(x_BLI, columns(weight, choose))

        first, rest = of_heads(slice(self.nope_dim)), of_heads(slice(self.nope_dim, None))
        return split_heads(first, self.nope_dim), split_heads(rest, head_dim - self.nope_dim)

    def turned(self, x_BLND: jax.Array, call: Call) -> jax.Array:
        """Rotary parts of queries or keys, rotated by position."""
        assert call.positions_BL is not None, "with_defaults"
        return self.rotary.rotate(x_BLND, call.positions_BL, call.segments_BL, call.lengths_B)

    def expand(
        self, params: Any, latent_BTF: jax.Array, key_BTD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys [B, T, N, head_dim] and values [B, T, N, value_dim] from what the cache keeps."""
        size = self.nope_dim + self.value_dim
        nope_BTND, v_BTND = self.parted(latent_BTF, params["wkv_b"], size)
        shape = (*nope_BTND.shape[:3], self.rope_dim)
        rope_BTND = jnp.broadcast_to(key_BTD[:, :, None], shape)
        return jnp.concatenate([nope_BTND, rope_BTND], axis=-1), v_BTND

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: projections, and `scores_cost` of the whole L x L square.

        Saved are latents before and after their norms, queries and keys in parts and whole, values,
        and the output of the heads.
        """
        size, width, heads = jnp.dtype(dtype).itemsize, dims.model_dim, self.num_heads
        q, keys_values = heads * self.head_dim, heads * (self.nope_dim + self.value_dim)
        latent, out = self.kv_rank + self.rope_dim, heads * self.value_dim
        q_inputs = self.q_rank or width
        # A product with a split matrix reads its rows twice; see `parted`. The choice there
        # depends on the tokens of a batch, here on those of one sequence.
        reads = {rows: rows * (2 if length >= rows else 1) for rows in (q_inputs, self.kv_rank)}
        projections = Cost(
            "attention",
            flops=2 * (width * (self.q_rank + latent + out) + q_inputs * q
                       + self.kv_rank * keys_values),
            saved=Bytes(2 * (self.q_rank + latent) * size, (2 * q + 2 * out) * size),
            saved_dots=Bytes((width + self.q_rank + latent) * size, (q + keys_values) * size),
            traffic=Bytes(
                (2 * width + reads[q_inputs] + width * bool(self.q_rank) + self.q_rank + latent
                 + reads[self.kv_rank]) * size,
                (q + keys_values + out) * size,
            ),
            sums=width * size,
        )  # fmt: skip
        scores = scores_cost(
            self.kernel, dtype=dtype, length=length, heads=heads, kv_heads=heads,
            dims=(self.head_dim, self.value_dim),
        )  # fmt: skip
        return (projections, scores)

    def decode_flops(self, dims: Dims, length: int, dtype: str) -> float:
        """See `Part`: by `absorb`, where a score is over the latent and rotary dims."""
        projections, _ = self.costs(dims, length, dtype)
        return projections.flops + 2 * length * self.num_heads * (2 * self.kv_rank + self.rope_dim)

    def resolved(self, dtype: str, in_prefix: bool = False) -> Part:
        """See `Part`: the kernel."""
        dims = (self.head_dim, self.value_dim)
        task = Task(Rules(causal=True), dims, dtype, in_prefix=in_prefix)
        return dataclasses.replace(self, kernel=chosen(self.kernel, task))

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """See `Part`: a head is not split; every device has the latents."""
        check_divides(self.specs(dims), run)
        require(
            self.num_heads % run.shards["heads"] == 0,
            "mesh.tensor must divide the heads (num_heads)",
            f"tensor={run.shards['heads']}, {self.num_heads} heads",
            "Change one of them",
        )


def absorb(
    nope_BLND: jax.Array,
    rope_BLND: jax.Array,
    latent_BTF: jax.Array,
    key_BTD: jax.Array,
    heads_FND: jax.Array,
    seen_B1LT: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention in the space of the latent: all heads read one key and one value per token.

    A score q . (c W) is (q W^T) . c, and a mean of values c W is W applied to the mean of c.

    Args:
      nope_BLND: queries without positions.
      rope_BLND: rotary parts of queries, rotated.
      latent_BTF: c.
      key_BTD: rotary keys, rotated.
      heads_FND: W of keys, then W of values, on the last dim.
      seen_B1LT: bool; the keys that a query sees.
      scale: of the scores.

    Returns:
      [B, L, N, value_dim].
    """
    keys_FND, values_FNV = jnp.split(heads_FND, (nope_BLND.shape[-1],), axis=-1)
    in_latent_BLNF = jnp.einsum("BLND,FND->BLNF", nope_BLND, keys_FND)
    q = jnp.concatenate([in_latent_BLNF, rope_BLND], axis=-1)
    k = jnp.concatenate([latent_BTF, key_BTD], axis=-1)
    mean_BLNF = attend(q, k[:, :, None], latent_BTF[:, :, None], seen_B1LT, scale=scale)
    return jnp.einsum("BLNF,FNV->BLNV", mean_BLNF, values_FNV)
