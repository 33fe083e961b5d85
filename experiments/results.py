"""Results of a study: one line of JSON per arm and seed, in `results.jsonl` beside the study."""

import dataclasses
import fcntl
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_jax.analysis.paired import MIN_SEEDS, shared_seeds
from moe_jax.config import DataConfig
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text, numbers
from moe_jax.data import open_data
from moe_jax.files import write_atomically
from moe_jax.training.loss_labels import LossLabel

RESULTS_FILE = "results.jsonl"
PAIRED, UNPAIRED = "paired", "unpaired"  # rules that decide directions; see `verdict`
LOSS = "bits_per_byte"  # on the whole held-out split, dropless, after the last step
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """The finished runs of a study at one size.

    Attributes:
      rows: one dict per run, as `experiments.arm` writes them.
      baseline: the arm whose spread is the noise floor.
      labels: how the losses of each arm are measured; arms without an entry are not marked.
      least_seeds: minimum number of seeds for a comparison.
      rule: the rule that decides directions.
    """

    rows: tuple[Row, ...]
    baseline: str
    labels: Mapping[str, Mapping[str, LossLabel]] = dataclasses.field(default_factory=dict)
    least_seeds: int = MIN_SEEDS
    rule: str = PAIRED

    @property
    def has_older_rule(self) -> bool:
        """Whether some runs were made under the earlier rule of unpaired noise."""
        return any(row.get("rule", UNPAIRED) != PAIRED for row in self.rows)

    @property
    def shared_seeds(self) -> list[int]:
        """The seeds that every arm with results has; tables show these."""
        return shared_seeds(self.values(arm) for arm in sorted({row["arm"] for row in self.rows}))

    def mark(self, arm: str, measure: str = LOSS) -> str:
        """Mark of a loss that depends on later tokens, "" for none; see `training.loss_labels`."""
        kind = "dropless" if measure == LOSS else measure
        return self.labels.get(arm, {}).get(kind, LossLabel(kind, "")).mark

    def named(self, arm: str, measure: str = LOSS) -> str:
        """The name of an arm, with the mark of its loss if there is one."""
        mark = self.mark(arm, measure)
        return f"{arm} ({mark})" if mark else arm

    def marked(self, text: str) -> str:
        """A text with marks after the names of arms that saw later tokens.

        A name that already has its mark keeps it.
        """
        for arm in self.labels:
            if mark := self.mark(arm):
                alone = rf"(?<![\w.-]){re.escape(arm)}(?![\w-]|\.\w)(?! \((?:sees|saw) )"
                text = re.sub(alone, rf"\g<0> ({mark})", text)
        return text

    def values(self, arm: str, measure: str = LOSS) -> dict[int, float]:
        """A measure of an arm by seed, for seeds that have it; infinite if the run diverged."""
        return {
            row["seed"]: math.inf if has_diverged(row) else row["measures"][measure]
            for row in sorted(self.rows, key=lambda row: row["seed"])
            if row["arm"] == arm and (has_diverged(row) or measure in row["measures"])
        }

    def curve(self, arm: str, seed: int) -> tuple[list[int], list[float]]:
        """Steps and held-out bits per byte after each, on one sample of the held-out split."""
        for row in self.rows:
            if (row["arm"], row["seed"]) == (arm, seed):
                return row["curve"]["step"], row["curve"][LOSS]
        return [], []


def has_diverged(row: Row) -> bool:
    """Whether a run diverged: its line then records the last step before divergence."""
    return row.get("diverged_after_step") is not None


def finite(by_seed: Mapping[int, float]) -> dict[int, float]:
    """The seeds that did not diverge."""
    return {seed: value for seed, value in by_seed.items() if math.isfinite(value)}


def run_of(row: Row) -> tuple[str, str, int]:
    """Size, arm and seed of a results line."""
    return row["size"], row["arm"], row["seed"]


def check_same_text(rows: Iterable[Row], config: DataConfig | None = None) -> None:
    """Refuses runs with different corpora or tokenizers: their losses cannot be compared.

    Args:
      rows: results lines of one size.
      config: data of runs to be added; None: no runs are added.

    Raises:
      ValueError: the hashes differ.
    """
    hashes = {(row["data"]["corpus_sha256"], row["data"]["tokenizer_sha256"]) for row in rows}
    if hashes and config:
        now = open_data(config).fingerprints
        hashes.add((now["corpus"], now["tokenizer"]))
    require(
        len(hashes) <= 1,
        "compared runs must have the same corpus and tokenizer",
        "sha256 of both: " + "; ".join(f"{c[:12]}, {t[:12]}" for c, t in sorted(hashes)),
        "Build the corpus of the existing results, or remove their lines",
    )


def measured(measure: str, *arms: str, digits: str = ".4f") -> Callable[[Results], str]:
    """Means of a measure of arms over their shared seeds, as text beside a published figure.

    Arms without values are left out.
    """

    def text(results: Results) -> str:
        found = {arm: values for arm in arms if (values := results.values(arm, measure))}
        seeds = shared_seeds(found.values())
        cells = [
            f"{results.named(arm, measure)} {statistics.fmean(values[s] for s in seeds):{digits}}"
            for arm, values in found.items()
            if seeds
        ]
        return f"{measure.replace('_', ' ')}: {', '.join(cells)}" if cells else "no runs"

    return text


def read_results(path: pathlib.Path, size: str | None = None) -> list[Row]:
    """The lines of a results file, of one size or all; [] if there is no file."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        for name in {"measures", "curve"} & row.keys():
            row[name] = {key: numbers(value) for key, value in row[name].items()}
    return [row for row in rows if size in (None, row["size"])]


def append_result(path: pathlib.Path, row: Row) -> None:
    """Adds a line atomically, under a lock, so that no process loses a line.

    A run that already has a line, for example from another process, does not get a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if any(run_of(other) == run_of(row) for other in read_results(path)):
            return
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        write_atomically(path, old + json_text(row, sort_keys=True) + "\n")
