"""Verdicts of studies, worked out by hand: fixed results in, verdict out."""

import dataclasses
import math

import pytest

from experiments import verdict
from experiments.results import LOSS, Results, measured
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding
from moe_jax.training.ways import SAW, SEES, Way


def row(arm, seed, loss=1.0, curve=(), **measures):
    steps = [10 * (i + 1) for i in range(len(curve))]
    return {
        "arm": arm,
        "seed": seed,
        "measures": {LOSS: loss, **measures},
        "curve": {"step": steps, LOSS: list(curve)},
    }


def diverged(arm, seed):
    return {**row(arm, seed), "measures": {}, "diverged_after_step": 30}


DENSE = (1.0, 1.1, 1.2, 1.0, 1.2)  # the first three and all five: standard deviation 0.1


def results(**losses):
    rows = [row(arm, s, loss) for arm, values in losses.items() for s, loss in enumerate(values)]
    return Results(tuple(rows), "dense")


def test_arms_that_saw_later_tokens_are_marked_in_findings():
    """Where the loss is one that saw them: the second is evaluated without a capacity."""
    losses = dict.fromkeys(("dense", "soft", "queue"), DENSE)
    ways = {
        "soft": {"dropless": Way("slots of training", SEES)},
        "queue": {"dropless": Way("dropless", SAW), "capacity_limited": Way("-", SEES)},
    }
    found = dataclasses.replace(results(**losses), ways=ways)
    said = verdict.lower("soft", "dense")(found).because
    assert said.startswith(f"soft ({SEES}) less dense: +0.0000 bits_per_byte")
    assert verdict.lower("queue", "dense")(found).because.startswith(f"queue ({SAW}) less dense")
    assert found.mark("queue", "capacity_limited") == SEES
    assert f"dense 1.1000, soft ({SEES}) 1.1000" in measured(LOSS, "dense", "soft")(found)


# Standard deviations: (2.0, 2.2, 2.4) 0.2; of an arm of equal values 0.
def test_noise_is_the_larger_of_pooled_spread_and_floor():
    found = verdict.difference(results(dense=DENSE, moe=(2.0, 2.2, 2.4)), "moe", "dense")
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
    found = verdict.lower("moe", "dense")(results(dense=DENSE, moe=moe))
    assert found.verdict == expected, found


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ((0.5, 0.6, 0.7), REPRODUCED),
        ((1.09, 1.19, 1.29), REPRODUCED),
        ((1.11, 1.21, 1.31), INCONCLUSIVE),
        ((1.21, 1.31, 1.41), NOT_REPRODUCED),
        ((5.0,), INCONCLUSIVE),
    ],
)
def test_not_above_allows_the_noise(moe, expected):
    found = verdict.not_above("moe", "dense")(results(dense=DENSE, moe=moe))
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


def test_nothing_is_shown_without_the_noise_floor():
    """Four runs of the baseline are too few, however far apart the arms are."""
    found = verdict.lower("moe", "wide")(results(dense=DENSE[:4], moe=(0, 0, 0), wide=(9, 9, 9)))
    assert found.verdict == INCONCLUSIVE
    assert found.because == "dense, for the noise: 4 seeds of the 5 that are needed"
    # A loss that the baseline does not have is judged by the noise of the one that it has.
    rows = [*results(dense=DENSE).rows]
    rows += [row(a, s, other=x + 0.001 * s) for a, x in (("a", 1.0), ("b", 1.15)) for s in range(3)]
    found = verdict.lower("a", "b", "other")(Results(tuple(rows), "dense"))
    assert (found.verdict, found.because[-6:]) == (INCONCLUSIVE, "0.1000")


def test_a_run_that_diverged_is_worse_than_any_and_within_no_bounds():
    rows = [*results(dense=DENSE, moe=(0.1, 0.1)).rows, diverged("moe", 2)]
    found = Results(tuple(rows), "dense")
    assert found.values("moe") == found.values("moe", "whatever") | {0: 0.1, 1: 0.1}
    assert found.values("moe")[2] == math.inf
    assert verdict.lower("moe", "dense")(found).verdict == NOT_REPRODUCED
    assert verdict.not_above("moe", "dense")(found).verdict == NOT_REPRODUCED
    assert verdict.lower("dense", "moe")(found).verdict == REPRODUCED
    assert verdict.in_every_seed("x", found.values("moe"), least=0).verdict == NOT_REPRODUCED
    pair = Results((row("dense", 2, curve=(3, 2)), diverged("moe", 2)), "dense")
    assert math.isnan(verdict.step_ratio(pair, "moe", "dense")[2])
    # Both, in seeds of their own and in the same one.
    both = Results((*rows, *(diverged(a, s) for a, s in (("b", 0), ("b", 2)))), "dense")
    assert math.isnan(verdict.difference(both, "moe", "b").mean)


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
