"""Attention on a TPU by the splash kernel of JAX (legend: `moe_jax.moe`; T counts keys).

It iterates over blocks of queries and keys, and keeps only the maximum and the sum of a row of
scores. Blocks that the static rules leave empty cost nothing. Documents are separated in a block.

Source: FlashAttention, Dao et al. 2022, arXiv:2205.14135; jax.experimental.pallas.ops.tpu.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from moe_jax.layers.attention_kernels import RESIDUALS
from moe_jax.layers.masks import NO_DOCUMENT, Rules, Tokens, by_place, filled

LANES = 128  # the size of a block is a multiple of this
BLOCKS = (512, 256, 128)


def splash(
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

    Rows are padded to whole blocks with tokens of no document. With `interpret`, the kernel runs in
    the Pallas interpreter.
    """
    length, dtype = q_BLND.shape[1], q_BLND.dtype
    rules, documents_BL = by_place(rules, queries)
    key_documents_BT = documents_BL if keys is None else keys.segments_BL
    q_BNLD, k_BKTD, v_BKTV = (
        jnp.moveaxis(filled(x, LANES, 0), 1, 2)
        for x in ((q_BLND * scale).astype(dtype), k_BTKD, v_BTKV)
    )
    documents_BL, key_documents_BT = (
        filled(x, LANES, NO_DOCUMENT) for x in (documents_BL, key_documents_BT)
    )
    mask = mask_of(rules, q_BNLD.shape[2], k_BKTD.shape[2])
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * q_BNLD.shape[1]),
        block_sizes=block_sizes(*mask.shape),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def of_row(q: Any, k: Any, v: Any, queries: Any, keys: Any) -> jax.Array:
        ids = kernels.SegmentIds(queries, keys)
        out: jax.Array = kernel(q, k, v, segment_ids=ids, sinks=sink_N)
        return out

    out_BNLV = jax.vmap(of_row)(q_BNLD, k_BKTD, v_BKTV, documents_BL, key_documents_BT)
    return jnp.moveaxis(out_BNLV, 1, 2)[:, :length].astype(dtype)


def mask_of(rules: Rules, length: int, key_length: int) -> Any:
    """The mask that the kernel computes itself and uses to skip blocks."""
    shape, window = (length, key_length), rules.window
    if window is not None and window < key_length:
        return masks.LocalMask(shape, (window - 1, 0 if rules.causal else window - 1), 0)
    return masks.CausalMask(shape) if rules.causal else masks.FullMask(shape)


def block_sizes(length: int, key_length: int) -> Any:
    """Sizes of blocks of queries and keys: the largest of `BLOCKS` that divide the lengths.

    Separate kernels compute the gradients of queries and of keys. The fused kernel writes a
    gradient of the queries for every block of keys, which is quadratic in the length.
    """
    q, kv = (next(size for size in BLOCKS if one % size == 0) for one in (length, key_length))
    return kernels.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
