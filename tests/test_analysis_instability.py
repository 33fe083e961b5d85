"""How often choices flip: by hand, by chance, and on a small model."""

import numpy as np
import pytest

from moe_jax.analysis.instability import flips, route_variations
from moe_jax.analysis.routed import route_batches
from moe_jax.data import heldout_batches, open_data
from tests.tiny_run import tiny_state, tiny_training

EXPERT_JK = np.array([[0, 1], [2, 3], [1, 0]])


def test_flips_by_hand():
    # The first token's experts change places. The second token's first choice is replaced by
    # another expert. The third token keeps its experts.
    other_JK = np.array([[1, 0], [0, 3], [1, 0]])
    assert flips(EXPERT_JK, other_JK) == flips(other_JK, EXPERT_JK) == (2 / 3, 1 / 3)
    # Only second choices change.
    assert flips(EXPERT_JK, np.array([[0, 2], [2, 3], [1, 3]])) == (0, 2 / 3)
    assert flips(EXPERT_JK, EXPERT_JK) == (0, 0)


def test_a_choice_that_does_not_count_is_none():
    fewer_JK = np.array([[0, -1], [2, 3], [1, 0]])
    assert flips(EXPERT_JK, fewer_JK) == (0, 1 / 3)
    none_JK = np.full((3, 2), -1)
    assert flips(EXPERT_JK, none_JK) == (1, 1) and flips(none_JK, none_JK) == (0, 0)
    # One choice per token against two.
    assert flips(EXPERT_JK, EXPERT_JK[:, :1]) == (0, 1)
    assert flips(fewer_JK, EXPERT_JK[:, :1]) == (0, 2 / 3)


def test_unrelated_routing_flips_as_the_formula_says():
    rng = np.random.default_rng(0)
    one, other = (rng.random((20_000, 8)).argsort(axis=1)[:, :2] for _ in range(2))
    said = flips(one, other)
    assert said.first == pytest.approx(1 - 1 / 8, abs=0.01)
    assert said.set == pytest.approx(1 - 1 / 28, abs=0.01)


def test_choices_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"3 tokens against 2\. Route the same tokens"):
        flips(EXPERT_JK, EXPERT_JK[:2])
    with pytest.raises(ValueError, match="0 tokens against 0"):
        flips(EXPERT_JK[:0], EXPERT_JK[:0])


def test_more_noise_flips_more_and_none_flips_nothing():
    config = tiny_training()
    state = tiny_state(config)
    batches = list(heldout_batches(open_data(config.data), batch_size=4))[:4]
    own = route_batches(state, config.model, batches, 10**9)

    def first(routed):
        return flips(own.expert_XJK[1], routed.expert_XJK[1]).first

    shares = [first(route_batches(state, config.model, batches, 10**9, s)) for s in (0, 0.02, 0.5)]
    assert shares[0] == 0 < shares[1] < 0.2 < shares[2]
    varied = route_variations(state, config.model, batches, 10**9, 0.02)
    assert list(varied) == ["input noise 0.02", "compute in bfloat16", "router in bfloat16"]
    assert first(varied["input noise 0.02"]) == shares[1], "the same noise at every call"
