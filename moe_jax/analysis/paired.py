"""Two arms over their shared seeds: how far apart they are, and what could have been seen.

Runs of one seed start from the same parameters and see the same data in the same order. Their
difference has less noise than either loss. So Student's t of the mean difference decides on a
direction. If one of two runs diverged, their difference is infinite and has no t: an exact test of
the signs decides (W. J. Dixon and A. M. Mood, The statistical sign test, 1946). It counts the seeds
in which an arm is lower, not by how much. When several arms are compared with one other, the test
is corrected for their number (S. Holm, A simple sequentially rejective multiple test procedure,
1979).
"""

import dataclasses
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from scipy import special

Seed = TypeVar("Seed", bound=Hashable)

LEVEL = 0.05  # of a test; an interval covers the mean with probability 1 - LEVEL
POWER = 0.8  # share of studies that find the smallest visible effect
MIN_SEEDS = 3  # fewer show no direction


@dataclasses.dataclass(frozen=True)
class Paired:
    """One arm minus another, seed by seed.

    >>> found = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 1.5, 2: 2.0, 3: 9.0})
    >>> dict(found.by_seed)
    {0: 1.0, 1: 0.5, 2: 1.0}
    >>> round(found.mean, 4), round(found.t(), 4), round(found.p_value(), 4)
    (0.8333, 5.0, 0.0377)

    Attributes:
      by_seed: the differences of the shared seeds; infinite if one of the two diverged, nan if both
        did.
      seed_sd: standard deviation over these seeds, pooled over the two arms: the root of the mean
        of their variances. nan below two seeds.
    """

    by_seed: Mapping[Hashable, float]
    seed_sd: float

    @property
    def num_seeds(self) -> int:
        """How many seeds both arms share."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean difference; nan without a shared seed."""
        return sum(self.by_seed.values()) / self.num_seeds if self.by_seed else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation of the differences; nan below two seeds, or if one is not finite."""
        values = list(self.by_seed.values())
        finite = all(map(math.isfinite, values))
        return statistics.stdev(values) if len(values) > 1 and finite else math.nan

    @property
    def diverged(self) -> bool:
        """Whether a run of any seed diverged."""
        return not all(map(math.isfinite, self.by_seed.values()))

    @property
    def size(self) -> float:
        """The mean difference in units of `seed_sd`."""
        return self.mean / self.seed_sd if self.seed_sd else math.nan

    def t(self, bound: float = 0.0) -> float:
        """Student's t of the mean minus a bound, with n - 1 degrees of freedom.

        Infinite if the differences are equal, and not at the bound; nan if a run diverged, and
        below two seeds.
        """
        apart = self.mean - bound
        if math.isnan(self.sd + apart):
            return math.nan
        if self.sd == 0 and apart:
            return math.copysign(math.inf, apart)
        return apart / (self.sd / math.sqrt(self.num_seeds)) if self.sd else 0.0

    def p_value(self, bound: float = 0.0) -> float:
        """Two-sided: the chance of a mean at least as far from a bound, if that is the true mean.

        If a run diverged: the chance of at least as many differences on one side, if both sides are
        equally likely. Not corrected for other comparisons; see `holm`. nan below two seeds, and if
        both runs of a seed diverged.
        """
        if self.diverged:
            return sign_test(self._apart(bound)) if self.num_seeds > 1 else math.nan
        t = self.t(bound)
        if math.isinf(t):
            return 0.0
        return float(2 * special.stdtr(self.num_seeds - 1, -abs(t)))

    def side(self, bound: float = 0.0) -> int:
        """-1 below a bound, 1 above, else 0: of the mean, or of the majority if a run diverged."""
        apart = self._apart(bound) if self.diverged else [self.mean - bound]
        balance = sum(one > 0 for one in apart) - sum(one < 0 for one in apart)
        return int(balance > 0) - int(balance < 0)

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that covers the mean over all seeds with probability 1 - `LEVEL`.

        nan below two seeds, and if a run diverged.
        """
        half = self._critical_t * self._standard_error
        return self.mean - half, self.mean + half

    @property
    def smallest_visible(self) -> float:
        """The effect that as many pairs with this spread would show in `POWER` of all studies.

        A true mean difference of this size passes the uncorrected test at `LEVEL` that often. nan
        below two seeds, and if a run diverged.
        """
        if not math.isfinite(self.sd):
            return math.nan
        noncentrality = special.nctdtrinc(self.num_seeds - 1, 1 - POWER, self._critical_t)
        return float(noncentrality) * self._standard_error

    def _apart(self, bound: float) -> list[float]:
        """The differences minus a bound; an infinite one stays so, whatever the bound."""
        return [one if math.isinf(one) else one - bound for one in self.by_seed.values()]

    @property
    def _critical_t(self) -> float:
        if self.num_seeds < 2:
            return math.nan
        return float(special.stdtrit(self.num_seeds - 1, 1 - LEVEL / 2))

    @property
    def _standard_error(self) -> float:
        return self.sd / math.sqrt(self.num_seeds) if self.by_seed else math.nan


def paired(a: Mapping[Seed, float], b: Mapping[Seed, float]) -> Paired:
    """`a` minus `b`, over the seeds that both have.

    Args:
      a: a measure of an arm by seed; infinite if it diverged.
      b: the measure of the other arm, by seed.
    """
    seeds = shared_seeds([a, b])
    pooled = math.hypot(spread(a[s] for s in seeds), spread(b[s] for s in seeds)) / math.sqrt(2)
    return Paired({seed: a[seed] - b[seed] for seed in seeds}, pooled)


def sign_test(differences: Sequence[float]) -> float:
    """Exact and two-sided: the chance of as many or more on one side, if both are equally likely.

    Differences of 0 do not count. nan if a difference is nan.

    >>> sign_test([-math.inf, -1.0, -2.0]), sign_test([math.inf, -1.0, -2.0])
    (0.25, 1.0)
    """
    if any(map(math.isnan, differences)):
        return math.nan
    above, below = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    return min(1.0, 2 * float(special.bdtr(min(above, below), above + below, 0.5)))


def shared_seeds(arms: Iterable[Mapping[Seed, float]]) -> list[Seed]:
    """The seeds that all arms have, in the order of the first; [] without arms."""
    first, *others = [*arms] or [{}]
    return [seed for seed in first if all(seed in other for other in others)]


def spread(values: Iterable[float]) -> float:
    """Standard deviation of the finite values of a sample; nan for fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.stdev(finite) if len(finite) > 1 else math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values, corrected for their number by Holm's procedure, in the given order.

    The smallest of n is multiplied by n, the next by n - 1, and none is smaller than an earlier
    one. A nan counts as a comparison and stays nan.

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    ordered = sorted(range(len(p_values)), key=lambda place: (math.isnan(p_values[place]),
                                                              p_values[place]))  # fmt: skip
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(ordered):
        if not math.isnan(p_values[place]):
            largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
            adjusted[place] = largest
    return adjusted
