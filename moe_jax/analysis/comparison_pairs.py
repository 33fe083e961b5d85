"""The configs of a comparison against one of them, by the differences of the seeds they share."""

import dataclasses
import math
from typing import Any

from moe_jax.analysis.comparison import Comparison, is_final, seeds_of
from moe_jax.analysis.names import printable
from moe_jax.analysis.paired import LEVEL, MIN_SEEDS, POWER, Paired, holm, paired
from moe_jax.analysis.table import Column
from moe_jax.config.check import require
from moe_jax.training.ways import SEES

NAME = "heldout/paired"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What the other configs are less the baseline, in held-out bits a byte.

    Attributes:
      comparison: the runs.
      baseline: the runs of the baseline by seed, as places in the comparison.
      others: of each other config that shares a seed with it, on the same held-out text, alike.
    """

    comparison: Comparison
    baseline: dict[tuple[Any, ...], int]
    others: list[dict[tuple[Any, ...], int]]

    @property
    def found(self) -> list[Paired]:
        """The differences, a config each."""
        ours = self._losses(self.baseline)
        return [paired(self._losses(other), ours) for other in self.others]

    @property
    def columns(self) -> list[Column]:
        """The table: a row a config; [] without any."""
        found = self.found
        if not found:
            return []
        intervals = [one.interval for one in found]
        return [
            Column("run", f"runs like, less {self._name(self.baseline)}",
                   tuple(map(self._name, self.others))),
            Column("pairs", "pairs", tuple(one.num_seeds for one in found)),
            Column(f"{NAME}/mean", "bits/byte", tuple(number(one.mean) for one in found), "+.4f"),
            Column(f"{NAME}/low", "95 % from", tuple(number(low) for low, _ in intervals), "+.4f"),
            Column(f"{NAME}/high", "to", tuple(number(high) for _, high in intervals), "+.4f"),
            Column(f"{NAME}/size", "seed sd", tuple(number(one.size) for one in found), "+.1f"),
            Column(f"{NAME}/p", "p", tuple(map(number, self._p_values)), ".2g"),
            Column(f"{NAME}/smallest_visible", "could have been seen",
                   tuple(number(one.smallest_visible) for one in found), ".4f"),
        ]  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """What the columns are, and which configs a direction is shown of."""
        if not self.others:
            return []
        return [
            "Pairs are runs of one seed. p is of Student's t of their differences, corrected by "
            f"Holm for {len(self.others)} compared configs. Below {LEVEL:g}, and from {MIN_SEEDS} "
            f"pairs on, it shows a direction: {', '.join(self._shown) or 'none here'}. Could have "
            f"been seen: what {POWER:.0%} of comparisons with as many pairs would find, before "
            "the correction."
        ]

    @property
    def _p_values(self) -> list[float]:
        return holm([one.p_value() for one in self.found])

    @property
    def _shown(self) -> list[str]:
        """The configs that differ, with the side."""
        pairs = zip(self.others, self.found, self._p_values, strict=True)
        return [
            f"{self._name(other)} is {'lower' if one.mean < 0 else 'higher'}"
            for other, one, p_value in pairs
            if one.num_seeds >= MIN_SEEDS and p_value < LEVEL
        ]

    def _losses(self, runs: dict[tuple[Any, ...], int]) -> dict[tuple[Any, ...], float]:
        return {seed: loss_of(self.comparison, place) for seed, place in runs.items()}

    def _name(self, runs: dict[tuple[Any, ...], int]) -> str:
        """A config by its best run, with its mark."""
        entry = self.comparison.entries[min(runs.values())]
        mark = entry.mark(self.comparison.ways[0])
        return printable(entry.name) + f" ({mark})" * bool(mark)


def pairs_of(comparison: Comparison, baseline: str = "") -> Pairs:
    """Compares configs that were run with the same seeds.

    Args:
      comparison: the runs.
      baseline: the name of a run of the baseline; "": the first by name among the configs that were
        run with several seeds, the causal ones first.

    Raises:
      ValueError: there is no run of this name with a final score.
    """
    groups = [final_runs(comparison, group) for group in all_groups(comparison)]
    groups = [group for group in groups if group]

    def key(group: dict[tuple[Any, ...], int]) -> tuple[Any, ...]:
        entries = [comparison.entries[place] for place in group.values()]
        return entries[0].mark(comparison.ways[0]) == SEES, min(entry.name for entry in entries)

    if baseline:
        named = [
            group
            for group in groups
            if any(comparison.entries[place].name == baseline for place in group.values())
        ]
        require(
            bool(named),
            "--baseline names a run that is finished and scored on the whole held-out split",
            baseline,
            f"Name one of {', '.join(sorted(min_name(comparison, g) for g in groups)) or 'them'}",
        )
        ours = named[0]
    else:
        several = sorted((group for group in groups if len(group) > 1), key=key)
        ours = several[0] if several else {}
    texts = {comparison.texts[place] for place in ours.values()}
    others = [
        other
        for other in groups
        if other is not ours
        and len(other.keys() & ours.keys()) > 1
        and {comparison.texts[place] for place in other.values()} == texts
    ]
    return Pairs(comparison, ours, others)


def min_name(comparison: Comparison, group: dict[tuple[Any, ...], int]) -> str:
    """The first name of the runs of a config."""
    return min(comparison.entries[place].name for place in group.values())


def all_groups(comparison: Comparison) -> list[list[int]]:
    """The runs of each config, and those of a config that was run once, by their places."""
    grouped = comparison.groups
    known = {place for group in grouped for place in group}
    alone = [[place] for place in range(len(comparison.entries)) if place not in known]
    return [*grouped, *alone]


def final_runs(comparison: Comparison, group: list[int]) -> dict[tuple[Any, ...], int]:
    """The run of each seed that has a final score."""
    entries = comparison.entries
    return {
        seeds_of(entries[place].settings): place
        for place in reversed(group)
        if comparison.ways
        and entries[place].settings
        and is_final(entries[place])
        and entries[place].score.loss(comparison.ways[0], "bits_per_byte") is not None
    }


def loss_of(comparison: Comparison, place: int) -> float:
    """The held-out bits a byte of a run, of the first way of evaluation."""
    loss = comparison.entries[place].score.loss(comparison.ways[0], "bits_per_byte")
    return math.nan if loss is None else float(loss)


def number(value: float) -> float | None:
    """None of nan, which a table shows as nothing."""
    return None if math.isnan(value) else value
