"""From results to verdicts: paired differences, and claims that can fail.

A direction is decided by Student's t-test of the mean difference over the seeds that both arms have
(`moe_jax.analysis.paired`). "Lower" needs a mean below 0, two-sided at 5 %. "Not above" needs one
below a margin, one-sided at 5 %, as in tests of equivalence (D. J. Schuirmann, 1987). A claim of
several comparisons is reproduced if each is shown; this needs no correction (R. L. Berger, 1982).
It is not reproduced if one is shown to fail, with Holm's correction for their number. With fewer
seeds than the study requires, nothing is shown. A diverged run has an infinite loss; then an exact
sign test decides, which shows nothing with fewer than six pairs, or five with a margin.
"""

import dataclasses
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments import before_pairs
from experiments.before_pairs import NOISE_SEEDS, noise_floor
from experiments.results import LOSS, PAIRED, Results
from moe_jax.analysis.paired import LEVEL, MIN_SEEDS, Paired, holm, paired, shared_seeds

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"
NOT_RUN = "not run"
MARGIN = 0.03  # bits per byte: less is negligible; 16 experts gain 0.15 in 2,400 steps of `small`
SMOOTH = 3  # points of a held-out curve averaged before steps are compared


@dataclasses.dataclass(frozen=True)
class Finding:
    """The verdict on a claim, and the numbers behind it.

    It is one of the three verdicts, or "not run".
    """

    verdict: str
    because: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """The findings on the claims of a study at one size, in order.

    Attributes:
      findings: findings by the current rule; [] without results.
      older: findings by the earlier, unpaired rule if some of the runs were made under it; else [].
    """

    findings: list[Finding]
    older: list[Finding]

    @property
    def verdict(self) -> str:
        """The verdict on the study."""
        return overall(self.findings) if self.findings else NOT_RUN

    @property
    def is_run(self) -> bool:
        """Whether any claim has runs."""
        return any(finding.verdict != NOT_RUN for finding in self.findings)

    @property
    def older_verdict(self) -> str:
        """The verdict on the study under the earlier rule; "" if it does not apply."""
        return overall(self.older) if self.older else ""

    def of(self, claims: Iterable[int]) -> "Judged":
        """The findings on some claims, given by index."""
        places = list(claims)
        return Judged(
            *([found[p] for p in places if found] for found in (self.findings, self.older))
        )


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement, written before the run, and the function that judges it.

    Attributes:
      statement: the claim in words.
      judge: returns the finding for given results.
      settles: the common claim about MoE that it answers on the top page; "": none.
    """

    statement: str
    judge: Callable[[Results], Finding]
    settles: str = ""


def difference(results: Results, arm: str, other: str, measure: str = LOSS) -> Paired:
    """A measure of `arm` minus that of `other`, for the seeds that both have."""
    return paired(results.values(arm, measure), results.values(other, measure))


@dataclasses.dataclass(frozen=True)
class Below:
    """The claim that an arm is below another, or above it by less than a margin.

    Attributes:
      arm: the arm that is claimed to be below.
      other: the arm that it is compared with.
      measure: the compared measure; smaller is better.
      margin: how far `arm` may be above, in the unit of the measure.
    """

    arm: str
    other: str
    measure: str = LOSS
    margin: float = 0.0

    def found(self, results: Results) -> Paired:
        """The paired difference that the claim is about."""
        return difference(results, self.arm, self.other, self.measure)

    def p_value(self, results: Results) -> float:
        """The uncorrected p-value of the mean difference against the margin.

        Two-sided, or one-sided with a margin; nan with too few seeds.
        """
        found = self.found(results)
        if found.num_seeds < results.least_seeds:
            return math.nan
        return found.p_value(self.margin) / (2 if self.margin else 1)

    def __call__(self, results: Results, corrected: float | None = None, of: int = 1) -> Finding:
        """Reproduced if shown to be below the margin, not reproduced if shown to be above.

        Args:
          results: results of the study.
          corrected: the corrected p-value for being above, if several pairs are compared.
          of: number of comparisons.
        """
        found = self.found(results)
        if found.num_seeds < results.least_seeds:
            return too_few(f"{self.arm} and {self.other}", found.num_seeds, results.least_seeds)
        names = f"{results.named(self.arm, self.measure)} less "
        names += results.named(self.other, self.measure)
        if results.rule != PAIRED:
            return self._before_pairs(found, results, names)
        p_value, below = self.p_value(results), found.side(self.margin) < 0
        because = f"{names}: {in_words(found, self.measure)}"
        if self.margin:
            because += f"; {self.margin:+g} is allowed"
        if corrected is not None and not below:
            p_value = corrected
            because += f"; p = {p_value:.2g}" + f" (Holm, of {of})" * (of > 1)
        else:
            because += f"; p = {p_value:.2g}"
        because += ", by signs: a run diverged" * found.diverged
        shown = p_value < LEVEL  # False for nan
        return Finding(
            (REPRODUCED if below else NOT_REPRODUCED) if shown else INCONCLUSIVE, because
        )

    def _before_pairs(self, found: Paired, results: Results, names: str) -> Finding:
        """The finding by the earlier rule."""
        if math.isnan(noise_floor(results)):
            return too_few_for_the_noise(results)
        verdicts = {-1: REPRODUCED, 0: INCONCLUSIVE, 1: NOT_REPRODUCED}
        because = (
            f"{names}: {found.mean:+.4f} {self.measure} over {found.num_seeds} seeds, "
            f"noise {before_pairs.noise(found, results):.4f}"
        )
        return Finding(verdicts[before_pairs.direction(found, results, self.margin)], because)


def lower(arm: str, other: str, measure: str = LOSS) -> Below:
    """The claim that `arm` ends below `other`.

    The finding is "not reproduced" if `arm` is shown to be above, and "inconclusive" if neither is
    shown.
    """
    return Below(arm, other, measure)


def not_above(arm: str, other: str, measure: str = LOSS, margin: float = MARGIN) -> Below:
    """The claim that `arm` ends above `other` by less than a margin.

    The finding is "not reproduced" if `arm` is shown to be above by more, and "inconclusive" if
    neither is shown.
    """
    return Below(arm, other, measure, margin)


def in_words(found: Paired, measure: str) -> str:
    """A difference with its interval, effect size and smallest visible difference, as text."""
    low, high = found.interval
    text = f"{found.mean:+.4f} {measure} over {found.num_seeds} seeds"
    if math.isfinite(found.mean):
        text += (
            f", 95 % interval {low:+.4f} to {high:+.4f}, {abs(found.size):.1f} seed sd; "
            f"{found.smallest_visible:.4f} could have been seen"
        )
    return text


def seed_by_seed(
    results: Results, number: Callable[..., float], *measured: tuple[str, str]
) -> dict[int, float]:
    """A number computed from measures of arms, for every seed that all arms have.

    Args:
      results: results of the study.
      number: computes the number of a seed from one value for each of `measured`.
      measured: pairs of an arm and a measure.
    """
    values = [results.values(arm, measure) for arm, measure in measured]
    return {seed: number(*(each[seed] for each in values)) for seed in shared_seeds(values)}


def ratio(a: float, b: float) -> float:
    """The ratio a / b. `b` must not be negative; below 1e-9 it counts as 1e-9."""
    return a / max(b, 1e-9)


def least_fall(*values: float) -> float:
    """The smallest fall from one value to the next."""
    return min(map(operator.sub, values, values[1:]))


def in_every_seed(
    what: str, by_seed: Mapping[Any, float], *, least: float = -math.inf, most: float = math.inf
) -> Finding:
    """The finding that a number is finite and within bounds in every seed, of three or more."""
    if len(by_seed) < MIN_SEEDS:
        return too_few(what, len(by_seed))
    met = sum(math.isfinite(v) and least <= v <= most for v in by_seed.values())
    values = ", ".join(f"{value:.4g}" for value in by_seed.values())
    bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"at most {most:g}"] * (
        most < math.inf
    )
    because = f"{what}: {values}; {', '.join(bounds)} in {met} of {len(by_seed)} seeds"
    return Finding(REPRODUCED if met == len(by_seed) else NOT_REPRODUCED, because)


def too_few(what: str, num_seeds: int, needed: int = MIN_SEEDS) -> Finding:
    """The finding with too few seeds."""
    return Finding(INCONCLUSIVE, f"{what}: {num_seeds} seeds of the {needed} that are needed")


def too_few_for_the_noise(results: Results) -> Finding:
    """The finding with too few runs of the baseline."""
    losses = results.values(results.baseline)
    return too_few(f"{results.baseline}, for the noise", len(losses), NOISE_SEEDS)


def every(judges: Iterable[Callable[[Results], Finding]]) -> Callable[[Results], Finding]:
    """The claim that all of several claims hold.

    Each is tested at the level of a single claim. A failure of one among several comparisons is
    corrected for their number, by Holm.
    """
    judges = tuple(judges)
    compared = [judge for judge in judges if isinstance(judge, Below)]

    def judge(results: Results) -> Finding:
        found = []
        for each in judges:
            if isinstance(each, Below):
                others = others_of(each, compared, results)
                corrected, *_ = holm([each.p_value(results), *others])
                found.append(each(results, corrected, 1 + len(others)))
            else:
                found.append(each(results))
        return Finding(overall(found), "; ".join(finding.because for finding in found))

    return judge


def others_of(one: Below, compared: Iterable[Below], results: Results) -> list[float]:
    """The p-values of the claim's other pairs, which correct the failure of a comparison.

    Both directions of a pair, which together show equivalence, cannot both fail: the smaller
    p-value counts.
    """
    pairs: dict[tuple[frozenset[str], str], float] = {}
    for each in compared:
        pair = frozenset((each.arm, each.other)), each.measure
        pairs[pair] = min(pairs.get(pair, math.inf), each.p_value(results))
    del pairs[frozenset((one.arm, one.other)), one.measure]
    return list(pairs.values())


def overall(findings: Iterable[Finding]) -> str:
    """The verdict on a study: one failed claim fails it, one open claim leaves it open."""
    verdicts = {finding.verdict for finding in findings}
    if NOT_REPRODUCED in verdicts:
        return NOT_REPRODUCED
    return REPRODUCED if verdicts <= {REPRODUCED} else INCONCLUSIVE


def smoothed(losses: list[float]) -> list[float]:
    """The mean of each point of a curve and up to `SMOOTH` - 1 points before it."""
    starts = (max(i + 1 - SMOOTH, 0) for i in range(len(losses)))
    return [statistics.fmean(losses[start : i + 1]) for i, start in enumerate(starts)]


def step_ratio(results: Results, arm: str, dense: str) -> dict[int, float]:
    """How many times fewer steps `arm` needs for the final held-out loss of `dense`, by seed.

    This is the final step of `dense` over the first evaluated step at which `arm` is not above the
    final loss of `dense`. Both curves are smoothed, without interpolation. It is 0 if `arm` never
    reaches that loss, and nan if one of the two diverged.
    """
    ratios = {}
    final, goals = results.values(arm), results.values(dense)
    for seed in sorted(final.keys() & goals.keys()):
        if not math.isfinite(final[seed] + goals[seed]):
            ratios[seed] = math.nan
            continue
        dense_steps, dense_losses = results.curve(dense, seed)
        steps, losses = results.curve(arm, seed)
        goal = smoothed(dense_losses)[-1]
        reached = [step for step, loss in zip(steps, smoothed(losses), strict=True) if loss <= goal]
        ratios[seed] = dense_steps[-1] / reached[0] if reached else 0.0
    return ratios


def spearman(xs: list[float], ys: list[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank; nan if a list is one tie."""

    def ranks(values: list[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]

    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return math.nan
    return statistics.correlation(ranks(xs), ranks(ys))
