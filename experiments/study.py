"""The form of a study: one file, `experiments/NAME/study.py`, that says all before it is run.

    STUDY = Study(name="NAME", question=..., arms=..., expect=..., ...)

An override is a dotted path of a config and its value: a setting, or a whole part.

    {"model.parts.moe.num_experts": 8, "model.parts.moe.router": Hash(by="position")}

They are applied in this order: the config file, the study's `base`, the size, the arm, the seed. A
value may be a function of the config, for a setting that follows others, or its own value of
before: those are applied last.
Parts that no layer of an arm names are left out of its model.

An arm may start from the run of another, or learn from it: `"init_from.path": RUN_OF + "teacher"`
is the workdir of the arm "teacher" with the same seed, which is run before.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import re
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
from moe_jax.training.ways import Way, ways_of

HERE = pathlib.Path(__file__).parent
SIZES = ("smoke", "small", "medium", "gpu", "base")
OPTIONAL = {"medium"}  # sizes that a study may lack
CORPUS = "CORPUS"  # stands in data.corpus and data.tokenizer for the directory of --corpus
RUNS = "RUNS"  # stands for the directory of the runs of a study at one size
RUN_OF = f"{RUNS}/"  # before the name of an arm: the workdir of its run
LARGE_CORPUS = {"data.corpus": f"jsonl:{CORPUS}"}
BPE_8K = {
    "data.tokenizer": f"sentencepiece:{CORPUS}/bpe8192.model",
    "model.vocab_size": 8192,
}
# Tokens of `python -m moe_jax.data.pack`, with the tokenizer beside them.
PACKED = {**BPE_8K, "data.corpus": f"packed:{CORPUS}"}
BYTES = {"data.tokenizer": "byte", "model.vocab_size": 384}
EMBEDDED_CORPUS = {"data.corpus": "embedded", **BYTES}
MLP_LAYER, MOE_LAYER = ("attention", "mlp"), ("attention", "moe")
LOOKS_AHEAD = {"model.stack.allow_lookahead": True}
Overrides = dict[str, Any]


def without_experts(config: ConfigDict) -> StackLayout:
    """As many layers, with the part "mlp" in place of "moe"."""
    layers = layout_of(config).layers
    return StackLayout.of([tuple("mlp" if p == "moe" else p for p in layer) for layer in layers])


NO_EXPERTS = {"model.stack": without_experts}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
      name: of letters, digits, `_`, `.` and `-`; it names directories.
      label: what a table and a figure call it.
      overrides: what is different in it.
      budget: arms of one budget have equal active FLOPs, within the study's tolerance.
      against: the arm that a table compares it with; "": the baseline.
      sizes: that it is run at.
      after: another arm whose run it goes on from by `Study.start`; "": none.
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
    """A figure of the literature, and what stands beside it here.

    Attributes:
      what: was measured.
      figure: as it was published.
      source: paper and table.
      here: the same of our results, as text.
    """

    what: str
    figure: str
    source: str
    here: Callable[[Results], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A question, how it is asked, and what would be an answer.

    Attributes:
      name: of its folder.
      question: in one sentence.
      published: what the literature found.
      config: a file of `configs/`, by its name, with its presets after a colon.
      base: overrides of all arms.
      sizes: overrides by size: "smoke" (seconds, embedded corpus), "small" (two cores, two hours a
        study), perhaps "medium" (two cores, a night), "gpu" (one card, 40 M packed tokens, minutes
        an arm), "base" (several accelerators).
      arms: what is compared.
      baseline: the arm that others are compared with.
      expect: the criterion: the study is reproduced if every claim of it is.
      measures: columns of the table, besides held-out bits a byte: names of a result's measures.
      outcome: the measure that the table of paired differences and the figure compare arms by, and
        what it is in words. The figure has curves for the default alone: they are of all held-out
        text.
      measure: more to measure, from the directory of a finished run; None: nothing.
      start: puts a checkpoint into the directory of a run that has none, of the run's config and
        the name of its arm, for arms that go on from a model; None: all start anew.
      seeds: of every arm. A seed sets parameters and the order of the data: arms share it.
      least_seeds: that a comparison needs, three or more; fewer show nothing.
      baseline_seeds: of the baseline, where a claim asks for its spread over more; () for `seeds`.
      tolerance: largest relative difference of active FLOPs within a budget.
      notes: what a reader should know: sizes, choices, what was tried.
    """

    name: str
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
        """Checks the study, and that every arm builds at every size."""
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
            "what arms are compared with, Study.baseline and Arm.against, are arms",
            f"{self.name}: {sorted({self.baseline, *others} - set(names))}, arms {names}",
            "Correct it",
        )
        require(
            set(SIZES) - OPTIONAL <= set(self.sizes) <= set(SIZES),
            f"a study has the sizes {list(SIZES)}, perhaps without {sorted(OPTIONAL)}",
            f"{self.name}: {sorted(self.sizes)}",
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
        """An arm by its name."""
        found = {arm.name: arm for arm in self.arms}
        require(name in found, f"{self.name} has the arms {list(found)}", repr(name), "Correct it")
        return found[name]

    def arms_at(self, size: str) -> list[Arm]:
        """The arms of a size; none of a size that the study lacks."""
        return [arm for arm in self.arms if size in arm.sizes and size in self.sizes]

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm is run with."""
        return (arm == self.baseline and self.baseline_seeds) or self.seeds

    def missing(self, size: str, results: Results) -> list[tuple[str, int]]:
        """The arms and seeds that have no line yet."""
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
        """How many other arms, one after the other, are run before an arm: it needs them."""
        needed = (self.stage(size, other) for other in self.needed_by(size, arm))
        return 1 + max(needed, default=-1)

    def experiment(
        self, size: str, arm: str, seed: int, corpus: str = CORPUS, runs: str = RUNS
    ) -> ExperimentConfig:
        """The settings of one run; directories of the large corpus, and of the study's runs."""
        return experiment_of(self, size, arm, seed, corpus, runs)

    def built(self, size: str, arm: str, seed: int, corpus: str, runs: str) -> ExperimentConfig:
        """`experiment`, made anew."""
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
        """The config file with all overrides, and with the parts that no layer uses."""
        file, _, presets = self.config.partition(":")
        config = importlib.import_module(f"configs.{file}").get_config(presets)
        values: dict[str, Any] = {}
        functions: dict[str, Any] = {}
        for given in (self.base, self.sizes[size], self.arm(arm).overrides):
            for path, value in given.items():
                functions.pop(path, None)  # what comes later is also applied later
                if callable(value):
                    functions[path] = value
                else:
                    values.pop(path, None)
                    values[path] = value
        for path, value in (*values.items(), *functions.items()):
            override(config, path, value)
        return config

    def settings(self, size: str, arm: str, seed: int) -> dict[str, Any]:
        """What a line of results keeps of the settings: all but where corpus and devices are."""
        settings = write_config(self.experiment(size, arm, seed))
        settings.pop("mesh")
        settings["data"].pop("cache_dir")
        return json.loads(json.dumps(settings))

    def check_row(self, row: Row) -> None:
        """Refuses a line of results of other settings than the study has now.

        A setting that the library did not have at the time counts as its default.

        Raises:
          ValueError: naming the settings.
        """
        now = self.settings(row["size"], row["arm"], row["seed"])
        changed = difference(*(to_dict(read_settings(config)) for config in (row["config"], now)))
        require(
            not changed,
            "results of a study are all of the settings that it has now",
            f"{self.name}, arm {row['arm']}, seed {row['seed']}: " + "; ".join(changed),
            "Bring the study back, or remove that line of results and run it again",
        )

    def ways(self, size: str) -> dict[str, dict[str, Way]]:
        """How the losses of each arm are measured."""
        arms = [arm.name for arm in self.arms_at(size)]
        return {arm: ways_of(self.experiment(size, arm, 0).model) for arm in arms}

    def overrides(self, size: str, arm: str) -> dict[str, Any]:
        """What an arm changes in the common base, functions replaced by their values."""
        config = self.overridden(size, arm)
        values = {path: read(config, path) for path in self.arm(arm).overrides}
        return {
            path: value.to_dict() if isinstance(value, ConfigDict) else value
            for path, value in values.items()
        }

    @property
    def directory(self) -> pathlib.Path:
        """The folder of the study."""
        return HERE / self.name


@functools.cache
def experiment_of(
    study: Study, size: str, arm: str, seed: int, corpus: str, runs: str
) -> ExperimentConfig:
    """The settings of one run, which are asked for often."""
    return study.built(size, arm, seed, corpus, runs)


def read_settings(config: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment that a line of results is of, be it from before models had parts."""
    if "format" in config:
        return read_config(config, ExperimentConfig, trust=True)
    return before_parts.experiment_of(config)


def place_runs(config: ConfigDict, runs: str, seed: int) -> None:
    """Writes the workdirs of a seed in the place of `RUN_OF` with the name of an arm."""
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            place_runs(value, runs, seed)
        elif isinstance(value, str) and value.startswith(RUN_OF):
            config[name] = f"{runs}/{run_name(value.removeprefix(RUN_OF), seed)}"


def run_name(arm: str, seed: int) -> str:
    """What the run of an arm is called, and its directory."""
    return f"{arm}_seed{seed}"


def study_names() -> list[str]:
    """The studies there are."""
    return sorted(path.parent.name for path in HERE.glob("*/study.py"))


def load_study(name: str) -> Study:
    """A study by the name of its folder.

    Raises:
      ValueError: there is none, or it breaks a rule.
    """
    known = study_names()
    alone = "moe_against_dense"  # not a Study: it has a script
    fix = f"Run python -m experiments.{alone}.run" if name == alone else "Correct the name"
    require(name in known, f"the studies are {known}", repr(name), fix)
    study = importlib.import_module(f"experiments.{name}.study").STUDY
    require(
        study.name == name,
        "a study has the name of its folder",
        f"{study.name!r} in experiments/{name}",
        "Rename one",
    )
    return study
