"""From results to verdicts: paired differences, and claims that can fail.

A direction is decided by the differences of the seeds that both arms have: by Student's t of their
mean (`moe_jax.analysis.paired`). "Lower" asks for a mean below 0, at 5 % from both sides. "Not
above" asks for one below a margin, at 5 % from one side, as tests of equivalence do (D. J.
Schuirmann, 1987). A claim that several comparisons hold is reproduced where each is shown: that
needs no correction (R. L. Berger, 1982). It is not reproduced where one is shown to fail, corrected
for their number by Holm. Fewer seeds than the study asks for show nothing. A run that diverged has
an infinite loss. Where one did, the signs of the differences decide, by an exact test: fewer than
six pairs show nothing then, five with a margin.
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
MARGIN = 0.03  # bits a byte: less is no difference; 16 experts gain 0.15 in 2,400 steps of `small`
SMOOTH = 3  # points of a held-out curve that are averaged before steps are compared


@dataclasses.dataclass(frozen=True)
class Finding:
    """What results say of a claim, and the numbers behind it.

    One of the three verdicts, or that arms of it are not run yet.
    """

    verdict: str
    because: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """What results of one size say of the claims of a study, in their order.

    Attributes:
      findings: by the rule of today; [] without results.
      older: by the rule under which some of the runs were made, from before differences were
        paired; [] where all are of today's.
    """

    findings: list[Finding]
    older: list[Finding]

    @property
    def verdict(self) -> str:
        """Of the study."""
        return overall(self.findings) if self.findings else NOT_RUN

    @property
    def is_run(self) -> bool:
        """Whether there are runs for one of the claims."""
        return any(finding.verdict != NOT_RUN for finding in self.findings)

    @property
    def older_verdict(self) -> str:
        """Of the study, under the earlier rule; "" if that is today's."""
        return overall(self.older) if self.older else ""

    def of(self, claims: Iterable[int]) -> "Judged":
        """What is said of some claims, by their places."""
        places = list(claims)
        return Judged(
            *([found[p] for p in places if found] for found in (self.findings, self.older))
        )


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement, written before the run, and the function that judges it.

    Attributes:
      statement: in words.
      judge: what results say of it.
      settles: the common claim about MoE that it stands for on the top page; "": none.
    """

    statement: str
    judge: Callable[[Results], Finding]
    settles: str = ""


def difference(results: Results, arm: str, other: str, measure: str = LOSS) -> Paired:
    """A measure of `arm` less that of `other`, for the seeds that both have."""
    return paired(results.values(arm, measure), results.values(other, measure))


@dataclasses.dataclass(frozen=True)
class Below:
    """The claim that an arm is below another, or above it by less than a margin.

    Attributes:
      arm: the one.
      other: the other.
      measure: of both; smaller is better.
      margin: that `arm` may be above, in the unit of the measure.
    """

    arm: str
    other: str
    measure: str = LOSS
    margin: float = 0.0

    def found(self, results: Results) -> Paired:
        """The difference that it is about."""
        return difference(results, self.arm, self.other, self.measure)

    def p_value(self, results: Results) -> float:
        """Of the mean difference against the margin, not corrected; nan of too few seeds.

        From both sides; with a margin from one.
        """
        found = self.found(results)
        if found.num_seeds < results.least_seeds:
            return math.nan
        return found.p_value(self.margin) / (2 if self.margin else 1)

    def __call__(self, results: Results, corrected: float | None = None, of: int = 1) -> Finding:
        """Reproduced below the margin, not reproduced above it, if the p-value shows one of them.

        Args:
          results: of the study.
          corrected: the p-value that shows it to be above, where several arms are compared.
          of: so many comparisons.
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
        shown = p_value < LEVEL  # never of nan
        return Finding(
            (REPRODUCED if below else NOT_REPRODUCED) if shown else INCONCLUSIVE, because
        )

    def _before_pairs(self, found: Paired, results: Results, names: str) -> Finding:
        """The finding of the rule of then."""
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

    Shown the other way round it is "not reproduced"; where nothing is shown, "inconclusive".
    """
    return Below(arm, other, measure)


def not_above(arm: str, other: str, measure: str = LOSS, margin: float = MARGIN) -> Below:
    """The claim that `arm` ends above `other` by less than a margin.

    Shown to be above by more it is "not reproduced"; where nothing is shown, "inconclusive".
    """
    return Below(arm, other, measure, margin)


def in_words(found: Paired, measure: str) -> str:
    """A difference with its interval, its size, and what could have been seen."""
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
    """A number of measures of some arms, for every seed that all of them have.

    Args:
      results: of the study.
      number: of one seed, from a value for each of `measured`.
      measured: arms, each with a measure of it.
    """
    values = [results.values(arm, measure) for arm, measure in measured]
    return {seed: number(*(each[seed] for each in values)) for seed in shared_seeds(values)}


def ratio(a: float, b: float) -> float:
    """How many times `b` the other is; of a measure of 0, very many."""
    return a / max(b, 1e-9)


def least_fall(*values: float) -> float:
    """The smallest fall from one value to the next."""
    return min(map(operator.sub, values, values[1:]))


def in_every_seed(
    what: str, by_seed: Mapping[Any, float], *, least: float = -math.inf, most: float = math.inf
) -> Finding:
    """Whether a number lies within bounds in every seed, of three or more; infinite ones do not."""
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
    """The finding where runs are lacking."""
    return Finding(INCONCLUSIVE, f"{what}: {num_seeds} seeds of the {needed} that are needed")


def too_few_for_the_noise(results: Results) -> Finding:
    """The finding where runs of the baseline are lacking."""
    losses = results.values(results.baseline)
    return too_few(f"{results.baseline}, for the noise", len(losses), NOISE_SEEDS)


def every(judges: Iterable[Callable[[Results], Finding]]) -> Callable[[Results], Finding]:
    """The claim that all of some claims hold.

    Each is shown at the level of one. A failure of one among several comparisons is corrected for
    their number, by Holm.
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
    """The p values that the failure of a comparison is corrected for: of the claim's other pairs.

    Both ways of one pair, which show that it is alike, cannot both fail: the smaller counts.
    """
    pairs: dict[tuple[frozenset[str], str], float] = {}
    for each in compared:
        pair = frozenset((each.arm, each.other)), each.measure
        pairs[pair] = min(pairs.get(pair, math.inf), each.p_value(results))
    del pairs[frozenset((one.arm, one.other)), one.measure]
    return list(pairs.values())


def overall(findings: Iterable[Finding]) -> str:
    """The verdict of a study: one claim that fails fails it, one that is open leaves it open."""
    verdicts = {finding.verdict for finding in findings}
    if NOT_REPRODUCED in verdicts:
        return NOT_REPRODUCED
    return REPRODUCED if verdicts <= {REPRODUCED} else INCONCLUSIVE


def smoothed(losses: list[float]) -> list[float]:
    """Means of each point of a curve and the (at most `SMOOTH` - 1) points before it."""
    starts = (max(i + 1 - SMOOTH, 0) for i in range(len(losses)))
    return [statistics.fmean(losses[start : i + 1]) for i, start in enumerate(starts)]


def step_ratio(results: Results, arm: str, dense: str) -> dict[int, float]:
    """How many times fewer steps `arm` takes to the final held-out loss of `dense`, by seed.

    Final step of `dense` over the first evaluated step at which `arm` is no higher than `dense` in
    the end, both curves smoothed alike, nothing interpolated; 0 where it never gets there, nan
    where one of the two diverged.
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
    """Rank correlation of Spearman; ties share their mean rank."""

    def ranks(values: list[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]

    return statistics.correlation(ranks(xs), ranks(ys))
