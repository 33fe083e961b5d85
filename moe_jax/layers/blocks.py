"""Attention in blocks of queries, in plain JAX (legend: `moe_jax.moe`; T counts keys, G is N / K).

The scores of a block stay in the CPU cache and are not kept for the backward pass. A causal block
skips the keys after it. Based on FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithms 1
and 4), but only queries are split into blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.layers.attention_kernels import RESIDUALS
from moe_jax.layers.masks import Rules, Tokens, visible

MIN_QUERIES = 64  # of a block
MAX_BLOCKS = 8  # of a row, as each is compiled
UNSEEN = float(jnp.finfo(jnp.float32).min) / 2


class How(NamedTuple):
    """Settings that all blocks share.

    Attributes:
      rules: which keys of its own document a query sees.
      scale: of the dot products.
      softcap: c of c tanh(score / c), or None.
    """

    rules: Rules
    scale: float
    softcap: float | None


def attend_in_blocks(
    q_BLND: jax.Array,
    k_BLKD: jax.Array,
    v_BLKV: jax.Array,
    tokens: Tokens,
    sink_N: jax.Array | None,
    *,
    rules: Rules,
    contiguous: bool,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Attention among the tokens of a row, [B, L, N, V]; see `attend_by_rules`."""
    batch, length, heads, _ = q_BLND.shape
    kv_heads = k_BLKD.shape[2]
    q_BKGLD = jnp.moveaxis(q_BLND.reshape(batch, length, kv_heads, -1, q_BLND.shape[-1]), 1, 3)
    k_BKLD, v_BKLV = (jnp.moveaxis(x, 1, 2) for x in (k_BLKD, v_BLKV))
    sink_KG = None if sink_N is None else sink_N.astype(jnp.float32).reshape(kv_heads, -1)
    how, size, outputs = How(rules, scale, softcap), block_size(length), []
    for start in range(0, length, size):
        queries = slice(start, min(start + size, length))
        keys = keys_of(queries, length, rules, contiguous)
        outputs.append(
            block(
                q_BKGLD[:, :, :, queries], k_BKLD[:, :, keys], v_BKLV[:, :, keys], sink_KG,
                tokens, (queries.start, queries.stop), (keys.start, keys.stop), how,
            )
        )  # fmt: skip
    out_BKGLV = jnp.concatenate(outputs, axis=3)
    return jnp.moveaxis(out_BKGLV, 3, 1).reshape(batch, length, heads, -1)


def block_size(length: int) -> int:
    """Queries per block."""
    return max(MIN_QUERIES, -(-length // MAX_BLOCKS))


def keys_of(queries: slice, length: int, rules: Rules, contiguous: bool) -> slice:
    """The places of all keys that any query of a block can see."""
    end = queries.stop if rules.causal else length
    if rules.window is None or not contiguous:
        return slice(0, end)
    behind = end if rules.causal else min(length, queries.stop + rules.window - 1)
    return slice(max(0, queries.start - rules.window + 1), behind)


def seen_by(tokens: Tokens, queries: slice, keys: slice, rules: Rules) -> jax.Array:
    """Which keys the queries of a block see, bool [B, 1, 1, l, t]."""
    assert tokens.in_prefix_BL is None, "the kernel lacks it"
    of_queries, of_keys = (
        Tokens(tokens.positions_BL[:, where], tokens.segments_BL[:, where])
        for where in (queries, keys)
    )
    seen_B1LT = visible(rules, of_queries, of_keys)
    if rules.causal:  # never a later place, whatever the positions
        places_L, places_T = (jnp.arange(where.start, where.stop) for where in (queries, keys))
        seen_B1LT &= places_T <= places_L[:, None]
    return seen_B1LT[:, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def block(
    q_BKGLD: jax.Array,
    k_BKTD: jax.Array,
    v_BKTV: jax.Array,
    sink_KG: jax.Array | None,
    tokens: Tokens,
    queries: tuple[int, int],
    keys: tuple[int, int],
    how: How,
) -> jax.Array:
    """The output of one block of queries, [B, K, G, l, V], from the keys that it can see.

    Args:
      q_BKGLD: the queries.
      k_BKTD: the keys.
      v_BKTV: their values.
      sink_KG: scores that appear only in the denominator, or None.
      tokens: of the whole row.
      queries: the places of the queries as (start, stop).
      keys: the places of the keys as (start, stop).
      how: see `How`.
    """
    return _forward(q_BKGLD, k_BKTD, v_BKTV, sink_KG, tokens, queries, keys, how)[0]


def scores(
    q_BKGLD: jax.Array, k_BKTD: jax.Array, tokens: Tokens, queries: Any, keys: Any, how: How
) -> tuple[jax.Array, jax.Array]:
    """Scores in float32, `UNSEEN` for unseen keys, and the mask of seen keys."""
    found = jnp.einsum("BKGLD,BKTD->BKGLT", q_BKGLD, k_BKTD, preferred_element_type=jnp.float32)
    found *= how.scale
    if how.softcap is not None:
        found = how.softcap * jnp.tanh(found / how.softcap)
    seen = seen_by(tokens, slice(*queries), slice(*keys), how.rules)
    return jnp.where(seen, found, UNSEEN), seen


def _forward(
    q_BKGLD: jax.Array,
    k_BKTD: jax.Array,
    v_BKTV: jax.Array,
    sink_KG: jax.Array | None,
    tokens: Tokens,
    queries: tuple[int, int],
    keys: tuple[int, int],
    how: How,
) -> tuple[jax.Array, Any]:
    found, _ = scores(q_BKGLD, k_BKTD, tokens, queries, keys, how)
    largest = jnp.max(found, axis=-1, keepdims=True)
    if sink_KG is not None:
        largest = jnp.maximum(largest, sink_KG[:, :, None, None])
    weights = jnp.exp(found - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink_KG is not None:
        total += jnp.exp(sink_KG[:, :, None, None] - largest)
    sums = jnp.einsum(
        "BKGLT,BKTV->BKGLV", weights.astype(v_BKTV.dtype), v_BKTV,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    out = checkpoint_name((sums / total).astype(v_BKTV.dtype), RESIDUALS)
    log_sums = checkpoint_name(largest + jnp.log(total), RESIDUALS)
    return out, (q_BKGLD, k_BKTD, v_BKTV, sink_KG, tokens, out, log_sums)


def _backward(
    queries: tuple[int, int], keys: tuple[int, int], how: How, kept: Any, dout: jax.Array
) -> tuple[Any, ...]:
    q_BKGLD, k_BKTD, v_BKTV, sink_KG, tokens, out, log_sums = kept
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    found, seen = scores(q_BKGLD, k_BKTD, tokens, queries, keys, how)
    weights = jnp.where(seen, jnp.exp(found - log_sums), 0)
    dv = product("BKGLT,BKGLV->BKTV", weights.astype(dout.dtype), dout)
    dweights = product("BKGLV,BKTV->BKGLT", dout, v_BKTV)
    mean = jnp.sum(dout.astype(jnp.float32) * out, axis=-1, keepdims=True)
    dfound = weights * (dweights - mean)
    if how.softcap is not None:
        dfound *= 1 - jnp.square(jnp.where(seen, found, 0) / how.softcap)
    dfound = (dfound * how.scale).astype(q_BKGLD.dtype)
    dq = product("BKGLT,BKTD->BKGLD", dfound, k_BKTD)
    dk = product("BKGLT,BKGLD->BKTD", dfound, q_BKGLD)
    dsink = None
    if sink_KG is not None:
        of_sink = jnp.exp(sink_KG[:, :, None, None] - log_sums)
        dsink = -jnp.sum(of_sink * mean, axis=(0, 3, 4))
    gradients = (d.astype(x.dtype) for d, x in ((dq, q_BKGLD), (dk, k_BKTD), (dv, v_BKTV)))
    return (*gradients, dsink, None)


block.defvjp(_forward, _backward)
