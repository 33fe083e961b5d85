"""Whole experts dropped from the choices of a training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.noise import draw_allowed
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice
from tests.test_moe_routing import indices, route_logits

DRAWS = 2000


def drawn(rate, num_options=6, num_selected=2):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(
        jax.vmap(lambda key: draw_allowed(key, rate, num_options, num_selected))(keys)
    )


def test_an_expert_is_dropped_with_its_probability():
    dropped_E = 1 - drawn(0.2).mean(axis=0)
    # The mean of 2,000 draws is within 4 standard deviations. Fewer than two of six experts are
    # left in 0.2 % of draws.
    np.testing.assert_allclose(dropped_E, 0.2, atol=4 * (0.2 * 0.8 / DRAWS) ** 0.5 + 0.002)


@pytest.mark.parametrize("num_selected", [1, 2, 5, 6])
def test_k_experts_are_left_however_many_are_dropped(num_selected):
    left = drawn(0.999, 6, num_selected).sum(axis=-1)
    assert left.min() == num_selected and np.median(left) == num_selected


LOGITS = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)


def test_no_token_chooses_a_dropped_expert_and_the_others_keep_their_order():
    key, router = jax.random.key(3), TokenChoice(renormalize=True)
    dropping = dataclasses.replace(router, drop_rate=0.5)
    allowed = np.asarray(draw_allowed(key, 0.5, 8, 2))
    assert 2 <= allowed.sum() < 8
    with_bias = {"bias_E": jnp.zeros(8)}
    for more in ({}, with_bias):
        routing, full = (
            route_logits(LOGITS, 2, one, rng=key, **more) for one in (dropping, router)
        )
        assert allowed[np.asarray(routing.expert_index_GSK)].all()
        expected = np.argsort(-np.where(allowed, LOGITS, -np.inf), axis=-1)[:, :2]
        assert indices(routing) == expected.tolist()
        # Losses and gates use the probabilities over all experts, dropped ones included.
        np.testing.assert_array_equal(routing.probs_GSE, full.probs_GSE)


def test_an_evaluation_drops_none():
    dropping, plain = (route_logits(LOGITS, 2, TokenChoice(drop_rate=rate)) for rate in (0.9, 0.0))
    assert indices(dropping) == indices(plain)


def test_it_goes_with_a_selection_bias_and_not_with_groups():
    MoE(bias=SignUpdate(), router=TokenChoice(drop_rate=0.1))
    with pytest.raises(ValueError, match=r"drops among all experts.*drop_rate=0\.1"):
        MoE(router=TokenChoice(drop_rate=0.1, groups=ExpertGroups(num_groups=2, num_selected=1)))
