"""The cost of scores and weighted values, by kernel (see `costs.Cost`)."""

import jax.numpy as jnp

from moe_jax.costs import FLOAT32, Bytes, Cost


def scores_cost(
    kernel: str,
    *,
    dtype: str,
    length: int,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    share: float = 1.0,
    is_capped: bool = False,
) -> Cost:
    """The cost of a token: FLOPs of the whole L x T rectangle by any kernel.

    xla saves a row of probabilities per head, in float32 and in `dtype`. With a cap it also saves
    a row of hyperbolic tangents in float32. Other kernels save the logarithm of a row's sum; in
    main memory they access only queries, keys, values and outputs. Remat "dots" keeps their output
    and these logarithms. cudnn also reads a row of a mask and writes its gradient.

    Args:
      kernel: one of `attention_kernels.KERNELS`; an unresolved "auto" counts as "xla".
      dtype: of activations.
      length: T, number of keys.
      heads: N.
      kv_heads: key and value heads.
      dims: of a key and of a value, per head.
      share: keys per query, T / L.
      is_capped: whether scores are capped.
    """
    size, probs = jnp.dtype(dtype).itemsize, heads * length
    flops = 2 * length * heads * sum(dims)
    if kernel in ("auto", "xla"):
        rounded = size if size != FLOAT32 else 0
        return Cost(
            "attention",
            flops=flops,
            batched=True,
            saved=Bytes(split=probs * (FLOAT32 + rounded + FLOAT32 * is_capped)),
            largest=Bytes(split=probs * FLOAT32),
            traffic=Bytes(split=2 * probs * FLOAT32),
        )
    mask = length * size if kernel == "cudnn" else 0
    sums, rows = heads * FLOAT32, (heads + share * kv_heads) * sum(dims) * size
    return Cost(
        "attention",
        flops=flops,
        saved=Bytes(mask, sums),
        saved_dots=Bytes(split=heads * dims[1] * size + sums),
        largest=Bytes(mask),
        traffic=Bytes(mask, rows),
    )
