"""Which keys a query sees (legend: `moe_jax.moe`; T counts keys)."""

import jax
import jax.numpy as jnp


def visible(
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    key_positions_BT: jax.Array | None = None,
    key_segments_BT: jax.Array | None = None,
    *,
    causal: bool,
    window: int | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """Which keys each query sees: those that keep to every rule given.

    The rules speak of positions, never of places in a row. So a document gives the same under
    padding on either side, packed with others, or with its keys in a cache. Among keys of its own
    row a causal query sees no later place, too: positions that restart within a document leak
    nothing.

    Args:
      positions_BL: int32, of the queries in their documents.
      segments_BL: int32, the documents of the queries. A query sees keys of its own alone; a query
        of padding (0) sees padding.
      key_positions_BT: of the keys; None: as the queries.
      key_segments_BT: of the keys; None: as the queries.
      causal: a key j is seen by queries i >= j.
      window: W; i - W < j, which is W keys in a causal stack, the query's own among them. Without
        `causal` also j < i + W: W - 1 keys on either side.
      chunk: C; i // C == j // C (Llama 4).

    Returns:
      bool [B, 1, L, T].
    """
    own_keys = key_positions_BT is None
    key_positions_BT = positions_BL if key_positions_BT is None else key_positions_BT
    key_segments_BT = segments_BL if key_segments_BT is None else key_segments_BT
    i, j = positions_BL[:, None, :, None], key_positions_BT[:, None, None, :]
    seen_B1LT = segments_BL[:, None, :, None] == key_segments_BT[:, None, None, :]
    if causal:
        seen_B1LT &= j <= i
    if causal and own_keys:
        seen_B1LT &= jnp.tri(positions_BL.shape[1], dtype=jnp.bool_)
    if window is not None:
        seen_B1LT &= i - window < j
        if not causal:
            seen_B1LT &= j < i + window
    if chunk is not None:
        seen_B1LT &= i // chunk == j // chunk
    return seen_B1LT
