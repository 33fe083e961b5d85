"""Mamba: a selective state space as a mixer of tokens (legend: `moe_jax.moe`)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.settings import setting
from moe_jax.costs import FLOAT32, Bytes, Cost
from moe_jax.layers.attention import affine
from moe_jax.layers.norms import RMSNorm
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import (
    Axes,
    Initializer,
    ParameterSpec,
    dense,
    linear,
    ones,
    scaled_init,
    zeros,
)
from moe_jax.part import Call, Dims, Output, Own, Part

SMALLEST_STEP, LARGEST_STEP = 1e-3, 0.1  # of the recurrence, at initialization


@dataclasses.dataclass(frozen=True)
class Mamba(Part):
    """Mamba-1: a causal convolution, then a linear recurrence with token-dependent coefficients.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t + D x_t, for each of the H inner
    features with a state of Z numbers; y is gated by silu(z). A document starts from h = 0, and its
    convolution sees no other document. Padding is before the first or after the last token of a
    document, and does not change the state.

    A cache continues a row at the token where the last call stopped. Equal numbers in
    `segments_BL` of two calls mean the same document.

    Source: Gu and Dao 2023, arXiv:2312.00752, alg. 2; norms: Lieber et al. 2024, Jamba,
      arXiv:2403.19887.
    """

    expand: int = setting(2, at_least=1)  # inner features / model_dim
    state_dim: int = setting(16, at_least=1)  # Z: numbers in the state of an inner feature
    conv_kernel: int = setting(4, at_least=2)  # W: tokens that the convolution sees
    dt_rank: int = setting(0, at_least=0)  # rank of the projection to dt; 0: ceil(model_dim / 16)
    conv_bias: bool = True  # a bias in the convolution
    use_bias: bool = False  # biases in the input and output projections
    inner_norms: bool = False  # RMSNorm of dt, B and C (Jamba)
    norm_epsilon: float = setting(1e-6, above=0)  # of inner_norms
    # Tokens whose states are in memory at one time; the backward pass recomputes them.
    chunk_size: int = setting(32, at_least=1, changes_results=False)
    init_scale: float = setting(1.0, above=0)  # variance of weights x fan-in

    def sizes(self, dims: Dims) -> tuple[int, int]:
        """The number of inner features, and the rank of dt."""
        return self.expand * dims.model_dim, self.dt_rank or math.ceil(dims.model_dim / 16)

    def specs(self, dims: Dims) -> dict[str, Any]:
        """The parameters.

        `wx`, `wz` [M, H], `wo` [H, M], their biases `bx`, `bz`, `bo`; `conv` [W, H], whose last tap
        is for the current token, `conv_bias`; `x_proj` [H, R + 2 Z] to dt, B and C, their norms
        `dt_norm`, `b_norm`, `c_norm`; `dt_proj` [R, H], `dt_bias`; `a_log` [H, Z], `d` [H].
        """
        inner, rank = self.sizes(dims)
        model, state, taps = dims.model_dim, self.state_dim, self.conv_kernel

        def matrix(rows: int, cols: int, axes: Axes, init: Initializer) -> ParameterSpec:
            return ParameterSpec((rows, cols), axes, init, "mamba")

        def vector(size: int, axis: str, init: Initializer) -> ParameterSpec:
            return ParameterSpec((size,), (axis,), init, "mamba", decays=False)

        inward = matrix(model, inner, ("model", "hidden"), scaled_init(self.init_scale, model))
        outer = scaled_init(self.init_scale, inner)
        # An optimizer of matrices treats the taps as vectors.
        conv = matrix(taps, inner, (None, "hidden"), uniform_init(taps**-0.5))
        conv = dataclasses.replace(conv, num_stacked=1)
        a_log = ParameterSpec((inner, state), ("hidden", None), log_range, "mamba", decays=False)
        specs: dict[str, Any] = {
            "wx": inward,
            "wz": inward,
            "wo": matrix(inner, model, ("hidden", "model"), outer),
            "conv": conv,
            "x_proj": matrix(inner, rank + 2 * state, ("hidden", None), outer),
            "dt_proj": matrix(rank, inner, (None, "hidden"), uniform_init(rank**-0.5)),
            "dt_bias": vector(inner, "hidden", step_bias),
            "a_log": a_log,
            "d": vector(inner, "hidden", ones),
        }
        if self.conv_bias:
            specs["conv_bias"] = vector(inner, "hidden", zeros)
        if self.use_bias:
            specs["bx"] = specs["bz"] = vector(inner, "hidden", zeros)
            specs["bo"] = vector(model, "model", zeros)
        if self.inner_norms:
            norm = RMSNorm(self.norm_epsilon)
            specs["dt_norm"] = norm.specs(rank, "mamba")
            specs["b_norm"] = specs["c_norm"] = norm.specs(state, "mamba")
        return specs

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """See `Part`: the same for any length.

        `inputs` [B, W - 1, H], the last inputs of the convolution, and their `segments` [B, W - 1],
        0 if there was no token; `state` [B, H, Z].
        """
        inner, past = self.sizes(dims)[0], self.conv_kernel - 1

        def spec(
            shape: tuple[int, ...], axes: Axes, dtype: Any, component: str = "cache"
        ) -> ParameterSpec:
            return ParameterSpec(shape, axes, zeros, component, decays=False, dtype=dtype)

        state = (batch, inner, self.state_dim)
        return {
            "inputs": spec((batch, past, inner), ("batch", None, "hidden"), jnp.float32),
            "segments": spec((batch, past), ("batch", None), jnp.int32),
            # Float32, since it sums over a whole text.
            "state": spec(state, ("batch", "hidden", None), jnp.float32, "state"),
        }

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`."""
        return False

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """See `Part`."""
        assert call.segments_BL is not None, "with_defaults"
        valid_BL1 = (call.segments_BL > 0)[..., None]
        x_BLH, z_BLH = (
            constrain(affine(x_BLM, params, name), "batch", None, "hidden") for name in "xz"
        )
        cache = own.cache or jax.tree.map(
            lambda spec: constrain(jnp.zeros(spec.shape, spec.dtype), *spec.axes),
            self.cache_specs(Dims(x_BLM.shape[-1]), x_BLM.shape[0], 0),
        )
        # The last W - 1 tokens, then the new tokens.
        inputs = jnp.concatenate([cache["inputs"].astype(x_BLH.dtype), x_BLH], axis=1)
        segments = jnp.concatenate([cache["segments"], call.segments_BL], axis=1)

        bias = params.get("conv_bias", jnp.zeros(()))
        x_BLH = causal_convolution(inputs, segments, dense(params["conv"]), dense(bias))
        dt_BLH, b_BLZ, c_BLZ = self.coefficients(params, x_BLH)
        # A step of 0 does not change the state.
        dt_BLH = steps(dt_BLH, dense(params["dt_bias"])) * valid_BL1
        starts_BL = (call.segments_BL != segments[:, self.conv_kernel - 2 : -1]) & valid_BL1[..., 0]
        a_HZ = -jnp.exp(dense(params["a_log"]).astype(jnp.float32))
        state_BHZ = cache["state"].astype(jnp.float32)
        y_BLH, state_BHZ = selective_scan(
            x_BLH, dt_BLH, a_HZ, b_BLZ, c_BLZ, starts_BL, state_BHZ, self.chunk_size
        )
        y_BLH = skip_and_gate(y_BLH, x_BLH, z_BLH, dense(params["d"]))
        y_BLM = affine(constrain(y_BLH, "batch", None, "hidden"), params, "o")
        if own.cache is None:
            return y_BLM, None, None
        new = last_inputs(inputs, segments, self.conv_kernel - 1) | {"state": state_BHZ}
        return y_BLM, None, jax.tree.map(lambda a, old: a.astype(old.dtype), new, cache)

    def coefficients(self, params: Any, x_BLH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dt_BLH before `steps`, b_BLZ and c_BLZ, for every token."""
        chosen = linear(x_BLH, params["x_proj"])
        rank = chosen.shape[-1] - 2 * self.state_dim
        dt_BLR, b_BLZ, c_BLZ = jnp.split(chosen, (rank, rank + self.state_dim), axis=-1)
        if self.inner_norms:
            norm = RMSNorm(self.norm_epsilon)
            dt_BLR = norm.apply(params["dt_norm"], dt_BLR)
            b_BLZ = norm.apply(params["b_norm"], b_BLZ)
            c_BLZ = norm.apply(params["c_norm"], c_BLZ)
        return linear(dt_BLR, params["dt_proj"]), b_BLZ, c_BLZ

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: projections, then the convolution and the scan, which have no matmuls.

        A scan step costs 8 FLOPs for each of H x Z states: a product and an exponential for the
        decay, two products for the added term, two multiply-adds. Saved are x before and after the
        convolution and in chunks, z, dt before softplus and the gated output, in `dtype`; dt and y
        in float32; and one state per chunk.
        """
        size, (inner, rank) = jnp.dtype(dtype).itemsize, self.sizes(dims)
        model, chosen = dims.model_dim, rank + 2 * self.state_dim
        states = inner * self.state_dim
        chunk = min(self.chunk_size, length)
        projections = Cost(
            "other",
            flops=2 * inner * (3 * model + chosen + rank),
            saved=Bytes((chosen + 2 * self.state_dim) * size, 6 * inner * size),
            saved_dots=Bytes((model + chosen) * size, 3 * inner * size),
            traffic=Bytes((3 * model + chosen + rank) * size, 5 * inner * size),
            sums=(model + chosen) * size,
        )
        scan = Cost(
            "other",
            flops=2 * self.conv_kernel * inner + 8 * states,
            batched=True,
            saved=Bytes(split=(2 * inner + states / chunk) * FLOAT32),
            largest=Bytes(split=max(inner, states * chunk / length) * FLOAT32),
            traffic=Bytes(2 * self.state_dim * size, inner * (2 * FLOAT32 + size)),
        )
        return (projections, scan)


# Functions of single features are checkpointed: they are cheap to recompute, and their residuals
# are as large as the inner features.


@jax.checkpoint
def causal_convolution(
    inputs: jax.Array, segments: jax.Array, taps_WH: jax.Array, bias: jax.Array
) -> jax.Array:
    """A depthwise convolution over the tokens of a document, then silu.

    Args:
      inputs: [B, W - 1 + L, H]; the first W - 1 are those before the first token.
      segments: int32 [B, W - 1 + L], the documents of the inputs.
      taps_WH: the last tap is for the current token.
      bias: [H], or a scalar.

    Returns:
      x_BLH in the dtype of the inputs, 0 for padding; computed in float32.
    """
    num_taps, length = taps_WH.shape[0], inputs.shape[1] - taps_WH.shape[0] + 1
    current = segments[:, num_taps - 1 :]
    total: Any = bias
    for tap in range(num_taps):
        same = segments[:, tap : tap + length] == current
        seen = inputs[:, tap : tap + length].astype(jnp.float32) * taps_WH[tap]
        total += jnp.where(same[..., None], seen, 0)
    return jnp.where(current[..., None] > 0, jax.nn.silu(total), 0).astype(inputs.dtype)


@jax.checkpoint
def steps(dt_BLH: jax.Array, bias_H: jax.Array) -> jax.Array:
    """softplus(dt + bias) in float32."""
    return jax.nn.softplus(dt_BLH.astype(jnp.float32) + bias_H)


@jax.checkpoint
def skip_and_gate(
    y_BLH: jax.Array, x_BLH: jax.Array, z_BLH: jax.Array, d_H: jax.Array
) -> jax.Array:
    """(y + d x) silu(z), computed in float32, in the dtype of x."""
    y_BLH = y_BLH + d_H * x_BLH.astype(jnp.float32)
    return (y_BLH * jax.nn.silu(z_BLH.astype(jnp.float32))).astype(x_BLH.dtype)


def last_inputs(inputs: jax.Array, segments: jax.Array, count: int) -> dict[str, jax.Array]:
    """The last `count` inputs up to the last token of a row that is not padding."""
    length = segments.shape[1] - count
    place_L = jnp.arange(1, length + 1)
    ends_B = jnp.max(jnp.where(segments[:, count:] > 0, place_L, 0), axis=1)
    cut = jax.vmap(lambda row, end: jax.lax.dynamic_slice_in_dim(row, end, count))
    return {"inputs": cut(inputs, ends_B), "segments": cut(segments, ends_B)}


def selective_scan(
    x_BLH: jax.Array,
    dt_BLH: jax.Array,
    a_HZ: jax.Array,
    b_BLZ: jax.Array,
    c_BLZ: jax.Array,
    starts_BL: jax.Array,
    state_BHZ: jax.Array,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes h = exp(dt a) h + dt b x, y = c h over tokens, in float32.

    Chunks run one after another, the tokens of a chunk in parallel. The backward pass keeps one
    state per chunk and recomputes the states inside a chunk.

    Args:
      x_BLH: inputs of any float dtype.
      dt_BLH: steps, at least 0.
      a_HZ: rates, below 0.
      b_BLZ: input coefficients, of any float dtype.
      c_BLZ: output coefficients, of any float dtype.
      starts_BL: whether a token starts from h = 0.
      state_BHZ: h before the first token.
      chunk_size: tokens per chunk.

    Returns:
      y_BLH, and h after the last token.
    """
    batch, length = starts_BL.shape
    size = min(chunk_size, length)
    num_chunks = -(-length // size)

    def chunked(a: jax.Array) -> jax.Array:
        # Padded tokens have a step of 0, which does not change the state.
        a = jnp.pad(a, ((0, 0), (0, num_chunks * size - length)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, num_chunks, size, *a.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(state_BHZ: jax.Array, tokens: Any) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c, starts = tokens
        x, b, c = (a.astype(jnp.float32) for a in (x, b, c))
        decay = jnp.exp(dt[..., None] * a_HZ)
        decay = jnp.where(starts[..., None, None], 0, decay)
        added = (dt * x)[..., None] * b[:, :, None]
        decay, states = jax.lax.associative_scan(follow, (decay, added), axis=1)
        states += decay * state_BHZ[:, None]
        return states[:, -1], jnp.einsum("BLHZ,BLZ->BLH", states, c)

    tokens = tuple(map(chunked, (x_BLH, dt_BLH, b_BLZ, c_BLZ, starts_BL)))
    state_BHZ, y = jax.lax.scan(run, state_BHZ, tokens)
    y_BLH = jnp.moveaxis(y, 0, 1).reshape(batch, num_chunks * size, -1)
    return y_BLH[:, :length], state_BHZ


def follow(one: Any, other: Any) -> Any:
    """The decay and the state of two consecutive spans of tokens."""
    return one[0] * other[0], one[1] * other[0] + other[1]


def uniform_init(bound: float) -> Initializer:
    """Uniform in [-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def log_range(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Log of 1, 2, ..., Z in every row: the initial decays of S4D-real (arXiv:2206.11893)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def step_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Biases whose softplus is log-uniform in [SMALLEST_STEP, LARGEST_STEP]."""
    low, high = math.log(SMALLEST_STEP), math.log(LARGEST_STEP)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))
