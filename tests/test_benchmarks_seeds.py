"""Seeds trained side by side take the same steps as seeds trained one after another."""

import jax
import numpy as np
import pytest

from benchmarks.seeds_side_by_side import Steps, with_way
from experiments.study import load_study


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ragged", "gather"])
def test_both_ways_come_to_the_same_parameters(way):
    config = load_study("switch_against_dense").experiment("smoke", "switch_2", 0)
    steps = Steps(with_way(config, way), num_seeds=2)
    steps.side_by_side()
    steps.in_turn()
    for seed, state in enumerate(steps.states):
        for one, all_ in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(steps.state.params), strict=True
        ):
            np.testing.assert_allclose(all_[seed], one, rtol=1e-3, atol=1e-5)
    first, second = (jax.tree.leaves(state.params)[0] for state in steps.states)
    assert not np.allclose(first, second)  # each seed has its own batch
