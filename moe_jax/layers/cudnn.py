"""Attention on an NVIDIA GPU by cuDNN (legend: `moe_jax.moe`; T counts keys).

Scores stay on the chip. A mask separates documents. cuDNN reads it as a bias of scores and writes
its gradient: two arrays [B, 1, L, T] in the compute dtype, shared by all heads.
"""

import jax
import jax.numpy as jnp

from moe_jax.layers.masks import Rules, Tokens, visible

DTYPES = ("bfloat16", "float16")


def cudnn(
    q_BLND: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    queries: Tokens,
    keys: Tokens | None,
    sink_N: None,
    *,
    rules: Rules,
    scale: float,
) -> jax.Array:
    """Attention on one device, [B, L, N, V]; arguments are those of `attend_by_rules`.

    Values with fewer dims than keys are padded with zeros.
    """
    dim = v_BTKV.shape[-1]
    more = k_BTKD.shape[-1] - dim
    v_BTKD = jnp.pad(v_BTKV, [(0, 0)] * 3 + [(0, more)]) if more else v_BTKV
    out_BLND: jax.Array = jax.nn.dot_product_attention(
        q_BLND, k_BTKD, v_BTKD,
        mask=visible(rules, queries, keys),
        scale=scale,
        # So that cuDNN skips blocks; a causal query never sees a later place.
        is_causal=rules.causal and keys is None,
        implementation="cudnn",
    )  # fmt: skip
    return out_BLND[..., :dim]


def version() -> int | None:
    """The cuDNN that JAX finds, such as 92800; 0: none; None: JAX has no plugin for NVIDIA GPUs."""
    from jax._src.lib import cuda_versions  # private; jax.nn.dot_product_attention reads it

    if cuda_versions is None:
        return None
    try:
        return int(cuda_versions.cudnn_get_version())
    except RuntimeError:
        return 0


def largest_dim() -> int:
    """The largest head dim that JAX accepts for cuDNN on the local GPU."""
    if jax.default_backend() != "gpu":
        return 128
    capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
    return 256 if float(capability) >= 9 else 128
