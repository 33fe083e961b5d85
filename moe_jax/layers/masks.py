"""Which keys a query sees (legend: `moe_jax.moe`; T counts keys)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_DOCUMENT = -1  # of tokens that pad a row


class Rules(NamedTuple):
    """Which keys of its own document a query sees: keys that satisfy every rule.

    Rules compare positions, not places in a row. So a document gives the same result with padding
    on either side, packed with others, or with its keys in a cache. A causal query also never sees
    a later place of its own row, so positions that restart within a document leak nothing.

    Attributes:
      causal: a key j is seen by queries i >= j.
      window: W; i - W < j: W keys in a causal stack, including the query's own. Without `causal`,
        also j < i + W: W - 1 keys on either side.
      chunk: C; i // C == j // C (Llama 4).
    """

    causal: bool
    window: int | None = None
    chunk: int | None = None


class Tokens(NamedTuple):
    """Positions and documents of queries or keys.

    Attributes:
      positions_BL: int32, positions of the tokens in their documents.
      segments_BL: int32, documents of the tokens. A query sees only keys of its own document; a
        query of padding (0) sees padding.
      in_prefix_BL: bool, tokens that earlier tokens see in spite of `Rules.causal`; None: no token.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array
    in_prefix_BL: jax.Array | None = None


def visible(rules: Rules, queries: Tokens, keys: Tokens | None = None) -> jax.Array:
    """Which keys each query sees.

    Args:
      rules: a seen key satisfies all of them.
      queries: L tokens.
      keys: T tokens; None: the queries.

    Returns:
      bool [B, 1, L, T].
    """
    own_keys, keys = keys is None, keys or queries
    i, j = queries.positions_BL[:, None, :, None], keys.positions_BL[:, None, None, :]
    seen_B1LT = queries.segments_BL[:, None, :, None] == keys.segments_BL[:, None, None, :]
    if rules.causal:
        before_B1LT = j <= i
        if own_keys:
            before_B1LT &= jnp.tri(queries.positions_BL.shape[1], dtype=jnp.bool_)
        if keys.in_prefix_BL is not None:
            before_B1LT |= keys.in_prefix_BL[:, None, None, :]
        seen_B1LT &= before_B1LT
    if rules.window is not None:
        seen_B1LT &= i - rules.window < j
        if not rules.causal:
            seen_B1LT &= j < i + rules.window
    if rules.chunk is not None:
        seen_B1LT &= i // rules.chunk == j // rules.chunk
    return seen_B1LT


def by_place(rules: Rules, tokens: Tokens) -> tuple[Rules, jax.Array]:
    """The same rules about places in the row, for tokens whose positions count up.

    The distance of two tokens of a document is then the same in places and in positions, so causal
    and window hold for places. Each chunk becomes a document, since chunks begin with the document
    and not with the row. The chunk length bounds the window.

    Args:
      rules: about positions.
      tokens: positions in a document grow by one from place to place.

    Returns:
      Rules without `chunk`, and the documents, int32 [B, L].
    """
    chunk = rules.chunk
    if chunk is None:
        return rules, tokens.segments_BL
    # A row has at most `count` chunks of a document, so modulo `count` their numbers differ.
    count = -(-tokens.segments_BL.shape[1] // chunk) + 1
    documents_BL = tokens.segments_BL * count + tokens.positions_BL // chunk % count
    window = chunk if rules.window is None else min(rules.window, chunk)
    return rules._replace(window=window, chunk=None), documents_BL


def filled(x: jax.Array, block: int, value: int) -> jax.Array:
    """[B, L, ...] whose second dim is padded to whole blocks."""
    more = -x.shape[1] % block
    widths = [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value) if more else x
