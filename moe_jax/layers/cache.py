"""The cache of what attention keeps of earlier tokens (legend: `moe_jax.moe`; T counts slots).

Every array has slots on its second dim, filled from the first on. Beside what a part keeps of a
token stands its position in `positions` [B, T], -1 in a slot that is empty or has padding. Masks
come from these positions alone. A row has one document.

Tokens are taken back by writing over them: the next call of a row begins in the slot of the first
one, and its own tokens reach as far. Until then no query stands behind them.

Attention to a window keeps a ring: the place p of a row is in slot p modulo T.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.layers.masks import Tokens
from moe_jax.parameters import Axes, ParameterSpec, zeros
from moe_jax.part import Call

EMPTY = -1
SPARE = 8  # slots of a ring beyond its span: so many tokens may come at once


def slots(
    batch: int, length: int, span: int | None = None, **kept: tuple[tuple[int, ...], Axes]
) -> dict[str, Any]:
    """The specs of a cache.

    Args:
      batch: B.
      length: tokens of a row.
      span: how far back a query sees, itself included; None: all of the row.
      **kept: the shape and the axes of what a token leaves behind, by name.

    Returns:
      Each in float32 [B, T, ...], and `positions` [B, T]; T is `length`, or less in a ring. Whoever
      makes the arrays may choose another float dtype, in which they are then kept.
    """
    if span is not None:
        length = min(length, span + SPARE)
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
      call: of L tokens. Without a ring `cache_index` + L is at most T; with one, L is at most
        `SPARE` + 1, except in a prefill. Of L tokens all but the first may be taken back.
      **kept: [B, L, ...], by name.

    Raises:
      ValueError: the call does not say where it writes.
    """
    require(
        call.cache_index is not None,
        "a call with a cache of attention must say how many of its slots are filled",
        "cache_index=None",
        "Set Call.cache_index, to 0 for an empty cache",
    )
    assert call.positions_BL is not None and call.segments_BL is not None, "with_defaults"
    kept["positions"] = jnp.where(call.segments_BL > 0, call.positions_BL, EMPTY)
    num_slots = cache["positions"].shape[1]
    is_ring = call.cache_length is not None and num_slots < call.cache_length
    put = functools.partial(put_in_ring, prefill=call.prefill) if is_ring else put_behind
    index: Any = call.cache_index
    if jnp.ndim(index):
        put = in_each_row(put)
    return {
        name: put(cache[name], new.astype(cache[name].dtype), index) for name, new in kept.items()
    }


def put_behind(old: jax.Array, new: jax.Array, index: Any) -> jax.Array:
    """[B, T, ...] with [B, L, ...] behind what is there."""
    return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)


def put_in_ring(old: jax.Array, new: jax.Array, index: Any, *, prefill: bool) -> jax.Array:
    """[B, T, ...] with the newest of [B, L, ...] in the place of the oldest."""
    num_slots, length = old.shape[1], new.shape[1]
    if length == 1:
        return jax.lax.dynamic_update_slice_in_dim(old, new, index % num_slots, axis=1)
    if prefill and length >= num_slots:
        return jnp.roll(new[:, -num_slots:], length % num_slots, axis=1)
    assert prefill or length <= SPARE + 1, "tokens of a call would lose what they still see"
    which_T = (jnp.arange(num_slots) - index) % num_slots
    taken = jnp.take(new, jnp.minimum(which_T, length - 1), axis=1)
    is_new_T = (which_T < length).reshape(1, -1, *(1,) * (old.ndim - 2))
    return jnp.where(is_new_T, taken, old)


def in_each_row(put: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`put` with an index of its own in each row, [B]."""

    def put_one(old: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
        return put(old[None], new[None], index)[0]

    return jax.vmap(put_one)


def in_one_document(cache: Any, call: Call) -> tuple[Tokens, Tokens]:
    """The tokens of a call as queries, and the slots of a cache as keys: of one document, 1.

    Args:
      cache: with the call's own tokens.
      call: its positions continue those of the row; padding is 0.
    """
    assert call.positions_BL is not None and call.segments_BL is not None, "with_defaults"
    positions_BT = cache["positions"]
    queries_BL, keys_BT = (
        one.astype(jnp.int32) for one in (call.segments_BL > 0, positions_BT >= 0)
    )
    return Tokens(call.positions_BL, queries_BL), Tokens(positions_BT, keys_BT)
