"""Verdicts of studies, worked out by hand: fixed results in, verdict out."""

import math

import pytest

from experiments import verdict
from experiments.results import LOSS, Results
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding


def row(arm, seed, loss=1.0, curve=(), **measures):
    steps = [10 * (i + 1) for i in range(len(curve))]
    return {
        "arm": arm,
        "seed": seed,
        "measures": {LOSS: loss, **measures},
        "curve": {"step": steps, LOSS: list(curve)},
    }


def results(**losses):
    rows = [row(arm, s, loss) for arm, values in losses.items() for s, loss in enumerate(values)]
    return Results(tuple(rows), "dense")


# Standard deviations: (1.0, 1.1, 1.2) 0.1; (2.0, 2.2, 2.4) 0.2; of an arm of equal values 0.
def test_noise_is_the_larger_of_pooled_spread_and_floor():
    found = verdict.difference(results(dense=(1.0, 1.1, 1.2), moe=(2.0, 2.2, 2.4)), "moe", "dense")
    assert found.by_seed == pytest.approx({0: 1.0, 1: 1.1, 2: 1.2})
    assert found.mean == pytest.approx(1.1)
    assert found.noise == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 2))
    # Five seeds of the baseline: the floor counts all of them, the pairs the three they share.
    wide = results(dense=(1.0, 1.0, 1.0, 2.0, 0.0), moe=(0.5, 0.5, 0.5))
    found = verdict.difference(wide, "moe", "dense")
    assert set(found.by_seed) == {0, 1, 2}
    assert found.noise == verdict.noise_floor(wide) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ((0.79, 0.89, 0.99), REPRODUCED),  # 0.21 below, noise 0.1
        ((0.81, 0.91, 1.01), INCONCLUSIVE),  # 0.19 below
        ((1.0, 1.1, 1.2), INCONCLUSIVE),
        ((1.19, 1.29, 1.39), INCONCLUSIVE),  # 0.19 above
        ((1.21, 1.31, 1.41), NOT_REPRODUCED),  # 0.21 above
        ((0.1, 0.2), INCONCLUSIVE),  # two seeds show nothing
        ((), INCONCLUSIVE),
    ],
)
def test_a_direction_needs_twice_the_noise_and_three_seeds(moe, expected):
    found = verdict.lower("moe", "dense")(results(dense=(1.0, 1.1, 1.2), moe=moe))
    assert found.verdict == expected, found


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ((0.5, 0.6, 0.7), REPRODUCED),
        ((1.19, 1.29, 1.39), REPRODUCED),
        ((1.21, 1.31, 1.41), NOT_REPRODUCED),
        ((5.0,), INCONCLUSIVE),
    ],
)
def test_not_above_allows_twice_the_noise(moe, expected):
    found = verdict.not_above("moe", "dense")(results(dense=(1.0, 1.1, 1.2), moe=moe))
    assert found.verdict == expected, found


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.5, 1.6, 2.0), REPRODUCED),
        ((1.5, 1.49, 2.0), NOT_REPRODUCED),
        ((1.5, 2.1, 2.0), NOT_REPRODUCED),
        ((1.5, 1.6), INCONCLUSIVE),
    ],
)
def test_a_bound_holds_in_every_seed_or_fails(values, expected):
    found = verdict.in_every_seed("ratio", dict(enumerate(values)), least=1.5, most=2.0)
    assert found.verdict == expected, found


def test_one_claim_that_fails_fails_the_study_and_one_that_is_open_leaves_it_open():
    def overall(*verdicts):
        return verdict.overall([Finding(each, "") for each in verdicts])

    assert overall(REPRODUCED, REPRODUCED) == REPRODUCED
    assert overall(REPRODUCED, INCONCLUSIVE) == INCONCLUSIVE
    assert overall(INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED) == NOT_REPRODUCED


def test_the_step_ratio_is_of_smoothed_curves():
    # Smoothed dense: 6, 5, 4, 3, ends at (4 + 3 + 2) / 3 = 3 after step 40.
    dense = row("dense", 0, curve=(6, 4, 2, 3))
    # Smoothed: 4, 3.5, 3, 2: at 3 after step 30.
    moe = row("moe", 0, curve=(4, 3, 2, 1))
    never = row("never", 0, curve=(9, 9, 9, 9))
    found = Results((dense, moe, never), "dense")
    assert verdict.smoothed([6, 4, 2, 3]) == [6, 5, 4, 3]
    assert verdict.step_ratio(found, "moe", "dense") == {0: 40 / 30}
    assert verdict.step_ratio(found, "dense", "dense") == {0: 1.0}
    assert verdict.step_ratio(found, "never", "dense") == {0: 0.0}


def test_rank_correlation():
    assert verdict.spearman([1, 2, 4, 8], [1, 2, 3, 4]) == pytest.approx(1)
    assert verdict.spearman([1, 2, 4, 8], [4, 3, 2, 1]) == pytest.approx(-1)
    # One neighbouring pair swapped: 1 - 6 * 2 / (4 * 15).
    assert verdict.spearman([1, 2, 4, 8], [2, 1, 3, 4]) == pytest.approx(0.8)
    # Ties share ranks (0.5, 0.5, 2, 3): by hand 4.5 / sqrt(5 * 4.5).
    assert verdict.spearman([1, 2, 3, 4], [1, 1, 2, 3]) == pytest.approx(4.5 / math.sqrt(22.5))
