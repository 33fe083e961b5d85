"""Verdicts of studies, worked by hand from fixed results."""

import dataclasses
import math

import pytest
from scipy import integrate, stats

from experiments import before_pairs, verdict
from experiments.results import LOSS, UNPAIRED, Results, measured
from experiments.switch_against_dense import study as switch
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding
from moe_jax.training.loss_labels import SAW, SEES, LossLabel


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


DENSE = (1.0, 1.1, 1.2, 1.0, 1.2)  # the first three, and all five, have a standard deviation of 0.1


def results(**losses):
    rows = [row(arm, s, loss) for arm, values in losses.items() for s, loss in enumerate(values)]
    return Results(tuple(rows), "dense")


def test_arms_that_saw_later_tokens_are_marked_in_findings():
    """Marks follow the loss in question: the second arm is also evaluated without a capacity."""
    losses = dict.fromkeys(("dense", "soft", "queue"), DENSE)
    labels = {
        "soft": {"dropless": LossLabel("slots of training", SEES)},
        "queue": {"dropless": LossLabel("dropless", SAW), "capacity_limited": LossLabel("-", SEES)},
    }
    found = dataclasses.replace(results(**losses), labels=labels)
    said = verdict.lower("soft", "dense")(found).because
    assert said.startswith(f"soft ({SEES}) less dense: +0.0000 bits_per_byte")
    text = "soft less dense; soft (sees later tokens) and soft_2; queue."
    assert found.marked(text) == (
        f"soft ({SEES}) less dense; soft ({SEES}) and soft_2; queue ({SAW})."
    )
    assert verdict.lower("queue", "dense")(found).because.startswith(f"queue ({SAW}) less dense")
    assert found.mark("queue", "capacity_limited") == SEES
    assert f"dense 1.1000, soft ({SEES}) 1.1000" in measured(LOSS, "dense", "soft")(found)


# The planted fault: three seeds with nearly equal differences, and a wide spread themselves.
FAULT = {
    "dense": (2.80, 2.85, 2.90, 2.80, 2.90),
    "moe": (2.80 - 0.0630, 2.85 - 0.0612, 2.90 - 0.0607),
}


def test_three_seeds_that_differ_alike_are_a_direction():
    """Here t is -88. The earlier rule compared the mean of -0.062 with twice a spread of 0.05."""
    found = results(**FAULT)
    finding = verdict.lower("moe", "dense")(found)
    assert finding.verdict == REPRODUCED
    assert finding.because == (
        "moe less dense: -0.0616 bits_per_byte over 3 seeds, 95 % interval -0.0646 to -0.0586, "
        "1.2 seed sd; 0.0039 could have been seen; p = 0.00013"
    )
    before = verdict.lower("moe", "dense")(dataclasses.replace(found, rule=UNPAIRED))
    assert before.verdict == INCONCLUSIVE
    assert before.because == "moe less dense: -0.0616 bits_per_byte over 3 seeds, noise 0.0506"


def moved(by, spread=0.01):
    """The first three dense seeds, shifted so that the paired t is sqrt(3) by / spread."""
    return tuple(
        loss + by + noise for loss, noise in zip(DENSE[:3], (-spread, 0.0, spread), strict=True)
    )


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (moved(-0.026), REPRODUCED),  # t = -4.5, beyond the limit 4.303 for two degrees of freedom
        (moved(-0.024), INCONCLUSIVE),  # t = -4.2
        (moved(0.0), INCONCLUSIVE),
        (moved(0.024), INCONCLUSIVE),
        (moved(0.026), NOT_REPRODUCED),
        (moved(-0.5)[:2], INCONCLUSIVE),  # two seeds show nothing
        ((), INCONCLUSIVE),
    ],
)
def test_a_direction_is_shown_by_t_and_needs_three_seeds(moe, expected):
    found = verdict.lower("moe", "dense")(results(dense=DENSE, moe=moe))
    assert found.verdict == expected, found


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (moved(-0.5), REPRODUCED),
        (moved(0.012), REPRODUCED),  # t = -3.1 from 0.03, beyond the one-sided limit 2.92
        (moved(0.014), INCONCLUSIVE),
        (moved(0.046), INCONCLUSIVE),
        (moved(0.048), NOT_REPRODUCED),
        ((5.0,), INCONCLUSIVE),
    ],
)
def test_not_above_allows_a_margin(moe, expected):
    found = verdict.not_above("moe", "dense")(results(dense=DENSE, moe=moe))
    assert found.verdict == expected, found
    assert len(moe) < 3 or "; +0.03 is allowed; p = " in found.because


@pytest.mark.parametrize(("pairs", "share"), [(3, 0.59), (5, 0.92)])
def test_how_often_arms_that_are_alike_are_shown_to_be(pairs, share):
    """The power that docs/studies.md states, for differences around 0 with a spread of 0.018."""
    noncentrality = verdict.MARGIN / (0.018 / math.sqrt(pairs))
    limit = stats.t.ppf(1 - verdict.LEVEL, pairs - 1)
    assert round(1 - stats.nct.cdf(limit, pairs - 1, noncentrality), 2) == share


@pytest.mark.parametrize(("pairs", "share"), [(3, 0.41), (5, 0.84)])
def test_how_often_both_sides_are_shown_of_arms_that_are_alike(pairs, share):
    """P(|mean| < margin - t standard errors), integrated over the chi-square of the variance."""
    freedom, error = pairs - 1, 0.018 / math.sqrt(pairs)
    limit = stats.t.ppf(1 - verdict.LEVEL, freedom) * error

    def shown(u):
        left = verdict.MARGIN - limit * math.sqrt(u / freedom)
        return (2 * stats.norm.cdf(left / error) - 1) * stats.chi2.pdf(u, freedom)

    widest = freedom * (verdict.MARGIN / limit) ** 2
    assert round(integrate.quad(shown, 0, widest)[0], 2) == share


def test_a_margin_is_in_the_unit_of_its_measure():
    found = results(dense=DENSE, moe=moved(0.06))
    assert verdict.not_above("moe", "dense")(found).verdict == NOT_REPRODUCED
    assert verdict.not_above("moe", "dense", margin=0.1)(found).verdict == REPRODUCED


def test_a_study_says_how_many_seeds_a_comparison_needs():
    found = dataclasses.replace(results(dense=DENSE, moe=moved(-0.5)), least_seeds=4)
    finding = verdict.lower("moe", "dense")(found)
    assert finding == Finding(INCONCLUSIVE, "moe and dense: 3 seeds of the 4 that are needed")


def test_all_of_several_claims_are_shown_each_by_itself():
    """Both hold by chance no more often than one of them does."""
    found = results(dense=DENSE, a=moved(-0.026), b=moved(-0.026), c=moved(0.0))
    alone = verdict.lower("a", "dense")
    assert alone(found).verdict == REPRODUCED and alone(found).because.endswith("p = 0.046")
    both = verdict.every([alone, verdict.lower("b", "dense")])(found)
    assert both.verdict == REPRODUCED and both.because.count("p = 0.046") == 2
    open_still = verdict.every([alone, verdict.lower("c", "dense")])(found)
    assert open_still.verdict == INCONCLUSIVE
    alike = verdict.every([verdict.not_above("c", "dense"), verdict.not_above("dense", "c")])
    assert alike(found).verdict == REPRODUCED


def test_that_one_of_several_fails_is_corrected_for():
    """Each alone fails with p = 0.046; for two claims, Holm requires 0.025 of the worse one."""
    found = results(dense=DENSE, a=moved(0.026), b=moved(0.026), c=moved(0.0))
    alone = verdict.lower("a", "dense")
    assert alone(found).verdict == NOT_REPRODUCED
    both = verdict.every([alone, verdict.lower("b", "dense")])(found)
    assert both.verdict == INCONCLUSIVE and both.because.count("p = 0.092 (Holm, of 2)") == 2
    # One arm against two others is corrected as well, but not the two directions of one pair.
    reverse = verdict.every([verdict.lower("a", "dense"), verdict.lower("a", "c")])(found)
    assert reverse.because.count("(Holm, of 2)") == 2
    alike = verdict.every([verdict.not_above("c", "dense"), verdict.not_above("dense", "c")])
    assert "Holm" not in alike(found).because


def test_comparisons_of_one_claim_are_one_family_whatever_they_are_of():
    """Arms on both sides may differ. Of a pair's two directions, the likelier failure counts."""
    one, reverse = verdict.lower("a", "dense"), verdict.lower("dense", "a")
    two_ways = [verdict.not_above("b", "c"), verdict.not_above("c", "b")]
    found = results(dense=DENSE, a=moved(0.026), b=moved(0.026), c=DENSE[:3])
    p_values = [each.p_value(found) for each in two_ways]
    assert p_values[0] != p_values[1]
    assert verdict.others_of(one, [one, reverse, *two_ways], found) == [min(p_values)]
    both = verdict.every([one, verdict.lower("b", "c")])(found)
    assert "p = 0.092 (Holm, of 2)" in both.because and both.verdict == INCONCLUSIVE


# The earlier rule: the larger of the pooled standard deviation and that of five dense runs.
@pytest.mark.parametrize(
    ("moe", "lower", "not_above"),
    [
        ((0.79, 0.89, 0.99), REPRODUCED, REPRODUCED),  # 0.21 below, noise 0.1
        ((0.81, 0.91, 1.01), INCONCLUSIVE, REPRODUCED),
        ((1.09, 1.19, 1.29), INCONCLUSIVE, REPRODUCED),  # 0.09 above
        ((1.11, 1.21, 1.31), INCONCLUSIVE, INCONCLUSIVE),
        ((1.21, 1.31, 1.41), NOT_REPRODUCED, NOT_REPRODUCED),
        ((0.1, 0.2), INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_the_rule_of_before(moe, lower, not_above):
    found = dataclasses.replace(results(dense=DENSE, moe=moe), rule=UNPAIRED)
    assert verdict.lower("moe", "dense")(found).verdict == lower
    assert verdict.not_above("moe", "dense")(found).verdict == not_above


def test_the_noise_of_before_is_the_larger_of_pooled_spread_and_floor():
    narrow = results(dense=DENSE, moe=(2.0, 2.2, 2.4))
    found = verdict.difference(narrow, "moe", "dense")
    assert found.by_seed == pytest.approx({0: 1.0, 1: 1.1, 2: 1.2})
    assert before_pairs.noise(found, narrow) == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 2))
    # The floor uses all five seeds of the baseline, the pairs only the three shared seeds.
    wide = results(dense=(1.0, 1.0, 1.0, 2.0, 0.0), moe=(0.5, 0.5, 0.5))
    found = verdict.difference(wide, "moe", "dense")
    assert before_pairs.noise(found, wide) == verdict.noise_floor(wide) == math.sqrt(0.5)
    few = dataclasses.replace(results(dense=DENSE[:4], moe=(0, 0, 0)), rule=UNPAIRED)
    said = verdict.lower("moe", "dense")(few).because
    assert said == "dense, for the noise: 4 seeds of the 5 that are needed"


def test_results_know_whether_they_are_of_the_rule_of_before():
    old = results(dense=DENSE)
    new = dataclasses.replace(old, rows=tuple(row | {"rule": "paired"} for row in old.rows))
    assert old.has_older_rule and not new.has_older_rule
    assert dataclasses.replace(new, rows=(*new.rows, old.rows[0])).has_older_rule


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


def test_a_run_that_diverged_is_worse_than_any_and_within_no_bounds():
    rows = [*results(dense=DENSE, moe=(0.1, 0.1)).rows, diverged("moe", 2)]
    found = Results(tuple(rows), "dense")
    assert found.values("moe") == found.values("moe", "whatever") | {0: 0.1, 1: 0.1}
    assert found.values("moe")[2] == math.inf
    # Two of three seeds are lower and one diverged: no direction is shown.
    finding = verdict.lower("moe", "dense")(found)
    assert finding.verdict == INCONCLUSIVE
    assert finding.because.endswith("over 3 seeds; p = 1, by signs: a run diverged")
    assert verdict.not_above("moe", "dense")(found).verdict == INCONCLUSIVE
    assert verdict.lower("dense", "moe")(found).verdict == INCONCLUSIVE
    assert verdict.in_every_seed("x", found.values("moe"), least=0).verdict == NOT_REPRODUCED
    pair = Results((row("dense", 2, curve=(3, 2)), diverged("moe", 2)), "dense")
    assert math.isnan(verdict.step_ratio(pair, "moe", "dense")[2])
    # Both arms diverged, in different seeds and in the same one.
    both = Results((*rows, *(diverged(a, s) for a, s in (("b", 0), ("b", 2)))), "dense")
    assert math.isnan(verdict.difference(both, "moe", "b").mean)
    assert verdict.lower("moe", "b")(both).verdict == INCONCLUSIVE


def test_signs_decide_where_a_run_diverged():
    """One in 32 is 3 %: six seeds on one side are shown; five, one in 16, are not."""

    def found(num_worse, num_better=0):
        worse = [diverged("moe", seed) for seed in range(num_worse)]
        better = [row("moe", num_worse + i, 0.5) for i in range(num_better)]
        dense = [row("dense", seed, 1.0 + seed / 10) for seed in range(num_worse + num_better)]
        return Results((*worse, *better, *dense), "dense")

    moe, dense = verdict.lower("moe", "dense"), verdict.lower("dense", "moe")
    assert [moe(found(n)).verdict for n in (3, 5, 6)] == [
        INCONCLUSIVE, INCONCLUSIVE, NOT_REPRODUCED,
    ]  # fmt: skip
    assert dense(found(6)).verdict == REPRODUCED
    assert verdict.not_above("moe", "dense")(found(6)).verdict == NOT_REPRODUCED
    # One of ten diverged and nine are lower: p = 0.02, although the mean is infinite.
    assert moe(found(1, 9)).verdict == REPRODUCED
    assert dense(found(1, 9)).verdict == NOT_REPRODUCED


def test_one_claim_that_fails_fails_the_study_and_one_that_is_open_leaves_it_open():
    def overall(*verdicts):
        return verdict.overall([Finding(each, "") for each in verdicts])

    assert overall(REPRODUCED, REPRODUCED) == REPRODUCED
    assert overall(REPRODUCED, INCONCLUSIVE) == INCONCLUSIVE
    assert overall(INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED) == NOT_REPRODUCED


def test_the_step_ratio_is_of_smoothed_curves():
    # Dense smoothed: 6, 5, 4, 3. It ends at (4 + 3 + 2) / 3 = 3 after step 40.
    dense = row("dense", 0, curve=(6, 4, 2, 3))
    # Smoothed: 4, 3.5, 3, 2, which reaches 3 after step 30.
    moe = row("moe", 0, curve=(4, 3, 2, 1))
    never = row("never", 0, curve=(9, 9, 9, 9))
    found = Results((dense, moe, never), "dense")
    assert verdict.smoothed([6, 4, 2, 3]) == [6, 5, 4, 3]
    assert verdict.step_ratio(found, "moe", "dense") == {0: 40 / 30}
    assert verdict.step_ratio(found, "dense", "dense") == {0: 1.0}
    assert verdict.step_ratio(found, "never", "dense") == {0: 0.0}


def test_more_experts_show_nothing_if_every_arm_diverged():
    """All losses are infinite, so they have no order."""
    rows = (diverged(arm, seed) for arm in switch.ORDERED for seed in range(3))
    found = switch.falls_with_experts(Results(tuple(rows), "dense"))
    assert found.verdict == INCONCLUSIVE and "all diverged" in found.because
    assert math.isnan(verdict.spearman([1, 2], [3, 3])) and math.isnan(verdict.spearman([1], [2]))


def test_rank_correlation():
    assert verdict.spearman([1, 2, 4, 8], [1, 2, 3, 4]) == pytest.approx(1)
    assert verdict.spearman([1, 2, 4, 8], [4, 3, 2, 1]) == pytest.approx(-1)
    # One neighbouring pair is swapped: 1 - 6 * 2 / (4 * 15).
    assert verdict.spearman([1, 2, 4, 8], [2, 1, 3, 4]) == pytest.approx(0.8)
    # Ties share ranks (0.5, 0.5, 2, 3): by hand 4.5 / sqrt(5 * 4.5).
    assert verdict.spearman([1, 2, 3, 4], [1, 1, 2, 3]) == pytest.approx(4.5 / math.sqrt(22.5))
