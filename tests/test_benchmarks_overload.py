"""Choices that a decode step drops: by hand, by slot assignment, and for uniform routing."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.overload import dropped_share, of_one_domain, uniform
from moe_jax.analysis.routed import Routed
from moe_jax.moe.capacity import assign_slots
from moe_jax.moe.queues import TokenMajor
from moe_jax.moe.routing import Options, Routing


def test_dropped_share_by_hand():
    """Two steps of three tokens, two experts each. The loads are 3, 2, 1, 0 and 1, 1, 1, 2."""
    expert_NSK = np.array([[[0, 1], [0, 1], [0, 2]], [[0, 3], [1, 3], [2, -1]]])
    assert dropped_share(expert_NSK, 4, 1) == (2 + 1 + 1) / 11
    assert dropped_share(expert_NSK, 4, 2) == 1 / 11
    assert dropped_share(expert_NSK, 4, 3) == 0


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_dropped_share_is_that_of_the_assignment(slots):
    rng = np.random.default_rng(1)
    expert_GSK = uniform(4, (6, 8, 2), rng)
    ones = jnp.ones(expert_GSK.shape)
    routing = Routing(
        logits_GSE=jnp.zeros((6, 8, 4)), probs_GSE=jnp.full((6, 8, 4), 0.25),
        expert_index_GSK=jnp.asarray(expert_GSK),
        gate_GSK=ones, chosen_GSK=ones > 0,
    )  # fmt: skip
    options = Options(4, 4, 2, slots, dropless=False)
    kept = assign_slots(routing, TokenMajor(), options).kept_GSK
    assert dropped_share(expert_GSK, 4, slots) == pytest.approx(1 - float(jnp.mean(kept)))


def test_uniform_experts_of_a_token_differ_and_are_equally_likely():
    drawn = uniform(4, (20_000, 2), np.random.default_rng(0))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    np.testing.assert_allclose(np.bincount(drawn.ravel()) / drawn.size, 0.25, atol=0.01)


def test_of_uniform_routing_what_is_dropped_with_a_mean_load_of_one_slot():
    """Four tokens, two of eight experts each: the share of idle experts, (3 / 4)**4."""
    drawn = uniform(8, (20_000, 4, 2), np.random.default_rng(0))
    assert dropped_share(drawn, 8, 1) == pytest.approx((3 / 4) ** 4, abs=0.01)


def test_a_step_of_one_domain_has_no_token_of_another():
    domain_J = np.array([0, 0, 1, 1, 1])
    routed = Routed(domain_J[None, :, None], None, domain_J, domain_J, None)
    [step_NSK] = of_one_domain(routed, 3, 4, np.random.default_rng(0))
    assert step_NSK[:, :, 0].tolist() == [[0] * 3, [1] * 3] * 2
