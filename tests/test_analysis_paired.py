"""Differences between shared seeds: by hand, against SciPy's tests, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from moe_jax.analysis.paired import LEVEL, POWER, holm, paired, shared_seeds, sign_test

# In each seed the arm is about 0.06 lower, while the seeds themselves spread by 0.05.
DENSE = {0: 2.80, 1: 2.85, 2: 2.90}
LOWER = {0: 2.80 - 0.0630, 1: 2.85 - 0.0612, 2: 2.90 - 0.0607}


def test_a_small_difference_of_every_seed_is_a_direction():
    """The mean is -0.06163 and t is -88, though the unpaired spread of 0.05 hides it."""
    found = paired(LOWER, DENSE)
    assert found.mean == pytest.approx(-0.061633, abs=1e-6)
    assert found.sd == pytest.approx(math.sqrt((0.001367**2 + 0.000433**2 + 0.000933**2) / 2),
                                     abs=1e-6)  # fmt: skip
    assert found.t() == pytest.approx(-88.2, abs=0.1)
    assert found.p_value() < 2e-4
    assert found.seed_sd == pytest.approx(0.05, abs=0.002)
    assert found.size == pytest.approx(found.mean / found.seed_sd)


def test_the_interval_of_three_seeds_by_hand():
    """1, 2 and 3 minus 0: mean 2, sd 1; 4.3027 is the 97.5th percentile of t with 2 degrees."""
    found = paired({0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), 0.0))
    half = 4.3027 / math.sqrt(3)
    assert found.interval == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert found.t() == pytest.approx(2 * math.sqrt(3))
    assert found.t(bound=3.0) == pytest.approx(-math.sqrt(3))
    # With two degrees of freedom there is a closed form: p = 1 - |t| / sqrt(2 + t^2).
    assert found.p_value() == pytest.approx(1 - math.sqrt(12 / 14))
    assert found.p_value(bound=2.0) == 1.0


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 12])
def test_pairs_agree_with_scipy(num_seeds):
    a, b = np.random.default_rng(num_seeds).normal(size=(2, num_seeds))
    found = paired(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(a, b)
    assert found.t() == pytest.approx(expected.statistic)
    assert found.p_value() == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(1 - LEVEL)))
    shifted = stats.ttest_1samp(a - b, 0.3)
    assert found.p_value(bound=0.3) == pytest.approx(shifted.pvalue)


def test_the_interval_covers_and_the_smallest_visible_effect_is_seen_as_often_as_it_says():
    """Simulates 20,000 studies of four pairs with a fixed seed."""
    draws = np.random.default_rng(0).normal(size=(20_000, 4))
    effect = paired(dict(enumerate((-1.0, 0.0, 0.0, 1.0))), dict.fromkeys(range(4), 0.0))
    visible = effect.smallest_visible / effect.sd  # in units of the standard deviation
    half = stats.t.ppf(1 - LEVEL / 2, 3) * draws.std(axis=1, ddof=1) / 2
    assert np.mean(abs(draws.mean(axis=1)) <= half) == pytest.approx(1 - LEVEL, abs=0.005)
    assert np.mean(abs(draws.mean(axis=1) + visible) > half) == pytest.approx(POWER, abs=0.01)


def test_only_shared_seeds_count():
    found = paired({0: 1.0, 1: 2.0, 7: 50.0}, {1: 1.0, 0: 0.5, 9: -50.0})
    assert dict(found.by_seed) == {0: 0.5, 1: 1.0}
    assert shared_seeds([{2: 0, 1: 0}, {1: 0, 2: 0, 3: 0}]) == [2, 1]
    assert shared_seeds([]) == []


def test_too_few_seeds_say_nothing():
    alone, none = paired({0: 1.0}, {0: 0.0}), paired({0: 1.0}, {1: 0.0})
    assert alone.mean == 1.0 and math.isnan(none.mean)
    for found in (alone, none):
        for value in (found.sd, found.t(), found.p_value(), *found.interval,
                      found.smallest_visible, found.size):  # fmt: skip
            assert math.isnan(value)


def test_equal_differences_are_certain():
    equal = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.5, 1: 1.5, 2: 2.5})
    assert equal.sd == 0 and equal.p_value() == 0 and equal.interval == (0.5, 0.5)
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p_value() == 1.0


def test_one_divergence_among_three_seeds_decides_nothing():
    """The other two seeds point the other way: chance alone gives one of three."""
    found = paired({0: math.inf, 1: 1.0, 2: 1.01}, {0: 2.0, 1: 2.0, 2: 2.0})
    assert found.diverged and found.p_value() == 1.0
    assert found.side() == -1 and found.mean == math.inf
    for value in (found.t(), found.sd, *found.interval, found.smallest_visible):
        assert math.isnan(value)


@pytest.mark.parametrize(
    ("num_seeds", "p_value"), [(2, 1 / 2), (3, 1 / 4), (5, 1 / 16), (6, 1 / 32)]
)
def test_an_arm_that_always_diverges_is_shown_by_six_seeds(num_seeds, p_value):
    """By hand: all signs agree with probability 2 / 2^n. Five seeds do not reach 5 %."""
    seeds = range(num_seeds)
    found = paired(dict.fromkeys(seeds, math.inf), dict.fromkeys(seeds, 2.0))
    assert found.p_value() == pytest.approx(p_value)
    assert found.side() == 1
    # An infinite difference exceeds any bound, even one that could not be estimated.
    assert found.p_value(bound=math.nan) == pytest.approx(p_value)


def test_signs_agree_with_scipy_and_count_against_the_bound():
    below = {seed: 1.0 + seed / 10 for seed in range(9)}
    found = paired({**below, 9: math.inf}, dict.fromkeys(range(10), 2.5))
    assert found.p_value() == pytest.approx(stats.binomtest(1, 10).pvalue)
    assert found.side() == -1
    # Differences -1.5, -1.4, ... -0.7 and infinity, minus -1.15: four below, six above.
    assert found.p_value(bound=-1.15) == pytest.approx(stats.binomtest(4, 10).pvalue)
    assert found.side(bound=-1.15) == 1


def test_equal_pairs_have_no_sign_and_two_divergences_no_difference():
    assert sign_test([0.0, math.inf, 1.0, 0.0]) == 0.5
    assert sign_test([0.0, 0.0]) == 1.0
    both = paired({0: math.inf, 1: 2.0, 2: 1.0}, {0: math.inf, 1: 2.0, 2: 2.0})
    assert math.isnan(both.p_value()) and both.diverged


def test_the_test_of_signs_is_wrong_as_seldom_as_it_says():
    """Two equal arms of twelve seeds, which diverge now and then."""
    losses = np.random.default_rng(2).normal(size=(2000, 2, 12))
    losses[np.random.default_rng(3).uniform(size=losses.shape) < 0.04] = math.inf
    found = [paired(dict(enumerate(a)), dict(enumerate(b))) for a, b in losses.tolist()]
    p_values = [one.p_value() for one in found if one.diverged]
    assert len(p_values) > 500 and np.mean(np.array(p_values) < LEVEL) <= LEVEL


def test_holm_by_hand():
    """0.01 * 3; 0.02 * 2; then 0.03 * 1, raised to the value before it."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.04]) == [0.04] and holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with_nan = holm([0.01, math.nan])
    assert with_nan[0] == pytest.approx(0.02) and math.isnan(with_nan[1])


def test_holm_keeps_the_chance_of_any_false_direction():
    """With four arms equal to the baseline, at most 5 % of studies call any arm different."""
    p_values = np.random.default_rng(1).uniform(size=(4000, 4))
    false = np.mean([min(holm(list(row))) < LEVEL for row in p_values])
    assert false <= LEVEL + 0.01
    assert np.mean(p_values.min(axis=1) < LEVEL) > 3 * LEVEL  # without the correction
