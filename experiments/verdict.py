"""From results to verdicts: paired differences, the noise floor, and claims that can fail.

The ground rules: a direction is shown by a mean paired difference of more than twice the noise,
which is the larger of the two arms' pooled standard deviation over the seeds they share and that
of the baseline's loss over five seeds or more; "no worse" is within once the noise. Fewer than
three paired seeds show nothing, nor does anything without the baseline's five. A run that diverged
has an infinite loss.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping

from experiments.results import LOSS, Results

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"
NOT_RUN = "not run"
MIN_SEEDS = 3
NOISE_SEEDS = 5  # of the baseline
MARGIN = 2.0  # times the noise
SMOOTH = 3  # points of a held-out curve that are averaged before steps are compared


@dataclasses.dataclass(frozen=True)
class Finding:
    """What results say of a claim: one of the three verdicts, and the numbers behind it."""

    verdict: str
    because: str


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


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm less another, seed by seed.

    Attributes:
      by_seed: the differences, infinite where one of the two diverged, nan where both did.
      noise: the larger of pooled standard deviation and noise floor; nan below two seeds, and
        without a floor.
    """

    by_seed: Mapping[int, float]
    noise: float

    @property
    def mean(self) -> float:
        """Mean over the seeds that both arms have."""
        return sum(self.by_seed.values()) / len(self.by_seed) if self.by_seed else math.nan


def spread(values: Iterable[float]) -> float:
    """Standard deviation of the finite values of a sample; nan of fewer than two."""
    values = [value for value in values if math.isfinite(value)]
    return statistics.stdev(values) if len(values) > 1 else math.nan


def noise_floor(results: Results) -> float:
    """Standard deviation of the baseline's loss over its seeds; nan of fewer than `NOISE_SEEDS`."""
    losses = results.values(results.baseline)
    return spread(losses.values()) if len(losses) >= NOISE_SEEDS else math.nan


def difference(results: Results, arm: str, other: str, measure: str = LOSS) -> Difference:
    """A measure of `arm` less that of `other`, for the seeds that both have.

    Args:
      results: of the study.
      arm: the one.
      other: the other.
      measure: a loss in bits a byte, as the noise floor is.
    """
    a, b = results.values(arm, measure), results.values(other, measure)
    seeds = sorted(a.keys() & b.keys())
    pooled = math.hypot(spread(a[s] for s in seeds), spread(b[s] for s in seeds)) / math.sqrt(2)
    floor = noise_floor(results)
    noise = math.nan if math.isnan(pooled + floor) else max(pooled, floor)
    return Difference({seed: a[seed] - b[seed] for seed in seeds}, noise)


def lower(arm: str, other: str, measure: str = LOSS) -> Callable[[Results], Finding]:
    """The claim that `arm` ends below `other`, by more than twice the noise.

    Above it by as much is "not reproduced"; nearer than that is "inconclusive".
    """
    return mean_difference(arm, other, measure, reproduced_below=-MARGIN)


def not_above(arm: str, other: str, measure: str = LOSS) -> Callable[[Results], Finding]:
    """The claim that `arm` ends no more than once the noise above `other`.

    Above it by more than twice the noise is "not reproduced"; between the two "inconclusive".
    """
    return mean_difference(arm, other, measure, reproduced_below=1.0)


def mean_difference(
    arm: str, other: str, measure: str, *, reproduced_below: float
) -> Callable[[Results], Finding]:
    """The claim that the mean difference lies below a bound, in multiples of the noise.

    Above `MARGIN` times the noise it is not reproduced, between the two it is inconclusive.
    """

    def judge(results: Results) -> Finding:
        found = difference(results, arm, other, measure)
        if len(found.by_seed) < MIN_SEEDS:
            return too_few(f"{arm} and {other}", len(found.by_seed))
        if math.isnan(noise_floor(results)):
            return too_few_for_the_noise(results)
        names = f"{results.named(arm, measure)} less {results.named(other, measure)}"
        because = (
            f"{names}: {found.mean:+.4f} {measure} over {len(found.by_seed)} seeds, "
            f"noise {found.noise:.4f}"
        )
        noise = found.noise if math.isfinite(found.mean) else 0.0
        if found.mean < reproduced_below * noise:
            return Finding(REPRODUCED, because)
        return Finding(NOT_REPRODUCED if found.mean > MARGIN * noise else INCONCLUSIVE, because)

    return judge


def in_every_seed(
    what: str, by_seed: Mapping[int, float], *, least: float = -math.inf, most: float = math.inf
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
    """The claim that all of some claims hold."""
    judges = tuple(judges)

    def judge(results: Results) -> Finding:
        found = [each(results) for each in judges]
        return Finding(overall(found), "; ".join(finding.because for finding in found))

    return judge


def overall(findings: Iterable[Finding]) -> str:
    """The verdict of a study: one claim that fails fails it, one that is open leaves it open."""
    verdicts = {finding.verdict for finding in findings}
    for verdict in (NOT_REPRODUCED, INCONCLUSIVE):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


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
