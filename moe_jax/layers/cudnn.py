"""Attention on an NVIDIA GPU by cuDNN (legend: `moe_jax.moe`; T counts keys).

Scores stay on the chip. Documents are told apart by a mask, which cuDNN reads as a bias of scores
and whose gradient it writes: two arrays [B, 1, L, T] in the compute dtype, of all heads together.
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
    """Attention of one device, [B, L, N, V]; arguments are those of `attend_by_rules`.

    Values of fewer dims than keys are filled up by zeros.
    """
    dim = v_BTKV.shape[-1]
    more = k_BTKD.shape[-1] - dim
    v_BTKD = jnp.pad(v_BTKV, [(0, 0)] * 3 + [(0, more)]) if more else v_BTKV
    out_BLND: jax.Array = jax.nn.dot_product_attention(
        q_BLND, k_BTKD, v_BTKD,
        mask=visible(rules, queries, keys),
        scale=scale,
        # So that it leaves out blocks; a causal query sees no later place by any positions.
        is_causal=rules.causal and keys is None,
        implementation="cudnn",
    )  # fmt: skip
    return out_BLND[..., :dim]


def version() -> int | None:
    """The cuDNN that JAX finds, such as 92800; 0: none; None: JAX has no plugin for NVIDIA GPUs."""
    from jax._src.lib import cuda_versions  # not public; what jax.nn.dot_product_attention asks

    if cuda_versions is None:
        return None
    try:
        return int(cuda_versions.cudnn_get_version())
    except RuntimeError:
        return 0


def largest_dim() -> int:
    """The largest dim of a head that JAX lets it compute on the GPU that is here."""
    if jax.default_backend() != "gpu":
        return 128
    capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
    return 256 if float(capability) >= 9 else 128
