"""The runs under some paths, as far as they can be read: finished, unfinished, failed, damaged.

A report refuses a run that lacks a file. A comparison shows it, and reports what is wrong with it.
"""

import dataclasses
import functools
import glob
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.report import Run
from moe_jax.config import ExperimentConfig, read_config, to_dict
from moe_jax.config.check import require
from moe_jax.config.convert import HEADER
from moe_jax.jobs.log import LOG_FILE, failure
from moe_jax.planning.arithmetic import count_flops, count_parameters
from moe_jax.training.files import CONFIG_FILE, EVALUATION_FILE, METRICS_FILE, RUN_FILE, read_json
from moe_jax.training.loss_labels import CAPACITIES, SEES
from moe_jax.training.metrics import read_metrics

BEGUN = (METRICS_FILE, RUN_FILE, EVALUATION_FILE, LOG_FILE)
FINISHED, NOT_EVALUATED, UNFINISHED = "finished", "not evaluated", "unfinished"
FAILED, DAMAGED = "failed", "damaged"
INFINITE = re.compile(r"train/\w+ is (nan|-?inf) at step")  # of `training.loop.check_finite`

NUMBER = (int, float, type(None))
# Optional values that are read from each file, by path, and the types that they may have.
SHAPES: dict[str, dict[str, Any]] = {
    CONFIG_FILE: {
        "training": dict, "training.num_steps": int, "training.batch_size": int,
        "training.evaluation_batches": int, "data": dict, "data.sequence_length": int,
        "content": dict,
    },
    METRICS_FILE: dict.fromkeys(
        ("train/loss", "heldout/dropless/bits_per_byte", "perf/tokens_per_s",
         "perf/seconds_per_step"), NUMBER,
    ),
    RUN_FILE: {
        "parameters": dict, "parameters.total": int, "parameters.active": int,
        "forward_flops_per_token": dict, "forward_flops_per_token.model": NUMBER,
        "losses": dict, "earlier": list, "start_step": int, "num_steps": int,
        "tokens_per_step": int,
    },
    EVALUATION_FILE: {"step": int} | {
        f"{name}{unit}": kind for name in CAPACITIES for unit, kind in (
            ("", dict), (".nats_per_token", NUMBER), (".bits_per_byte", NUMBER),
            (".tokens", NUMBER),
        )
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Score:
    """Held-out losses of a run.

    Attributes:
      step: the step after which they were measured.
      whole: whether of the whole held-out split; else of its first `training.evaluation_batches`
        batches.
      losses: "nats_per_token" and "bits_per_byte", by evaluation, a name of `CAPACITIES`.
      num_bytes: bytes of text that were scored; 0 if not recorded.
    """

    step: int
    whole: bool
    losses: dict[str, dict[str, Any]]
    num_bytes: int

    def loss(self, evaluation: str, unit: str) -> float | None:
        """One of the losses, None if it was not measured."""
        return self.losses.get(evaluation, {}).get(unit)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run in a comparison.

    Attributes:
      name: a name that distinguishes it from the others.
      directory: of the run.
      run: what could be read; missing or damaged files are empty in it.
      settings: resolved if its config can be read, else as written; {} without a config.
      problems: what could not be read, and why.
    """

    name: str
    directory: pathlib.Path
    run: Run
    settings: dict[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int | None:
        """The number of training steps in its config."""
        return self.settings.get("training", {}).get("num_steps")

    @property
    def step(self) -> int:
        """The last step with metrics or an evaluation."""
        return max([row["step"] for row in self.run.rows[-1:]] + [self.score.step], default=0)

    @property
    def state(self) -> str:
        """One of the five words above."""
        done = self.num_steps is not None and self.step >= self.num_steps
        if not done and failure(self.directory):
            return FAILED
        if self.problems:
            return DAMAGED
        if not done:
            return UNFINISHED
        return FINISHED if self.score.step >= (self.num_steps or 0) else NOT_EVALUATED

    @property
    def diverged(self) -> bool:
        """Whether a loss is not finite: the newest, or the one that, by its log, ended it."""
        nats = [one.get("nats_per_token", 0.0) for one in self.score.losses.values()]
        named = ("train/loss", "train/total_loss", "train/grad_norm")
        nats += [row[name] for row in self.run.rows[-1:] for name in named if name in row]
        if not all(one is not None and math.isfinite(one) for one in nats):
            return True
        return self.state == FAILED and bool(INFINITE.match(failure(self.directory)))

    @property
    def note(self) -> str:
        """What is wrong with it, and whether it was extended, in a line; "" if neither."""
        why = failure(self.directory) if self.state == FAILED else ""
        return "; ".join(filter(None, [why, *self.problems, self.run.extended]))

    @functools.cached_property
    def score(self) -> Score:
        """Its newest held-out losses."""
        training = self.settings.get("training", {})
        found = self.run.heldout
        whole = (
            found is self.run.evaluation
            or not training.get("evaluation_batches")
            or found["step"] == self.num_steps
        )
        losses = {name: found[name] for name in CAPACITIES if name in found}
        return Score(found.get("step", 0), whole, losses, scored_bytes(losses.get("dropless", {})))

    def label(self, evaluation: str) -> str:
        """The label of an evaluation in this run."""
        return str(self._said(evaluation).get("label") or evaluation.replace("_", "-"))

    def mark(self, evaluation: str) -> str:
        """What a reader must know about these losses: the model `SEES`, or saw, later tokens."""
        model = self.settings.get("model")
        stack = model.get("stack") if isinstance(model, dict) else None
        allowed = isinstance(stack, dict) and bool(stack.get("allow_lookahead"))
        return str(self._said(evaluation).get("mark", SEES if allowed else ""))

    def _said(self, evaluation: str) -> dict[str, Any]:
        """What the run recorded about an evaluation; earlier versions recorded nothing."""
        recorded = self.run.record.get("losses", {})
        found = recorded.get(evaluation) if isinstance(recorded, dict) else None
        return found if isinstance(found, dict) else self.score.losses.get(evaluation, {})

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens that a step trains on, as recorded or counted; including an encoder's."""
        try:
            return self.run.record.get("tokens_per_step") or (
                self.settings["training"]["batch_size"] * self.settings["data"]["sequence_length"]
            )
        except (KeyError, TypeError):
            return None

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters "total" and "active", as recorded or counted; {} if neither is possible."""
        return self.run.record.get("parameters") or self._counted(
            lambda config: {
                name: getattr(count_parameters(config.model, config.lengths), name)
                for name in ("total", "active")
            }
        )

    @property
    def flops_per_token(self) -> float | None:
        """Model FLOPs of a training step, per token: three times those of the forward pass."""
        forward = self.run.record.get("forward_flops_per_token") or self._counted(
            lambda config: {"model": count_flops(config.model, config.lengths).model}
        )
        return 3 * forward["model"] if forward else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second: the median over the logged steps."""
        _, values = self.run.curve("perf/tokens_per_s")
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    def same(self, other: "Entry", what: str) -> bool:
        """Whether two runs share a "corpus" or "tokenizer": by content if both recorded it."""
        hashes = [one.run.settings.get("content", {}).get(what) for one in (self, other)]
        if all(hashes):
            return bool(hashes[0] == hashes[1])
        return self.named(what) == other.named(what)

    def named(self, what: str) -> str:
        """The "corpus" or the "tokenizer" as named in its config."""
        return str(self.settings.get("data", {}).get(what))

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that affect a result, as far as is known."""
        return resolved(self.run.settings, only_results=True)

    def _counted(self, count: Callable[[ExperimentConfig], dict[str, Any]]) -> dict[str, Any]:
        """What is counted from the config; {} if it has parts that a reader does not import."""
        try:
            return count(read_config(self.run.settings, ExperimentConfig))
        except (ValueError, TypeError, AttributeError, KeyError):
            return {}


def scored_bytes(losses: dict[str, Any]) -> int:
    """How many bytes of text were scored: total nats divided by nats per byte; 0 if unknown.

    >>> scored_bytes({"nats_per_token": math.log(2), "bits_per_byte": 0.5, "tokens": 100.0})
    200
    """
    try:
        nats = losses["nats_per_token"] * losses["tokens"]
        return round(nats / (losses["bits_per_byte"] * math.log(2)))
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        return 0


def find_runs(paths: Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    """The directories of runs, each once, by name.

    Args:
      paths: of runs, of folders with runs in them at any depth, or patterns such as "runs/lr*".

    Raises:
      ValueError: a path matches nothing, or contains no run.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        places = [pathlib.Path(path)]
        if not places[0].exists():
            places = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
        require(
            bool(places), "a comparison needs the workdirs of runs", f"there is no {path}",
            "Pass a workdir, a folder of workdirs, or a pattern",
        )  # fmt: skip
        runs = [run for place in places for run in runs_in(place)]
        require(
            bool(runs),
            f"the workdir of a run must have {CONFIG_FILE} and {METRICS_FILE}",
            f"there is none in {path}",
            "Pass the --workdir of a run, or a folder of them",
        )
        found |= {run.resolve(): run for run in runs}
    return sorted(found.values(), key=natural_key)


def runs_in(place: pathlib.Path) -> list[pathlib.Path]:
    """The runs in a folder, which may itself be one; a run that has begun contains no other."""
    if not place.is_dir() or place.name.startswith("."):
        return []
    if any((place / name).is_file() for name in BEGUN):
        return [place]
    found = [run for child in sorted(place.iterdir()) for run in runs_in(child)]
    return found or [place] * (place / CONFIG_FILE).is_file()


def natural_key(path: pathlib.Path) -> list[tuple[int, str]]:
    """A sort key that orders names with numbers as people do: 2 before 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece)
            for piece in re.split(r"(\d+)", str(path))]  # fmt: skip


def read_entries(directories: Sequence[pathlib.Path]) -> list[Entry]:
    """Reads runs; `Entry.problems` lists what cannot be read."""
    names = short_names(directories)
    return [read_entry(path, name) for path, name in zip(directories, names, strict=True)]


def short_names(directories: Sequence[pathlib.Path]) -> list[str]:
    """The paths without the folders that all of them share."""
    parts = [path.absolute().parts for path in directories]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return ["/".join(one[shared:]) for one in parts]


def read_entry(directory: pathlib.Path, name: str) -> Entry:
    """Reads a run as far as possible."""
    problems: list[str] = []

    def read(file: str, reader: Callable[[pathlib.Path], Any], empty: Any, required: bool) -> Any:
        path = directory / file
        if not path.exists():
            problems.extend([f"no {file}"] * required)
            return empty
        try:
            found = reader(path)
        except (ValueError, OSError) as error:
            problems.append(f"{file} cannot be read: {' '.join(str(error).split())}")
            return empty
        wrong = misshapen(objects_in(found, file), SHAPES[file])
        problems.extend([f"{file} cannot be read: {wrong}"] * bool(wrong))
        return empty if wrong else found

    written = read(CONFIG_FILE, read_json, {}, True)
    rows = read(METRICS_FILE, read_metrics, [], False)
    record = read(RUN_FILE, read_json, {}, False)
    evaluation = read(EVALUATION_FILE, read_json, {}, False)
    run = Run(rows=rows, record=record, settings=written, evaluation=evaluation, sample=None)
    return Entry(name, directory, run, resolved(written), tuple(problems))


def objects_in(found: Any, file: str) -> list[Any]:
    """The JSON objects of a file that should have its shape: rows, or the file and sessions."""
    if file == METRICS_FILE:
        return list(found)
    earlier = found.get("earlier") if file == RUN_FILE else None
    return [found, *(earlier if isinstance(earlier, list) else [])]


def misshapen(objects: Sequence[Any], shape: dict[str, Any]) -> str:
    """The first value with a wrong type in some JSON objects; "" if there is none.

    >>> misshapen([{"a": {"b": "2"}}], {"a": dict, "a.b": int})
    "a.b is '2'"
    """
    for found in objects:
        if not isinstance(found, dict):
            return "it is not a JSON object"
        for path, kind in shape.items():
            section, dot, name = path.rpartition(".")
            inside = found.get(section, {}) if dot else found
            if name in inside and not isinstance(inside[name], kind):
                return f"{path} is {inside[name]!r:.40}"
    return ""


def resolved(written: dict[str, Any], *, only_results: bool = False) -> dict[str, Any]:
    """The settings of a config; if it can be built, missing ones have their defaults.

    Args:
      written: the content of `config.json`.
      only_results: leave out what does not change results, if the config can be built.
    """
    if not written:
        return {}
    try:
        config = read_config(written, ExperimentConfig)
        return json.loads(json.dumps(to_dict(config, only_results=only_results)))
    except (ValueError, TypeError, AttributeError, KeyError):
        return {name: item for name, item in written.items() if name not in HEADER}
