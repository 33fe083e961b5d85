"""The cache in which attention keeps earlier tokens (legend: `moe_jax.moe`; T counts slots).

The second dim of every array is slots, filled from the first. In addition to what a part keeps of
a token, `positions` [B, T] holds its position, or -1 for an empty slot or padding. Masks depend
only on these positions. A row is one document.

Tokens are taken back by overwriting. The next call of a row begins in the slot of the first token
taken back and has enough tokens to overwrite all of them. Until then no query comes after them.

Attention with a window uses a ring buffer: place p of a row is in slot p modulo T.
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
SPARE = 8  # slots of a ring beyond its span; see `write`


def slots(
    batch: int, length: int, span: int | None = None, **kept: tuple[tuple[int, ...], Axes]
) -> dict[str, Any]:
    """The specs of a cache.

    Args:
      batch: B.
      length: tokens of a row.
      span: number of tokens that a query sees, itself included; None: all of the row.
      **kept: shape and axes of what is kept of a token, by name.

    Returns:
      Each array in float32 [B, T, ...], and `positions` [B, T]; T is `length`, or less in a ring.
      The caller may allocate the arrays in another float dtype, which `write` preserves.
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
      call: of L tokens. Without a ring, `cache_index` + L is at most T. With a ring, L is at most
        `SPARE` + 1, except in a prefill. All tokens except the first may be taken back.
      **kept: [B, L, ...], by name.

    Raises:
      ValueError: the call has no `cache_index`.
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
    """[B, T, ...] with [B, L, ...] written from slot `index`."""
    return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)


def put_in_ring(old: jax.Array, new: jax.Array, index: Any, *, prefill: bool) -> jax.Array:
    """[B, T, ...] in which the newest of [B, L, ...] replace the oldest slots."""
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
    """`put` with a separate index for each row, [B]."""

    def put_one(old: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
        return put(old[None], new[None], index)[0]

    return jax.vmap(put_one)


def cache_tokens(cache: Any, call: Call) -> tuple[Tokens, Tokens]:
    """The tokens of a call as queries and the slots of a cache as keys, all of document 1.

    Args:
      cache: after `write` of this call.
      call: its positions continue those of the row. Padding is document 0.
    """
    assert call.positions_BL is not None and call.segments_BL is not None, "with_defaults"
    positions_BT = cache["positions"]
    queries_BL, keys_BT = (
        one.astype(jnp.int32) for one in (call.segments_BL > 0, positions_BT >= 0)
    )
    return Tokens(call.positions_BL, queries_BL), Tokens(positions_BT, keys_BT)
