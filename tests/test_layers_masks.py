"""Which keys a query sees, as tables: one row per query, one column per key, 1 if seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.masks import Rules, Tokens, by_place, visible


def table(positions, segments=None, **rules):
    positions = jnp.asarray([positions], jnp.int32)
    segments = jnp.ones_like(positions) if segments is None else jnp.asarray([segments], jnp.int32)
    seen = visible(Rules(**rules), Tokens(positions, segments))
    assert seen.dtype == bool and seen.shape == (1, 1, positions.size, positions.size)
    return ["".join(str(int(one)) for one in row) for row in np.asarray(seen[0, 0])]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"causal": False}, ["11111", "11111", "11111", "11111", "11111"]),
        ({"causal": True}, ["10000", "11000", "11100", "11110", "11111"]),
        # The query's own key and the previous one.
        ({"causal": True, "window": 2}, ["10000", "11000", "01100", "00110", "00011"]),
        ({"causal": True, "window": 1}, ["10000", "01000", "00100", "00010", "00001"]),
        # In an encoder: one key on either side.
        ({"causal": False, "window": 2}, ["11000", "11100", "01110", "00111", "00011"]),
        ({"causal": True, "chunk": 3}, ["10000", "11000", "11100", "00010", "00011"]),
        ({"causal": False, "chunk": 3}, ["11100", "11100", "11100", "00011", "00011"]),
        # Both rules apply.
        ({"causal": True, "chunk": 3, "window": 2}, ["10000", "11000", "01100", "00010", "00011"]),
    ],
)
def test_rules(rules, expected):
    assert table(range(5), **rules) == expected


@pytest.mark.parametrize("rule", [{}, {"window": 2}, {"chunk": 2}])
def test_documents_of_a_row_see_what_they_see_alone(rule):
    """Three tokens, then four, then padding; chunks start with the document."""
    row = table([0, 1, 2, 0, 1, 2, 3, 0], [1, 1, 1, 2, 2, 2, 2, 0], causal=True, **rule)
    first, second = (table(range(n), causal=True, **rule) for n in (3, 4))
    assert [line[:3] for line in row[:3]] == first
    assert [line[3:7] for line in row[3:7]] == second
    seen = sum(line.count("1") for line in row)
    assert seen == sum(line.count("1") for line in first + second) + 1, "nothing across documents"


@pytest.mark.parametrize("rule", [{}, {"window": 2}, {"chunk": 2}])
def test_padding_on_the_left_changes_nothing(rule):
    row = table([0, 0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 1, 1, 1], causal=True, **rule)
    assert [line[3:] for line in row[3:]] == table(range(4), causal=True, **rule)
    # Positions count real tokens. Chunks by place in the row would start elsewhere.
    if "chunk" in rule:
        by_place = table(range(7), [0, 0, 0, 1, 1, 1, 1], causal=True, **rule)
        assert by_place != row


def test_every_query_sees_a_key_so_that_no_softmax_is_of_nothing():
    random = np.random.default_rng(0)
    for _ in range(20):
        segments = np.sort(random.integers(0, 4, 9))
        positions = random.integers(-1, 9, 9)
        seen = table(positions, segments, causal=True, window=1, chunk=2)
        assert all(line[i] == "1" for i, line in enumerate(seen))


def test_keys_of_a_cache_are_seen_by_their_positions():
    """Two rows with 4 and 2 cached tokens and one new token each; an empty slot has no document."""
    seen = visible(
        Rules(causal=True, window=3),
        Tokens(jnp.array([[4], [2]]), jnp.array([[1], [1]])),
        Tokens(
            jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]),
            jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        ),
    )
    assert seen[:, 0, 0].astype(int).tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", [{}, {"window": 2}, {"chunk": 2}, {"chunk": 3, "window": 2}])
def test_rules_about_places_are_those_about_positions_that_count_up(rule, causal):
    """Documents that are packed, padded on either side, or start in the middle of their text."""
    segments = jnp.array(
        [[1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1], [3, 3, 0, 1, 1, 1, 1, 1]]
    )
    positions = jnp.array(
        [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 3, 4, 5], [7, 8, 0, 3, 4, 5, 6, 7]]
    )
    rules, tokens = Rules(causal, **rule), Tokens(positions, segments)
    places = jnp.broadcast_to(jnp.arange(8), (3, 8))
    plain, documents = by_place(rules, tokens)
    assert plain.chunk is None
    real = (segments > 0)[:, None, :, None] & (segments > 0)[:, None, None, :]
    by_positions = visible(rules, tokens) & real
    by_places = visible(plain, Tokens(places, documents)) & real
    assert (by_places == by_positions).all()
    # This fails if positions restart within a document, so kernels must not receive such a call.
    odd = tokens._replace(positions_BL=positions.at[0, 6].set(0))
    plain, documents = by_place(rules, odd)
    if causal or rule:
        same = visible(plain, Tokens(places, documents)) == visible(rules, odd)
        assert not (same | ~real).all()
