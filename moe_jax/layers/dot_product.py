"""Attention as pure functions of queries, keys and values (legend: `moe_jax.moe`).

T counts keys, K key and value heads; query head n reads key head n // (N / K). G is N / K,
V the dim of a value.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.check import require


class Prefix(NamedTuple):
    """Learned keys and values that every query sees (prefix tuning).

    Attributes:
      keys_PKD: P keys, used as they are.
      values_PKV: their values.
    """

    keys_PKD: jax.Array
    values_PKV: jax.Array

    def before(
        self,
        k_BTKD: jax.Array,
        v_BTKV: jax.Array,
        seen_B1LT: jax.Array,
        bias_BNLT: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """The arguments of `attend` with P + T keys; the bias of the prefix is 0."""
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(own, (len(x), *own.shape)).astype(x.dtype), x], 1)
            for own, x in ((self.keys_PKD, k_BTKD), (self.values_PKV, v_BTKV))
        )
        before = ((0, 0), (0, 0), (0, 0), (len(self.keys_PKD), 0))
        if bias_BNLT is not None:
            bias_BNLT = jnp.pad(bias_BNLT, before)
        return keys, values, jnp.pad(seen_B1LT, before, constant_values=True), bias_BNLT


def attend(
    q_BLND: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    seen_B1LT: jax.Array,
    *,
    scale: float,
    bias_BNLT: jax.Array | None = None,
    softcap: float | None = None,
    sink_N: jax.Array | None = None,
) -> jax.Array:
    """Means of values, weighted by the softmax of the scores of seen keys.

    A score is scale * q . k, which is capped before the bias is added. Scores are float32; the
    weights of values are rounded to the dtype of the keys.

    Args:
      q_BLND: queries.
      k_BTKD: keys.
      v_BTKV: values, whose dim may differ from that of the keys.
      seen_B1LT: bool, as `masks.visible` returns. A query that sees no key gets a mean of some
        keys' values, or 0 if heads have sinks.
      scale: of the dot products.
      bias_BNLT: [1 or B, N, L, T], added to scores.
      softcap: c; scores become c tanh(score / c) (Grok-1; Gemma 2, arXiv:2408.00118, eq. 1).
      sink_N: a score per head that appears only in the denominator (gpt-oss).

    Returns:
      [B, L, N, V] in the dtype of the values.
    """
    if bias_BNLT is not None:
        heads = q_BLND.shape[2]
        require(
            bias_BNLT.ndim == 4 and bias_BNLT.shape[1] == heads,
            "a bias of scores must have the shape [1 or batch, heads, queries, keys]",
            f"{bias_BNLT.shape}, {heads} heads",
            "Give the part that computes it as many heads",
        )
    if softcap is None and sink_N is None and v_BTKV.shape[-1] == k_BTKD.shape[-1]:
        return jax.nn.dot_product_attention(
            q_BLND, k_BTKD, v_BTKV, bias_BNLT, seen_B1LT, scale=scale
        )
    batch, length, heads, dim = q_BLND.shape
    q_BLKGD = q_BLND.reshape(batch, length, k_BTKD.shape[2], -1, dim)
    scores = scale * jnp.einsum(
        "BLKGD,BTKD->BKGLT", q_BLKGD, k_BTKD, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias_BNLT is not None:
        scores += bias_BNLT.reshape(-1, *scores.shape[1:])
    scores = jnp.where(seen_B1LT[:, :, None], scores, jnp.finfo(jnp.float32).min / 2)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    if sink_N is not None:
        sink_KG11 = sink_N.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
        total = jnp.logaddexp(total, sink_KG11)
    weights = jnp.exp(scores - total).astype(k_BTKD.dtype)
    out = jnp.einsum("BKGLT,BTKV->BLKGV", weights, v_BTKV)
    return out.reshape(batch, length, heads, -1)
