"""The form of a study: one file, `NAME/study.py`, complete before the first run.

    STUDY = Study(file=__file__, question=..., arms=..., expect=..., ...)

The folder NAME lies in `experiments/`, or anywhere else. Results and pages are written to it.

An override maps a dotted path of a config to a value: a setting, or a whole part.

    {"model.parts.moe.num_experts": 8, "model.parts.moe.router": Hash(by="position")}

They are applied in this order: the config file, the study's `base`, the size, the arm, the seed. A
value may be a function of the config, for a setting that depends on other settings or on its own
previous value; functions are applied last.
Parts that no layer of an arm names are left out of its model.

An arm may start from the run of another arm, or learn from it: `"init_from.path": RUN_OF +
"teacher"` is the workdir of the arm "teacher" with the same seed, which is run first.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import before_parts
from experiments.overrides import layout_of, override, read, strings
from experiments.results import LOSS, Results, Row
from experiments.verdict import MIN_SEEDS, Claim
from moe_jax.config import (
    ExperimentConfig,
    difference,
    from_config_dict,
    read_config,
    to_dict,
    write_config,
)
from moe_jax.config.check import require
from moe_jax.models.stack import StackLayout
from moe_jax.training.loss_labels import LossLabel, loss_labels

HERE = pathlib.Path(__file__).parent
SIZES = ("smoke", "small", "medium", "gpu", "base")
STUDY_FILE = "study.py"
CORPUS = "CORPUS"  # placeholder of the --corpus directory in data.corpus and data.tokenizer
RUNS = "RUNS"  # placeholder of the directory of a study's runs at one size
RUN_OF = f"{RUNS}/"  # before the name of an arm: the workdir of its run
LARGE_CORPUS = {"data.corpus": f"jsonl:{CORPUS}"}
BPE_8K = {
    "data.tokenizer": f"sentencepiece:{CORPUS}/bpe8192.model",
    "model.vocab_size": 8192,
}
# Tokens packed by `python -m moe_jax.data.pack`, with the tokenizer beside them.
PACKED = {**BPE_8K, "data.corpus": f"packed:{CORPUS}"}
BYTES = {"data.tokenizer": "byte", "model.vocab_size": 384}
EMBEDDED_CORPUS = {"data.corpus": "embedded", **BYTES}
MLP_LAYER, MOE_LAYER = ("attention", "mlp"), ("attention", "moe")
LOOKS_AHEAD = {"model.stack.allow_lookahead": True}
Overrides = dict[str, Any]


def without_experts(config: ConfigDict) -> StackLayout:
    """The same layers with the part "mlp" in place of "moe"."""
    layers = layout_of(config).layers
    return StackLayout.of([tuple("mlp" if p == "moe" else p for p in layer) for layer in layers])


NO_EXPERTS = {"model.stack": without_experts}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the compared settings.

    Attributes:
      name: letters, digits, `_`, `.` and `-`; used as a directory name.
      label: the name in tables and figures.
      overrides: settings that differ in this arm.
      budget: arms of one budget have equal active FLOPs, within the study's tolerance.
      against: the arm that a table compares it with; "": the baseline.
      sizes: sizes that it is run at.
      after: the arm whose run it continues by `Study.start`; "": none.
    """

    name: str
    label: str
    overrides: Overrides
    budget: str = "equal"
    against: str = ""
    sizes: tuple[str, ...] = SIZES
    after: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """A published figure, and the corresponding result of a study.

    Attributes:
      what: the quantity that was measured.
      figure: its published value.
      source: paper and table.
      here: the corresponding value of our results, as text.
    """

    what: str
    figure: str
    source: str
    here: Callable[[Results], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A question, the runs that answer it, and the criterion for the answer.

    Attributes:
      file: `__file__` of the study; its folder has the name of the study.
      question: the question in one sentence.
      published: published results.
      config: name of a file of `configs/`, with presets after a colon.
      base: overrides of all arms.
      sizes: overrides by size: "smoke" (seconds, embedded corpus), "small" (two cores, one to
        five hours per study), "medium" (two cores, a night), "gpu" (one card, 40 M packed
        tokens), "base" (several accelerators). "smoke" and one more are required.
      arms: the compared arms.
      baseline: the arm that others are compared with.
      expect: the criterion: the study is reproduced if every claim is.
      measures: names of measures that are columns of the table, besides held-out bits per byte.
      outcome: the measure that the figure and the table of paired differences compare, and its
        name in words. The figure has curves only for the default, since curves use all held-out
        text.
      measure: computes more measures from the directory of a finished run; None: no more.
      start: puts a checkpoint into the directory of a run that has none, for arms that continue
        from a model; it gets the run's config, arm name and directory. None: all arms start anew.
      seeds: seeds of every arm. A seed sets parameters and the order of the data: arms share it.
      least_seeds: minimum number of seeds for a comparison, three or more.
      baseline_seeds: seeds of the baseline, if a claim needs its spread over more; () for `seeds`.
      tolerance: largest relative difference of active FLOPs within a budget.
      notes: notes for the reader: sizes, choices, what was tried.
    """

    file: str
    question: str
    published: tuple[Published, ...]
    base: Overrides
    sizes: Mapping[str, Overrides]
    arms: tuple[Arm, ...]
    baseline: str
    expect: tuple[Claim, ...]
    config: str = "base"
    measures: tuple[str, ...] = ()
    outcome: tuple[str, str] = (LOSS, "bits per byte")
    measure: Callable[[pathlib.Path], Mapping[str, float]] | None = None
    start: Callable[[ExperimentConfig, str, pathlib.Path], None] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    least_seeds: int = MIN_SEEDS
    baseline_seeds: tuple[int, ...] = ()
    tolerance: float = 0.02
    notes: str = ""

    def __post_init__(self) -> None:
        """Checks the study, and that every arm can be built at every size."""
        names = [arm.name for arm in self.arms]
        require(
            len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", n) for n in names),
            "arms have different names of letters, digits, '_', '.' and '-'",
            f"{self.name}: {names}",
            "Rename them",
        )
        others = [arm.against or self.baseline for arm in self.arms]
        require(
            {self.baseline, *others} <= set(names),
            "Study.baseline and Arm.against must name arms",
            f"{self.name}: {sorted({self.baseline, *others} - set(names))}, arms {names}",
            "Correct it",
        )
        require(
            "smoke" in self.sizes and len(self.sizes) > 1 and set(self.sizes) <= set(SIZES),
            f"a study has the size 'smoke' and one or more of {list(SIZES[1:])}",
            f"{self.name}: {list(self.sizes)}",
            "Add or rename sizes",
        )
        require(
            MIN_SEEDS <= self.least_seeds <= len(set(self.seeds))
            and set(self.seeds) <= set(self.baseline_seeds or self.seeds),
            f"a study has Study.least_seeds seeds or more, {MIN_SEEDS} at the least, which are "
            "among those of the baseline",
            f"{self.name}: seeds={self.seeds}, least_seeds={self.least_seeds}, "
            f"baseline_seeds={self.baseline_seeds}",
            "Add seeds",
        )
        require(
            self.outcome[0] in (LOSS, *self.measures),
            "Study.outcome is held-out bits a byte or one of Study.measures",
            f"{self.name}: {self.outcome[0]!r}, measures={self.measures}",
            "Correct it, or add it to the measures",
        )
        require(bool(self.expect), "a study has a criterion", self.name, "Write Study.expect")
        for size in self.sizes:
            for arm in self.arms_at(size):
                self.experiment(size, arm.name, 0)
        at_smoke = self.arms_at("smoke")
        require(
            all(self.experiment("smoke", a.name, 0).data.corpus == "embedded" for a in at_smoke),
            "the size smoke uses the embedded corpus",
            self.name,
            "Add EMBEDDED_CORPUS to its overrides",
        )

    def arm(self, name: str) -> Arm:
        """The arm of a given name."""
        found = {arm.name: arm for arm in self.arms}
        require(name in found, f"{self.name} has the arms {list(found)}", repr(name), "Correct it")
        return found[name]

    def arms_at(self, size: str) -> list[Arm]:
        """The arms of a size; [] if the study lacks the size."""
        return [arm for arm in self.arms if size in arm.sizes and size in self.sizes]

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm is run with."""
        return (arm == self.baseline and self.baseline_seeds) or self.seeds

    def missing(self, size: str, results: Results) -> list[tuple[str, int]]:
        """The arms and seeds without a results line."""
        there = {(row["arm"], row["seed"]) for row in results.rows}
        arms = [arm.name for arm in self.arms_at(size)]
        planned = [(arm, seed) for arm in arms for seed in self.seeds_of(arm)]
        return [pair for pair in planned if pair not in there]

    def needed_by(self, size: str, arm: str) -> set[str]:
        """The arms whose runs an arm starts from or learns from."""
        values = strings(self.overridden(size, arm))
        named = {value.removeprefix(RUN_OF) for value in values if value.startswith(RUN_OF)}
        return named | ({self.arm(arm).after} - {""})

    def stage(self, size: str, arm: str) -> int:
        """Length of the chain of arms that an arm needs; these are run first."""
        needed = (self.stage(size, other) for other in self.needed_by(size, arm))
        return 1 + max(needed, default=-1)

    @functools.cache  # noqa: B019 (a study lives as long as the process)
    def experiment(
        self, size: str, arm: str, seed: int, corpus: str = CORPUS, runs: str = RUNS
    ) -> ExperimentConfig:
        """The settings of one run; `corpus` and `runs` are directories."""
        sizes = [one for one in SIZES if one in self.sizes]
        require(size in sizes, f"{self.name} has the sizes {sizes}", repr(size), "Correct --size")
        config = self.overridden(size, arm)
        for path in ("data.corpus", "data.tokenizer"):
            override(config, path, lambda c, p=path: read(c, p).replace(CORPUS, corpus))
        place_runs(config, runs, seed)
        config.name = f"{self.name}_{size}_{arm}"
        config.seed = config.data.seed = seed
        used = layout_of(config).names
        with config.unlocked():
            for name in set(config.model.parts) - used:
                del config.model.parts[name]
        return from_config_dict(config)

    def overridden(self, size: str, arm: str) -> ConfigDict:
        """The config file with all overrides, including parts that no layer uses."""
        file, _, presets = self.config.partition(":")
        config = importlib.import_module(f"configs.{file}").get_config(presets)
        values: dict[str, Any] = {}
        functions: dict[str, Any] = {}
        for given in (self.base, self.sizes[size], self.arm(arm).overrides):
            for path, value in given.items():
                functions.pop(path, None)  # a later override is applied later
                if callable(value):
                    functions[path] = value
                else:
                    values.pop(path, None)
                    values[path] = value
        for path, value in (*values.items(), *functions.items()):
            override(config, path, value)
        return config

    def settings(self, size: str, arm: str, seed: int) -> dict[str, Any]:
        """The settings in a results line: no mesh or cache, and placeholders of directories."""
        settings = write_config(self.experiment(size, arm, seed))
        settings.pop("mesh")
        settings["data"].pop("cache_dir")
        return json.loads(json.dumps(settings))

    def check_row(self, row: Row) -> None:
        """Refuses a results line whose settings differ from the study's.

        A setting that the library did not have at the time counts as its default.

        Raises:
          ValueError: settings differ; the message names them.
        """
        now = self.settings(row["size"], row["arm"], row["seed"])
        theirs, ours = (read_settings(config) for config in (row["config"], now))
        changed = difference(to_dict(theirs), to_dict(ours))
        require(
            not changed,
            "result lines must have the present settings of their study",
            f"{self.name}, arm {row['arm']}, seed {row['seed']}: " + "; ".join(changed),
            "Restore the settings, or remove that line and run it again",
        )

    def loss_labels(self, size: str) -> dict[str, dict[str, LossLabel]]:
        """How the losses of each arm are measured."""
        arms = [arm.name for arm in self.arms_at(size)]
        return {arm: loss_labels(self.experiment(size, arm, 0).model) for arm in arms}

    def overrides(self, size: str, arm: str) -> dict[str, Any]:
        """The overrides of an arm, with functions replaced by their values."""
        config = self.overridden(size, arm)
        values = {path: read(config, path) for path in self.arm(arm).overrides}
        return {
            path: value.to_dict() if isinstance(value, ConfigDict) else value
            for path, value in values.items()
        }

    @property
    def directory(self) -> pathlib.Path:
        """The folder of the study."""
        return pathlib.Path(self.file).resolve().parent

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.directory.name

    @property
    def place(self) -> str:
        """What commands call the study: its name in `experiments/`, or the path of its folder."""
        return self.name if self.directory.parent == HERE else os.path.relpath(self.directory)


def read_settings(config: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment of a results line, also of one from before models had parts."""
    if "format" in config:
        return read_config(config, ExperimentConfig, trust=True)
    return before_parts.experiment_of(config)


def place_runs(config: ConfigDict, runs: str, seed: int) -> None:
    """Replaces `RUN_OF` and the name of an arm by the workdir of its run with a seed."""
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            place_runs(value, runs, seed)
        elif isinstance(value, str) and value.startswith(RUN_OF):
            config[name] = f"{runs}/{run_name(value.removeprefix(RUN_OF), seed)}"


def run_name(arm: str, seed: int) -> str:
    """The name of a run, also of its directory."""
    return f"{arm}_seed{seed}"


def study_names() -> list[str]:
    """Names of the studies of `experiments/`."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{STUDY_FILE}"))


def load_study(place: str) -> Study:
    """Loads a study.

    Args:
      place: the name of a folder of `experiments/`, or the path of a folder with a `study.py`.
        The folder around it goes on the import path, so that the study may import from its own
        folder: `from NAME.routers import MyRouter`.

    Raises:
      ValueError: there is no such study, or it breaks a rule.
    """
    if place in study_names():
        return study_in(f"experiments.{place}")
    folder = pathlib.Path(place).resolve()
    alone = "moe_against_dense"  # not a Study: it has a script
    fix = f"Run python -m experiments.{alone}.run" if place == alone else "Correct the name"
    require(
        (folder / STUDY_FILE).is_file(),
        f"the studies are {study_names()}, and folders of your own with a {STUDY_FILE}",
        repr(place),
        fix,
    )
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    spec = importlib.util.find_spec(folder.name) if folder.name.isidentifier() else None
    require(
        spec is not None and list(spec.submodule_search_locations or ()) == [str(folder)],
        "the folder of a study has a Python name that no other module has",
        repr(folder.name),
        "Rename the folder",
    )
    return study_in(folder.name)


def study_in(package: str) -> Study:
    """The `STUDY` of a package's `study.py`."""
    found: Study = importlib.import_module(f"{package}.{STUDY_FILE.removesuffix('.py')}").STUDY
    return found
