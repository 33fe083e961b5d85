"""The cache of what attention keeps of earlier tokens (legend: `moe_jax.moe`; T counts slots).

Every array has slots on its second dim, filled from the first on, as many in every row. Beside what
a part keeps of a token stands its position in `positions` [B, T], -1 in a slot that is empty or has
padding. Masks come from these positions alone. A row has one document.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.layers.masks import Rules, Tokens, visible
from moe_jax.parameters import Axes, ParameterSpec, zeros
from moe_jax.part import Call

EMPTY = -1


def slots(batch: int, length: int, **kept: tuple[tuple[int, ...], Axes]) -> dict[str, Any]:
    """The specs of a cache.

    Args:
      batch: B.
      length: T, slots of a row.
      **kept: the shape and the axes of what a token leaves behind, by name.

    Returns:
      Each in float32 [B, T, ...], and `positions` [B, T]. Whoever makes the arrays may choose
      another float dtype, in which they are then kept.
    """
    specs = {
        name: ParameterSpec(
            (batch, length, *shape), ("batch", None, *axes), zeros, "cache", decays=False
        )
        for name, (shape, axes) in kept.items()
    }
    specs["positions"] = ParameterSpec(
        (batch, length), ("batch", None), no_positions, "cache", decays=False, dtype=jnp.int32
    )
    return specs


def no_positions(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The initializer of `positions` [B, T]."""
    del key
    return jnp.full(shape, EMPTY, dtype)


def write(cache: Any, call: Call, **kept: jax.Array) -> dict[str, jax.Array]:
    """The cache with the tokens of a call in the slots from `call.cache_index` on.

    Args:
      cache: as `slots` declares it.
      call: of L tokens; `cache_index` + L is at most T.
      **kept: [B, L, ...], by name.

    Raises:
      ValueError: the call does not say where it writes.
    """
    index: Any = call.cache_index
    require(
        index is not None,
        "a call with a cache of attention must say how many of its slots are filled",
        "cache_index=None",
        "Set Call.cache_index, to 0 for an empty cache",
    )
    assert call.positions_BL is not None and call.segments_BL is not None, "with_defaults"
    kept["positions"] = jnp.where(call.segments_BL > 0, call.positions_BL, EMPTY)
    return {
        name: jax.lax.dynamic_update_slice_in_dim(
            cache[name], new.astype(cache[name].dtype), index, axis=1
        )
        for name, new in kept.items()
    }


def visible_slots(cache: Any, call: Call, rules: Rules) -> jax.Array:
    """The slots that each token of a call sees: bool [B, 1, L, T].

    Args:
      cache: with the call's own tokens.
      call: its positions continue those of the row.
      rules: of what a query sees.
    """
    assert call.positions_BL is not None and call.segments_BL is not None, "with_defaults"
    positions_BT = cache["positions"]
    # The one document of a row is 1, padding 0.
    queries_BL, keys_BT = (
        one.astype(jnp.int32) for one in (call.segments_BL > 0, positions_BT >= 0)
    )
    return visible(rules, Tokens(call.positions_BL, queries_BL), Tokens(positions_BT, keys_BT))
