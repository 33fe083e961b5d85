"""Runs side by side: their differing settings, their results, and what must not be compared.

Held-out bits per byte compare across tokenizers, nats per token do not. Neither compares across
different held-out text. Runs that differ only in their seeds are one line of a table of means.
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from moe_jax.analysis.comparison_seeds import SeedRuns, is_final, seed_runs, seeds_of, shared_name
from moe_jax.analysis.names import printable
from moe_jax.analysis.runs import Entry, resolved
from moe_jax.analysis.table import ORDERS, Column, of_all
from moe_jax.config.check import require
from moe_jax.training.files import CONFIG_FILE, RUN_FILE, read_json
from moe_jax.training.loss_labels import CAPACITIES, SEES
from moe_jax.training.run_record import extensions
from moe_jax.training.workdir import IMPORTED_FILE

MAX_SETTINGS = 12  # columns of a table
SEEDS = ("config.seed", "config.data.seed")
# Settings that name a run which this one starts from or learns from.
SOURCES = ("config.init_from.path", "config.training.loss.teacher")
# Settings that tell nothing about a run, and get no column.
UNINTERESTING = (
    "config.name", "config.data.cache_dir", "config.training.trackers",
    "config.training.evaluation_batches",
)  # fmt: skip
UNITS = {"bits_per_byte": "bits/byte", "nats_per_token": "nats/token"}
NOT_CAUSAL = ", so that its loss is not that of a causal model and is ranked apart"
SECTION = "set"  # represents a section without a kind
SAME_TEXT = 1e-3  # of the bytes; the first tokens of domains are never targets
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Some runs, in order.

    Attributes:
      entries: the runs, the best of each held-out text first, then those without a final score.
      texts: which held-out text each is scored on, "A", "B", ...; "" without a score.
    """

    entries: tuple[Entry, ...]
    texts: tuple[str, ...]

    @property
    def tokenizers(self) -> list[str]:
        """The names of the different tokenizers."""
        known: list[Entry] = []
        for entry in self.entries:
            if entry.settings and not any(entry.same(one, "tokenizer") for one in known):
                known.append(entry)
        return [entry.named("tokenizer") for entry in known]

    @property
    def evaluations(self) -> list[str]:
        """The evaluations that any run has: names of `CAPACITIES`."""
        return [
            name for name in CAPACITIES if any(name in entry.score.losses for entry in self.entries)
        ]

    @property
    def columns(self) -> list[Column]:
        """The table of the runs."""
        entries = self.entries
        columns = [
            Column("run", "run", tuple(printable(entry.name) for entry in entries)),
            Column("state", "state", tuple(entry.state for entry in entries)),
            *self.settings_columns,
            Column("parameters", "parameters", self._parameters("total"), ","),
            Column("active_parameters", "active", self._parameters("active"), ","),
            Column("steps", "steps", tuple(entry.step for entry in entries), ",",
                   tuple(steps_left(entry) for entry in entries)),
            Column("num_steps", "of", tuple(entry.num_steps for entry in entries), ","),
            *self.loss_columns,
            Column("tokens_per_s", "tokens/s", tuple(entry.tokens_per_s for entry in entries),
                   ",.0f"),
            Column("heldout_text", "text", self.texts),
            Column("note", "note", tuple(printable(entry.note) for entry in entries)),
        ]  # fmt: skip
        return columns

    @property
    def shown_columns(self) -> list[Column]:
        """The columns without uninformative ones; of many settings, only the first."""
        hidden = {"num_steps", *self.hidden_settings}
        hidden |= {"heldout_text"} if len(set(self.texts) - {""}) < 2 else set()
        hidden |= {"note"} if not any(entry.note for entry in self.entries) else set()
        return [column for column in self.columns if column.name not in hidden]

    @property
    def hidden_settings(self) -> list[str]:
        """The names of the settings that only the CSV file contains."""
        return [column.name for column in self.settings_columns[MAX_SETTINGS:]]

    @property
    def settings_columns(self) -> list[Column]:
        """The settings in which the runs differ, by their full names."""
        settings = [entry.settings for entry in self.entries]
        return [
            Column(path, f"--{path}", values)
            for path, values in differing(settings).items()
            if path not in UNINTERESTING
        ]

    @property
    def loss_columns(self) -> list[Column]:
        """The held-out losses, by evaluation and unit."""
        columns = []
        for kind in self.evaluations:
            there = [entry for entry in self.entries if kind in entry.score.losses]
            label = " or ".join(dict.fromkeys(printable(entry.label(kind)) for entry in there))
            for unit, title in UNITS.items():
                values = tuple(entry.score.loss(kind, unit) for entry in self.entries)
                marks = tuple(
                    ""
                    if value is None
                    else "~" * (not is_final(entry)) + "*" * bool(entry.mark(kind))
                    for entry, value in zip(self.entries, values, strict=True)
                )
                name = f"heldout/{kind}/{unit}"
                columns.append(Column(name, f"{label}, {title}", values, ".4f", marks))
        return columns

    @property
    def groups(self) -> list[list[int]]:
        """The places of the runs of each config that was run with several seeds.

        Runs that were extended in the same way are a group of their own. Sources of runs may differ
        in their seeds too.
        """
        return self._grouped(source_without_seeds)

    def _grouped(self, source: Callable[[str], str]) -> list[list[int]]:
        """The groups of runs of several seeds, given what is compared of the runs they start from.

        Args:
          source: replaces the path of a source.
        """
        places: dict[str, list[int]] = {}
        for place, entry in enumerate(self.entries):
            if entry.settings:
                # A run that was extended may differ from one that had as many steps from the start.
                key = f"{without_seeds(entry.deciding, source)} {extensions(entry.run.record)}"
                places.setdefault(key, []).append(place)
        return [
            group
            for group in places.values()
            if len({seeds_of(self.entries[place].settings) for place in group}) > 1
        ]

    def by_seed(self, group: list[int]) -> SeedRuns:
        """The runs of a config that count, in means and in pairs, and why others do not."""
        return seed_runs(self.entries, self.texts, group)

    @property
    def seed_columns(self) -> list[Column]:
        """The table of means over seeds; [] if no two runs differ only in their seeds."""
        groups = self.groups
        if not groups:
            return []
        firsts = [group[0] for group in groups]
        names = [[self.entries[place].name for place in group] for group in groups]
        columns = [Column("run", "runs", tuple(printable(shared_name(some)) for some in names))]
        columns += [
            Column(column.name, column.title, tuple(column.values[place] for place in firsts))
            for column in self.settings_columns[:MAX_SETTINGS]
            if column.name not in SEEDS
        ]
        extended = tuple(self.entries[place].run.extended for place in firsts)
        if any(extended):
            columns.append(Column("extended", "extended", extended))
        runs = [self.by_seed(group) for group in groups]
        done = [list(one.counted.values()) for one in runs]
        columns.append(of_all("n", "n", map(len, done), [len(one.seeds) for one in runs]))
        for column in self.loss_columns:
            found = [[column.values[place] for place in used] for used in done]
            values = [[value for value in some if value is not None] for some in found]
            columns += [
                Column(f"{column.name}/mean", f"{column.title}, mean", tuple(map(mean, values)),
                       ".4f"),
                Column(f"{column.name}/sd", "sd", tuple(map(deviation, values)), ".4f"),
            ]  # fmt: skip
        return columns

    def _parameters(self, kind: str) -> tuple[int | None, ...]:
        return tuple(entry.parameters.get(kind) for entry in self.entries)

    @property
    def notes(self) -> list[str]:
        """What a reader must know before comparing, a sentence or two each."""
        found = []
        if len(self.tokenizers) > 1:
            found.append(
                f"The runs have {len(self.tokenizers)} tokenizers: nats/token of different "
                "tokenizers do not compare. Compare bits/byte."
            )
        letters = sorted(set(self.texts) - {""})
        if len(letters) > 1:
            found.append(
                "The runs were scored on different held-out text, "
                + "; ".join(f"{letter}: {self._text(letter)}" for letter in letters)
                + ". Losses compare within one text only."
            )
        if any(not is_final(entry) and entry.score.losses for entry in self.entries):
            found.append(
                "~: no final score. It is of an earlier step, of a sample of the held-out split "
                "(training.evaluation_batches), or of a damaged run."
            )
        if any(entry.run.extended for entry in self.entries):
            found.append(
                "Extended runs followed the schedules of fewer steps at first. Means over seeds "
                "keep them apart from runs that had all their steps from the start."
            )
        if left_out := "; ".join(filter(None, map(self.left_out, map(self.by_seed, self.groups)))):
            found.append(f"Means and pairs are of seeds with one final score. Not: {left_out}.")
        grouped = {place for group in self.groups for place in group}
        for group in self._grouped(lambda path: "a run" if path else ""):
            if not grouped & set(group):
                found.append(
                    "No means over seeds, since the runs start from or learn from models that are "
                    "no trained runs or are not there (init_from.path, training.loss.teacher): "
                    f"{', '.join(printable(self.entries[place].name) for place in group)}."
                )
        if self.hidden_settings:
            found.append(
                f"The runs differ in {len(self.hidden_settings)} more settings, which --csv lists: "
                f"{', '.join(self.hidden_settings)}."
            )
        marks: dict[str, list[str]] = {}
        for entry in self.entries:
            for mark in dict.fromkeys(filter(None, map(entry.mark, entry.score.losses))):
                marks.setdefault(mark, []).append(entry.name)
        found += [
            f"*: {printable(mark)}{NOT_CAUSAL * (mark == SEES)}: {printable(', '.join(names))}."
            for mark, names in marks.items()
        ]
        return found

    def left_out(self, runs: SeedRuns, seeds: Collection[Any] | None = None) -> str:
        """The runs of a config that do not count, and why; `seeds` None: of all seeds."""
        found = [one for seed, one in runs.left_out.items() if seeds is None or seed in seeds]
        names = [[printable(self.entries[place].name) for place in one.places] for one in found]
        return "; ".join(
            f"{' and '.join(some)} ({one.why})" for some, one in zip(names, found, strict=True)
        )

    def _text(self, letter: str) -> str:
        entry = self.entries[self.texts.index(letter)]
        data = entry.settings.get("data", {})
        size = f"{entry.score.num_bytes:,} bytes" if entry.score.num_bytes else "size not recorded"
        fraction = data.get("heldout_fraction")
        return f"{size} of data.corpus={data.get('corpus')!r}, data.heldout_fraction={fraction}"


def compare(entries: Sequence[Entry], order: str = "bits_per_byte") -> Comparison:
    """Puts runs in order.

    Args:
      entries: at least one.
      order: one of `ORDERS`; losses are those of the first available evaluation, best first
        among the runs that are scored on one text.

    Raises:
      ValueError: the order is unknown, or ranks nats per token of different tokenizers.
    """
    require(
        order in ORDERS, f"runs must be sorted by one of {list(ORDERS)}", repr(order), "Correct it"
    )
    texts = dict(zip(map(id, entries), heldout_texts(entries), strict=True))
    evaluations = [
        name for name in CAPACITIES if any(name in entry.score.losses for entry in entries)
    ]

    def key(entry: Entry) -> tuple[Any, ...]:
        if order == "name":
            return ()
        if order == "tokens_per_s":
            return (-(entry.tokens_per_s or 0.0),)
        loss = entry.score.loss(evaluations[0], order) if evaluations and is_final(entry) else None
        if loss is None or not math.isfinite(loss):
            return (1, "", False, 0.0)
        return (0, texts[id(entry)], entry.mark(evaluations[0]) == SEES, loss)

    found = Comparison(tuple(entries), ())
    require(
        order != "nats_per_token" or len(found.tokenizers) < 2,
        "nats a token can rank only runs with one tokenizer",
        f"the runs have {len(found.tokenizers)}: {', '.join(found.tokenizers)}",
        "Sort by bits_per_byte",
    )
    ordered = sorted(entries, key=key)
    return Comparison(tuple(ordered), tuple(texts[id(entry)] for entry in ordered))


def heldout_texts(entries: Iterable[Entry]) -> list[str]:
    """A letter for the held-out text of each run; "" without a score.

    Runs are scored on one text if their corpus, held-out fraction and objective are the same and
    the whole split has the same number of bytes. With another tokenizer, the first token of each
    domain may be missing.
    """
    known: list[Entry] = []
    letters = []
    for entry in entries:
        if not entry.score.losses:
            letters.append("")
            continue
        place = next((i for i, one in enumerate(known) if same_text(one, entry)), len(known))
        known += [entry] * (place == len(known))
        letters.append(letter_of(place))
    return letters


def same_text(a: Entry, b: Entry) -> bool:
    """Whether two runs are scored on the same held-out text, as far as their files show."""
    first, second = (
        [entry.settings.get("data", {}).get(name) for name in ("heldout_fraction", "objective")]
        for entry in (a, b)
    )
    if not a.same(b, "corpus") or first != second:
        return False
    sizes = a.score.num_bytes, b.score.num_bytes
    if not all(sizes) or not (a.score.whole and b.score.whole):
        return True
    tolerance = 0 if a.same(b, "tokenizer") else SAME_TEXT * max(sizes)
    return abs(sizes[0] - sizes[1]) <= tolerance


def letter_of(place: int) -> str:
    """A, B, ..., Z, A1, B1, ...: a name for one of a few."""
    return chr(ord("A") + place % 26) + str(place // 26) * (place >= 26)


def steps_left(entry: Entry) -> str:
    """Such as " of 1,000" for a run that has not taken all its steps, else ""."""
    total = entry.num_steps
    return "" if total is None or entry.step >= total else f" of {total:,}"


def differing(settings: Sequence[Settings]) -> dict[str, tuple[Any, ...]]:
    """The settings in which configs differ, by path; None where a config has no such setting.

    A part counts as its kind; then its fields are compared among the configs with that kind. An
    empty config, which could not be read, differs in nothing.
    """
    columns: dict[str, tuple[Any, ...]] = {}

    def visit(path: str, values: dict[int, Any], among: int) -> None:
        labels = {place: label(value) for place, value in values.items()}
        is_section = all(one == SECTION for one in labels.values())
        same = len(values) == among and len({json.dumps(one) for one in labels.values()}) == 1
        if not same and not is_section:
            columns[path] = tuple(labels.get(place) for place in range(len(settings)))
        sections = {place: value for place, value in values.items() if isinstance(value, Mapping)}
        for kind in dict.fromkeys(labels[place] for place in sections):
            alike = {place: value for place, value in sections.items() if labels[place] == kind}
            for name in dict.fromkeys(name for value in alike.values() for name in value):
                if name != "kind":
                    inner = {place: v[name] for place, v in alike.items() if name in v}
                    visit(f"{path}.{name}", inner, len(alike))

    present = {place: one for place, one in enumerate(settings) if one}
    visit("config", present, len(present))
    return columns


def label(value: Any) -> Any:
    """What a table shows for a value: for a section, its kind."""
    if isinstance(value, Mapping):
        return value.get("kind", SECTION)
    return json.dumps(value) if isinstance(value, list | tuple) else value


def without_seeds(settings: Settings, source: Callable[[str], str]) -> str:
    """The settings that affect a result, except the seeds; `source` replaces `SOURCES`."""

    def copy(value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return source(value) if path in SOURCES and isinstance(value, str) else value
        inner = {name: f"{path}.{name}" for name in value}
        left_out = (*SEEDS, *UNINTERESTING)
        return {
            name: copy(value[name], path) for name, path in inner.items() if path not in left_out
        }

    return json.dumps(copy(settings, "config"), sort_keys=True)


def source_without_seeds(path: str, above: frozenset[pathlib.Path] = frozenset()) -> str:
    """The settings of the run in a directory, except its seeds; the path if it was not trained.

    A run in `above`, those that started from this one, took the place of a source that is gone.
    """
    directory = pathlib.Path(path)
    below = above | {directory.resolve()}
    if not (directory / RUN_FILE).is_file() or (directory / IMPORTED_FILE).exists():
        return path  # imported and made models of one config may differ in more than seeds
    if below == above:
        return path
    try:
        settings = resolved(read_json(directory / CONFIG_FILE), only_results=True)
    except (ValueError, OSError):
        return path
    return without_seeds(settings, functools.partial(source_without_seeds, above=below))


def mean(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None for fewer than two, or if one is not finite."""
    finite = all(map(math.isfinite, values))
    return statistics.stdev(values) if len(values) > 1 and finite else None
