"""From logits to tokens: tables worked by hand, transformers, and frequencies of drawn tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference.sampling import Sampling, draw, filtered

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS_BV = jnp.log(jnp.array([PROBS]))


def kept(logits_BV=LOGITS_BV, seen_BV=None, **settings):
    """The probabilities left by the filters, in percent."""
    logits_BV = filtered(logits_BV, seen_BV, Sampling(**{"temperature": 1.0, **settings}))
    return np.round(100 * jax.nn.softmax(logits_BV[0])).astype(int).tolist()


def test_a_temperature_that_float32_cannot_divide_by_is_refused():
    """By 1e-6 the likeliest token is left; the logits are of a sure model."""
    assert kept(1000 * LOGITS_BV, temperature=1e-6) == [100, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"temperature=1e-40\. Use 0 for the likeliest token"):
        Sampling(temperature=1e-40)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [40, 30, 15, 10, 5]),
        ({"top_k": 2}, [57, 43, 0, 0, 0]),
        ({"top_k": 9}, [40, 30, 15, 10, 5]),
        ({"top_p": 0.69}, [57, 43, 0, 0, 0]),
        ({"top_p": 0.71}, [47, 35, 18, 0, 0]),  # the first two sum to 0.7, so one more stays
        ({"top_p": 1e-6}, [100, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [47, 35, 18, 0, 0]),  # at least 0.12
        ({"min_p": 1.0}, [100, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [56, 32, 8, 4, 1]),  # squared probabilities
        ({"top_k": 3, "top_p": 0.5}, [57, 43, 0, 0, 0]),  # top_p sees 47, 35, 18
    ],
)
def test_filters_leave(settings, expected):
    assert kept(**settings) == expected


def test_the_filters_do_not_depend_on_the_order_of_ids():
    order = np.array([3, 0, 4, 2, 1])
    for settings in ({"top_k": 2}, {"top_p": 0.71}, {"min_p": 0.3}):
        shuffled = kept(LOGITS_BV[:, order], **settings)
        assert shuffled == [kept(**settings)[i] for i in order]


def test_a_penalty_makes_what_was_seen_less_likely_on_either_side_of_0():
    """Logits 2 and -2 at a penalty of 2 become 1 and -4."""
    logits_BV = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen_BV = jnp.array([[True, True, False, False]])
    got = filtered(logits_BV, seen_BV, Sampling(temperature=1.0, repetition_penalty=2.0))
    np.testing.assert_allclose(got, [[1.0, -4.0, 2.0, -2.0]])
    greedy = Sampling(repetition_penalty=2.0)
    assert draw(logits_BV, seen_BV, jax.random.split(jax.random.key(0), 1), greedy).tolist() == [2]


def test_tokens_are_drawn_as_often_as_their_probability():
    """20,000 rows: the standard deviation of a share is at most 0.0035."""
    rows = 20_000
    keys = jax.random.split(jax.random.key(0), rows)
    logits_BV = jnp.broadcast_to(LOGITS_BV, (rows, len(PROBS)))
    tokens = draw(logits_BV, None, keys, Sampling(temperature=1.0))
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / rows, PROBS, atol=0.014)
    tokens = draw(logits_BV, None, keys, Sampling(temperature=1.0, top_k=2))
    expected = [4 / 7, 3 / 7, 0, 0, 0]
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / rows, expected, atol=0.014)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_filters_are_those_of_transformers(seed):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    random = np.random.RandomState(seed)
    logits_BV = random.normal(0, 3, (4, 50)).astype(np.float32)
    ids_BL = random.randint(0, 50, (4, 12))
    chain = [
        process.RepetitionPenaltyLogitsProcessor(1.3), process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(20), process.TopPLogitsWarper(0.9), process.MinPLogitsWarper(0.05),
    ]  # fmt: skip
    expected = torch.tensor(logits_BV)
    for one in chain:
        expected = one(torch.tensor(ids_BL), expected)
    seen_BV = np.zeros((4, 50), bool)
    seen_BV[np.arange(4)[:, None], ids_BL] = True
    settings = {"repetition_penalty": 1.3, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    got = filtered(jnp.array(logits_BV), jnp.array(seen_BV), Sampling(**settings, min_p=0.05))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5)
