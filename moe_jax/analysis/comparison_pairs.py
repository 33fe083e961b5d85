"""The configs of a comparison against a baseline, by the differences on shared seeds."""

import dataclasses
import math
from typing import Any

from moe_jax.analysis.comparison import Comparison
from moe_jax.analysis.comparison_seeds import SeedRuns, shared_name
from moe_jax.analysis.names import printable
from moe_jax.analysis.paired import LEVEL, MIN_SEEDS, POWER, Paired, holm, paired
from moe_jax.analysis.table import Column, of_all
from moe_jax.config.check import require
from moe_jax.training.loss_labels import SEES

NAME = "heldout/paired"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The other configs minus the baseline, in held-out bits per byte.

    A pair is a seed that counts in both configs. A config lacks pairs if a seed that both were run
    with does not count, for example because it diverged. The remaining pairs were then selected by
    outcome. They have a mean, but no interval, no p and no direction.

    Attributes:
      comparison: the runs.
      baseline: the runs of the baseline.
      others: the runs of each other config that was run with several of the baseline's seeds and is
        not scored on other held-out text.
    """

    comparison: Comparison
    baseline: SeedRuns
    others: list[SeedRuns]

    @property
    def found(self) -> list[Paired]:
        """The differences, one per config."""
        ours = losses_of(self.comparison, self.baseline)
        return [paired(losses_of(self.comparison, other), ours) for other in self.others]

    @property
    def tested(self) -> list[Paired]:
        """The differences of the configs that lack no pair; none for the others."""
        return [
            one if one.num_seeds == len(self._shared(other)) else paired({}, {})
            for one, other in zip(self.found, self.others, strict=True)
        ]

    @property
    def columns(self) -> list[Column]:
        """The table, a row per config; [] without any."""
        found, tested = self.found, self.tested
        if not found:
            return []
        intervals = [one.interval for one in tested]
        return [
            Column("run", f"runs, less {self._name(self.baseline)}",
                   tuple(map(self._name, self.others))),
            of_all("pairs", "pairs", [one.num_seeds for one in found],
                   [len(self._shared(other)) for other in self.others]),
            Column(f"{NAME}/mean", "bits/byte", tuple(number(one.mean) for one in found), "+.4f"),
            Column(f"{NAME}/low", "95 % from", tuple(number(low) for low, _ in intervals), "+.4f"),
            Column(f"{NAME}/high", "to", tuple(number(high) for _, high in intervals), "+.4f"),
            Column(f"{NAME}/size", "in seed sd", tuple(number(one.size) for one in found), "+.1f"),
            Column(f"{NAME}/p", "p", tuple(map(number, self._p_values)), ".2g"),
            Column(f"{NAME}/smallest_visible", "could have been seen",
                   tuple(number(one.smallest_visible) for one in tested), ".4f"),
        ]  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """What the columns mean, and for which configs a direction is shown."""
        if not self.others:
            return []
        return [
            "Pairs are runs of one seed. p is of Student's t of their differences, corrected by "
            f"Holm for {len(self.others)} compared configs. Below {LEVEL:g}, and from {MIN_SEEDS} "
            f"pairs on, it shows a direction: {', '.join(self._shown) or 'none here'}. Could have "
            f"been seen: what {POWER:.0%} of comparisons with as many pairs would find, before "
            "the correction.",
            *(f"No direction is shown of {lacks}." for lacks in self._lacking),
        ]

    @property
    def _p_values(self) -> list[float]:
        return holm([one.p_value() for one in self.tested])

    @property
    def _shown(self) -> list[str]:
        """The configs that differ, with the direction."""
        pairs = zip(self.others, self.tested, self._p_values, strict=True)
        return [
            f"{self._name(other)} is {'lower' if one.side() < 0 else 'higher'}"
            for other, one, p_value in pairs
            if one.num_seeds >= MIN_SEEDS and p_value < LEVEL
        ]

    @property
    def _lacking(self) -> list[str]:
        """The configs that lack pairs, and why."""
        lacking = []
        for other, one in zip(self.others, self.found, strict=True):
            shared = self._shared(other)
            if one.num_seeds < len(shared):
                both = (self.comparison.left_out(runs, shared) for runs in (self.baseline, other))
                why = "; ".join(filter(None, both)) or "some have no loss in bits a byte"
                lacking.append(
                    f"{self._name(other)}, with {one.num_seeds} of {len(shared)} pairs: {why}"
                )
        return lacking

    def _shared(self, other: SeedRuns) -> set[Any]:
        return self.baseline.seeds & other.seeds

    def _name(self, runs: SeedRuns) -> str:
        """The shared name of a config's runs, and the mark of the first one that counts."""
        entries = self.comparison.entries
        mark = entries[runs.first].mark(self.comparison.evaluations[0])
        names = shared_name([entries[place].name for place in runs.places])
        return printable(names) + f" ({mark})" * bool(mark)


def pairs_of(comparison: Comparison, baseline: str = "") -> Pairs:
    """Compares configs that were run with the same seeds.

    Args:
      comparison: the runs.
      baseline: the name of a run of the baseline; "": the first by name among the configs that were
        run with several seeds, causal ones first, however many of them are finished.

    Raises:
      ValueError: there is no run of this name with a final score.
    """
    configs = [comparison.by_seed(group) for group in all_groups(comparison)]
    scored = [config for config in configs if losses_of(comparison, config)]

    def key(config: SeedRuns) -> tuple[bool, str]:
        entry = comparison.entries[config.first]
        names = [comparison.entries[place].name for place in config.places]
        return entry.mark(comparison.evaluations[0]) == SEES, min(names)

    if baseline:
        named = [config for config in scored if baseline in names_of(comparison, config)]
        names = sorted(first_name(comparison, config) for config in scored)
        require(
            bool(named),
            "--baseline must name a finished run, scored on the whole held-out split",
            baseline,
            f"Name one of {', '.join(names)}" if names else "There is none: leave out --baseline",
        )
        ours = named[0]
    else:
        several = [config for config in scored if len(config.seeds) > 1]
        ours = min(several, key=key, default=SeedRuns({}, {}))
    text = {comparison.texts[place] for place in ours.counted.values()}
    others = [
        other
        for other in configs
        if other is not ours
        and len(other.seeds & ours.seeds) > 1
        and {comparison.texts[place] for place in other.counted.values()} <= text
        and (other in scored or not other.counted)
    ]
    return Pairs(comparison, ours, others)


def names_of(comparison: Comparison, config: SeedRuns) -> list[str]:
    """The names of the runs of a config that count."""
    return [comparison.entries[place].name for place in config.counted.values()]


def first_name(comparison: Comparison, config: SeedRuns) -> str:
    """The first name in `names_of`."""
    return min(names_of(comparison, config))


def all_groups(comparison: Comparison) -> list[list[int]]:
    """The places of the runs of each config, including configs that were run once."""
    grouped = comparison.groups
    known = {place for group in grouped for place in group}
    alone = [[place] for place in range(len(comparison.entries)) if place not in known]
    return [*grouped, *alone]


def losses_of(comparison: Comparison, config: SeedRuns) -> dict[Any, float]:
    """The held-out bits per byte of the seeds that count, by the first evaluation."""
    found = [
        (seed, comparison.entries[place].score.loss(name, "bits_per_byte"))
        for name in comparison.evaluations[:1]
        for seed, place in config.counted.items()
    ]
    return {seed: loss for seed, loss in found if loss is not None and math.isfinite(loss)}


def number(value: float) -> float | None:
    """The value, or None for nan, which a table shows as "-"."""
    return None if math.isnan(value) else value
