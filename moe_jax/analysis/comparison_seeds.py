"""The runs of one config, seed by seed: which of them count, in means and in pairs.

A run has a result if it has a final score or diverged. A seed counts if exactly one run has a
result, and that result is a score. If a seed has two results, neither counts: taking one of them,
by any rule, would be a choice among results.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.analysis.runs import FINISHED, Entry, natural_key

CLASH = "one config and seed: compare one of them"
DIVERGED = "diverged"
OTHER_TEXT = "on other held-out text"
Seeds = tuple[Any, ...]  # of a run; see `seeds_of`


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Why a seed does not count.

    Attributes:
      places: of the runs with a result; if the seed has none, of all its runs.
      why: the reason in words.
    """

    places: tuple[int, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class SeedRuns:
    """The runs of a config.

    Attributes:
      counted: the place of the run that counts, by seed; all are scored on the same text.
      left_out: the other seeds.
    """

    counted: Mapping[Seeds, int]
    left_out: Mapping[Seeds, LeftOut]

    @property
    def seeds(self) -> set[Seeds]:
        """All seeds that have a run."""
        return self.counted.keys() | self.left_out.keys()

    @property
    def places(self) -> list[int]:
        """The places of the runs, those that count first."""
        left_out = [place for one in self.left_out.values() for place in one.places]
        return [*self.counted.values(), *left_out]

    @property
    def first(self) -> int:
        """The place of the first run that counts; if none counts, of the first run."""
        return self.places[0]


def seed_runs(entries: Sequence[Entry], texts: Sequence[str], group: Sequence[int]) -> SeedRuns:
    """Finds which runs of one config count; their order in a comparison does not matter.

    Args:
      entries: the runs of a comparison.
      texts: which held-out text each is scored on; of several texts, the first counts.
      group: the places of the config's runs.
    """
    runs: dict[Seeds, list[int]] = {}
    for place in sorted(group, key=lambda place: natural_key(entries[place].directory)):
        runs.setdefault(seeds_of(entries[place].settings), []).append(place)
    counted, left_out = {}, {}
    for seed, places in runs.items():
        results = [place for place in places if has_result(entries[place])]
        why = " and ".join(dict.fromkeys(entries[place].state for place in places))
        if len(results) > 1:
            why = CLASH
        elif results and entries[results[0]].diverged:
            why = DIVERGED
        elif results:
            counted[seed] = results[0]
            continue
        left_out[seed] = LeftOut(tuple(results or places), why)
    text = min((texts[place] for place in counted.values()), default="")
    others = {seed: place for seed, place in counted.items() if texts[place] != text}
    left_out |= {seed: LeftOut((place,), OTHER_TEXT) for seed, place in others.items()}
    return SeedRuns({s: place for s, place in counted.items() if s not in others}, left_out)


def shared_name(names: Sequence[str]) -> str:
    """One name for the runs of a config: the first, unless only numbers differ.

    >>> shared_name(["rate=0.1,seed=0", "rate=0.1,seed=1"])
    'rate=0.1,seed=*'
    """
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({(len(some), *some[::2]) for some in pieces}) > 1:
        return names[0]
    return "".join(some[0] if len(set(some)) == 1 else "*" for some in zip(*pieces, strict=True))


def has_result(entry: Entry) -> bool:
    """Whether the run ended as another run of its config and seed would end."""
    return entry.diverged or is_final(entry)


def is_final(entry: Entry) -> bool:
    """Whether the run's score is of its last step and the whole held-out split."""
    return entry.state == FINISHED and entry.score.whole


def seeds_of(settings: Mapping[str, Any]) -> Seeds:
    """The seeds of a run."""
    return settings.get("seed"), settings.get("data", {}).get("seed")
