"""Attention on a GPU by our own Pallas Triton kernels (legend: `moe_jax.moe`; T counts keys).

A program processes a block of queries of one head, or a block of keys in the backward pass for
keys. It iterates over the blocks of the other side that the rules leave. Documents are separated
in a block, so no array has the shape [L, T].

Source: FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_jax.layers.attention_kernels import RESIDUALS
from moe_jax.layers.masks import NO_DOCUMENT, Rules, Tokens, by_place, filled

UNSEEN = -1e30  # a score whose exponential is 0; finite, so that no row is nan


def bound(number: int) -> Any:
    """A loop bound, which may be traced."""
    return jnp.int32(number)


class Kernel(NamedTuple):
    """Settings that all programs of a call share.

    Attributes:
      rules: about places in the row, without chunks.
      scale: of the scores.
      softcap: of the scores, or None.
      block: queries, and keys, per block.
      interpret: whether to run in the Pallas interpreter.
    """

    rules: Rules
    scale: float
    softcap: float | None
    block: int
    interpret: bool

    def scores(self, q: Any, k: Any, documents: Any, first: Any, first_key: Any) -> tuple[Any, Any]:
        """Scores of a block in float32 and, with a cap, its derivative; else None.

        Args:
          q: [block, D].
          k: [block, D].
          documents: of the queries and of the keys.
          first: the place of the first query.
          first_key: the place of the first key.
        """
        scores = self.scale * product(q, k.T)
        slope = None
        if self.softcap is not None:
            tanh = jnp.tanh(scores / self.softcap)
            scores, slope = self.softcap * tanh, 1 - tanh * tanh
        seen = documents[0][:, None] == documents[1][None, :]
        apart = (
            first - first_key + (jnp.arange(self.block)[:, None] - jnp.arange(self.block)[None, :])
        )
        if self.rules.causal:
            seen &= apart >= 0
        if self.rules.window is not None:
            seen &= apart < self.rules.window
            if not self.rules.causal:
                seen &= apart > -self.rules.window
        return jnp.where(seen, scores, UNSEEN), slope

    def key_blocks(self, number: Any, count: int) -> tuple[Any, Any]:
        """The blocks of keys that a block of queries sees, as (start, stop)."""
        first, last = bound(0), bound(count)
        if self.rules.window is not None:
            first = self.block_of(number * self.block - self.rules.window + 1)
            if not self.rules.causal:
                end = number * self.block + self.block + self.rules.window - 2
                last = jnp.minimum(self.block_of(end) + 1, count)
        return first, (number + 1 if self.rules.causal else last)

    def query_blocks(self, number: Any, count: int) -> tuple[Any, Any]:
        """The blocks of queries that see a block of keys, as (start, stop)."""
        first, last = bound(0), bound(count)
        if self.rules.window is not None:
            end = number * self.block + self.block + self.rules.window - 2
            last = jnp.minimum(self.block_of(end) + 1, count)
            if not self.rules.causal:
                first = self.block_of(number * self.block - self.rules.window + 1)
        return (number if self.rules.causal else first), last

    def block_of(self, place: Any) -> Any:
        """The block of a place; 0 for places before the row."""
        return jax.lax.div(jnp.maximum(place, 0), jnp.int32(self.block))


def product(a: Any, b: Any) -> Any:
    """A product of blocks, accumulated in float32; float32 inputs do not use TF32."""
    return triton.dot(a, b, allow_tf32=False if a.dtype == jnp.float32 else None)


def forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, ids_ref: Any, key_ids_ref: Any, out_ref: Any, sum_ref: Any,
    *, kernel: Kernel,
) -> None:  # fmt: skip
    """The output of a block of queries, and the logarithm of the sum of every row."""
    number, block = pl.program_id(0), kernel.block
    q, ids = q_ref[...], ids_ref[...]

    def body(j: Any, carry: Any) -> Any:
        out, top, total = carry
        at = pl.ds(j * block, block)
        documents = (ids, key_ids_ref[at])
        scores, _ = kernel.scores(q, k_ref[at, :], documents, number * block, j * block)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, factor = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        v = v_ref[at, :]
        out = out * factor[:, None] + product(weights.astype(v.dtype), v)
        return out, new_top, total * factor + jnp.sum(weights, axis=1)

    start = (
        jnp.zeros(out_ref.shape, jnp.float32),
        jnp.full(block, UNSEEN, jnp.float32),
        jnp.zeros(block, jnp.float32),
    )
    blocks = kernel.key_blocks(number, key_ids_ref.shape[0] // block)
    out, top, total = jax.lax.fori_loop(*blocks, body, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    sum_ref[...] = top + jnp.log(total)


def query_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, ids_ref: Any, key_ids_ref: Any, dout_ref: Any, sum_ref: Any,
    delta_ref: Any, dq_ref: Any, *, kernel: Kernel,
) -> None:  # fmt: skip
    """The gradient of a block of queries."""
    number, block = pl.program_id(0), kernel.block
    q, ids, dout = q_ref[...], ids_ref[...], dout_ref[...]
    total, delta = sum_ref[...][:, None], delta_ref[...][:, None]

    def body(j: Any, dq: Any) -> Any:
        at = pl.ds(j * block, block)
        k, documents = k_ref[at, :], (ids, key_ids_ref[at])
        scores, slope = kernel.scores(q, k, documents, number * block, j * block)
        dscores = jnp.exp(scores - total) * (product(dout, v_ref[at, :].T) - delta)
        dscores = dscores if slope is None else dscores * slope
        return dq + product(dscores.astype(k.dtype), k)

    blocks = kernel.key_blocks(number, key_ids_ref.shape[0] // block)
    dq = jax.lax.fori_loop(*blocks, body, jnp.zeros(dq_ref.shape, jnp.float32))
    dq_ref[...] = (kernel.scale * dq).astype(dq_ref.dtype)


def key_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, ids_ref: Any, key_ids_ref: Any, dout_ref: Any, sum_ref: Any,
    delta_ref: Any, dk_ref: Any, dv_ref: Any, *, kernel: Kernel,
) -> None:  # fmt: skip
    """The gradients of a block of keys and values from one query head."""
    number, block = pl.program_id(0), kernel.block
    k, v, ids = k_ref[...], v_ref[...], key_ids_ref[...]

    def body(i: Any, carry: Any) -> Any:
        dk, dv = carry
        at = pl.ds(i * block, block)
        q, dout, documents = q_ref[at, :], dout_ref[at, :], (ids_ref[at], ids)
        scores, slope = kernel.scores(q, k, documents, i * block, number * block)
        weights = jnp.exp(scores - sum_ref[at][:, None])
        dv += product(weights.T.astype(dout.dtype), dout)
        dscores = weights * (product(dout, v.T) - delta_ref[at][:, None])
        dscores = dscores if slope is None else dscores * slope
        return dk + product(dscores.T.astype(q.dtype), q), dv

    blocks = kernel.query_blocks(number, ids_ref.shape[0] // block)
    start = (jnp.zeros(dk_ref.shape, jnp.float32), jnp.zeros(dv_ref.shape, jnp.float32))
    dk, dv = jax.lax.fori_loop(*blocks, body, start)
    dk_ref[...] = (kernel.scale * dk).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


class Layout(NamedTuple):
    """How programs, numbered by block, row and head, find their blocks in arrays.

    Attributes:
      kernel: of the call.
      group: G, query heads per key head.
    """

    kernel: Kernel
    group: int

    def heads(self, x: Any, *, whole: bool, shared: bool) -> Any:
        """Blocks of [B, L, N, D]: part or `whole` of L, of the query head or its `shared` one."""
        rows, group = x.shape[1] if whole else self.kernel.block, self.group if shared else 1

        def index(i: Any, b: Any, n: Any) -> tuple[Any, ...]:
            head = n if group == 1 else jax.lax.div(n, jnp.int32(group))
            return b, 0 if whole else i, head, 0

        return pl.BlockSpec((None, rows, None, x.shape[3]), index)

    def tokens(self, x: jax.Array, *, whole: bool) -> Any:
        """Blocks of [B, L]: part or `whole` of L."""
        rows = x.shape[1] if whole else self.kernel.block
        return pl.BlockSpec((None, rows), lambda i, b, n: (b, 0 if whole else i))

    def sums(self, x: Any, *, whole: bool) -> Any:
        """Blocks of [B, N, L]: part or `whole` of L."""
        rows = x.shape[2] if whole else self.kernel.block
        return pl.BlockSpec((None, None, rows), lambda i, b, n: (b, n, 0 if whole else i))

    def call(self, body: Any, length: int, inputs: Any, specs: Any, outputs: Any, to: Any) -> Any:
        """Runs a kernel on every block of the length, row and query head."""
        batch, heads = inputs[0].shape[0], inputs[0].shape[2]
        return pl.pallas_call(
            functools.partial(body, kernel=self.kernel),
            grid=(length // self.kernel.block, batch, heads),
            in_specs=specs,
            out_specs=to,
            out_shape=outputs,
            compiler_params=triton.CompilerParams(
                num_warps=4 if inputs[0].shape[3] <= 64 else 8, num_stages=2
            ),
            interpret=self.kernel.interpret,
            name=f"flash_attention_{body.__name__}",
        )(*inputs)


def forward(
    q_BLND: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    ids_BL: jax.Array,
    key_ids_BT: jax.Array,
    kernel: Kernel,
) -> tuple[jax.Array, jax.Array]:
    """Attention on arrays of whole blocks.

    Returns:
      [B, L, N, V], and the logarithms of sums of exponentials of scores, float32 [B, N, L].
    """
    batch, length, heads = q_BLND.shape[:3]
    layout = Layout(kernel, heads // k_BTKD.shape[2])
    out = jax.ShapeDtypeStruct((batch, length, heads, v_BTKV.shape[3]), q_BLND.dtype)
    sums = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    out_BLNV, sum_BNL = layout.call(
        forward_kernel, length, (q_BLND, k_BTKD, v_BTKV, ids_BL, key_ids_BT),
        [layout.heads(q_BLND, whole=False, shared=False),
         layout.heads(k_BTKD, whole=True, shared=True),
         layout.heads(v_BTKV, whole=True, shared=True),
         layout.tokens(ids_BL, whole=False), layout.tokens(key_ids_BT, whole=True)],
        [out, sums],
        [layout.heads(out, whole=False, shared=False), layout.sums(sums, whole=False)],
    )  # fmt: skip
    return (
        checkpoint_name(out_BLNV, RESIDUALS),
        checkpoint_name(sum_BNL, RESIDUALS),
    )


flash = jax.custom_vjp(forward, nondiff_argnums=(5,))


def _flash_forward(*args: Any) -> Any:
    out_BLNV, sum_BNL = forward(*args)
    return (out_BLNV, sum_BNL), (*args[:5], out_BLNV, sum_BNL)


def _flash_backward(kernel: Kernel, residuals: Any, cotangents: Any) -> Any:
    q_BLND, k_BTKD, v_BTKV, ids_BL, key_ids_BT, out_BLNV, sum_BNL = residuals
    dout_BLNV, dsum_BNL = cotangents
    group = q_BLND.shape[2] // k_BTKD.shape[2]
    layout = Layout(kernel, group)
    products = out_BLNV.astype(jnp.float32) * dout_BLNV.astype(jnp.float32)
    # The gradient of a sum reaches the scores by their weights, as `delta` does.
    delta_BNL = jnp.moveaxis(jnp.sum(products, axis=-1), 2, 1) - dsum_BNL
    inputs = (q_BLND, k_BTKD, v_BTKV, ids_BL, key_ids_BT, dout_BLNV, sum_BNL, delta_BNL)

    def specs(queries: bool, keys: bool) -> list[Any]:
        """Block specs; `queries` and `keys`: whether a program reads all of them."""
        return [
            layout.heads(q_BLND, whole=queries, shared=False),
            layout.heads(k_BTKD, whole=keys, shared=True),
            layout.heads(v_BTKV, whole=keys, shared=True),
            layout.tokens(ids_BL, whole=queries), layout.tokens(key_ids_BT, whole=keys),
            layout.heads(dout_BLNV, whole=queries, shared=False),
            layout.sums(sum_BNL, whole=queries), layout.sums(delta_BNL, whole=queries),
        ]  # fmt: skip

    (dq_BLND,) = layout.call(
        query_kernel, q_BLND.shape[1], inputs, specs(False, True),
        [jax.ShapeDtypeStruct(q_BLND.shape, q_BLND.dtype)],
        [layout.heads(q_BLND, whole=False, shared=False)],
    )  # fmt: skip
    # A gradient for each query head that reads a key head, then the sum of these gradients.
    dtype = k_BTKD.dtype if group == 1 else jnp.float32
    gradients = [
        jax.ShapeDtypeStruct((*x.shape[:2], q_BLND.shape[2], x.shape[3]), dtype)
        for x in (k_BTKD, v_BTKV)
    ]
    dk, dv = (
        jnp.sum(x.reshape(*x.shape[:2], -1, group, x.shape[3]), axis=3).astype(k_BTKD.dtype)
        for x in layout.call(
            key_kernel, k_BTKD.shape[1], inputs, specs(True, False), gradients,
            [layout.heads(x, whole=False, shared=False) for x in gradients],
        )
    )  # fmt: skip
    return dq_BLND, dk, dv, None, None


flash.defvjp(_flash_forward, _flash_backward)


def flash_attention(
    q_BLND: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    queries: Tokens,
    keys: Tokens | None,
    sink_N: jax.Array | None,
    *,
    rules: Rules,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Attention on one device, [B, L, N, V]; arguments are those of `attend_by_rules`.

    Rows are padded to whole blocks with tokens of no document, and head dims to powers of two with
    zeros. With `interpret`, the kernels run in the Pallas interpreter.
    """
    rules, documents_BL = by_place(rules, queries)
    key_documents_BT = documents_BL if keys is None else keys.segments_BL
    (length, dim), largest = (q_BLND.shape[1], v_BTKV.shape[-1]), q_BLND.shape[-1]
    kernel = Kernel(rules, scale, softcap, block_size(max(largest, dim), q_BLND.dtype), interpret)
    arrays = [whole_dims(filled(x, kernel.block, 0)) for x in (q_BLND, k_BTKD, v_BTKV)]
    ids = [filled(x, kernel.block, NO_DOCUMENT) for x in (documents_BL, key_documents_BT)]
    out_BLNV, sum_BNL = flash(*arrays, *ids, kernel)
    out_BLNV, sum_BNL = out_BLNV[:, :length, :, :dim], sum_BNL[..., :length]
    if sink_N is None:
        return out_BLNV
    # The factor by which a sink, another term of the sum, shrinks the output.
    kept_BNL = jax.nn.sigmoid(sum_BNL - sink_N.astype(jnp.float32)[:, None])
    return (out_BLNV * jnp.moveaxis(kept_BNL, 1, 2)[..., None]).astype(q_BLND.dtype)


def block_size(dim: int, dtype: Any) -> int:
    """Queries and keys per block, so that a few blocks fit a multiprocessor's memory."""
    return 64 if dim * jnp.dtype(dtype).itemsize <= 256 else 32


def whole_dims(x: jax.Array) -> jax.Array:
    """[..., D] with D padded to a power of two, at least 16."""
    more = max(pl.next_power_of_2(x.shape[-1]), 16) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) if more else x
