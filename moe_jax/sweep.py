"""Trains a grid of settings and seeds: `python -m moe_jax.sweep --config=FILE --out=DIR --set ...`.

    python -m moe_jax.sweep --config=configs/quickstart.py:smoke --out=runs/sweep \
        --set optimizer.learning_rate=1e-3,3e-3,1e-2 --set seed,data.seed=0,1 --jobs=2

Each run is its own process, `python -m moe_jax.train`, with the workdir DIR/NAME. NAME lists what
differs: learning_rate=0.001,seed=0. All configs are built and checked before the first run starts.
Run the same command again to resume a stopped sweep; with other values it adds runs. At the end the
runs are compared, on the terminal and in DIR/compare.html. See docs/runs.md.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import command_line, compare
from moe_jax.config import DataConfig, ExperimentConfig, from_config_dict, read_config, to_dict
from moe_jax.config.check import require
from moe_jax.config.convert import foreign_kinds
from moe_jax.config.file import config_with, configs_in, settings_of
from moe_jax.jobs.grid import (
    NO_PRESET,
    PRESETS,
    Axis,
    check_names,
    grid,
    names_of,
    parse_axis,
    without_quotes,
)
from moe_jax.jobs.log import failure
from moe_jax.jobs.places import Machine, Place, this_machine
from moe_jax.jobs.side_by_side import Board, Stopped, run_side_by_side


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun:
    """A point of the grid.

    Attributes:
      name: what differs.
      workdir: the run's directory.
      config: the run's config.
      arguments: the flags that give this config.
    """

    name: str
    workdir: pathlib.Path
    config: ExperimentConfig
    arguments: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        """Number of its training steps."""
        return self.config.training.num_steps

    def finished_steps(self) -> int:
        """The number of finished steps, from the metrics that it has written."""
        from moe_jax.training.files import METRICS_FILE
        from moe_jax.training.metrics import last_step

        return last_step(self.workdir / METRICS_FILE)

    def is_finished(self) -> bool:
        """Whether its last state is saved, scored on all held-out text (if at all) and reported."""
        from moe_jax.training.files import EVALUATION_FILE, REPORT, read_json
        from moe_jax.training.workdir import CHECKPOINTS

        if not (self.workdir / REPORT / "report.md").is_file():
            return False
        if not self.config.training.evaluate_every:
            return (self.workdir / CHECKPOINTS / str(self.num_steps)).is_dir()
        try:
            return int(read_json(self.workdir / EVALUATION_FILE)["step"]) >= self.num_steps
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def command(self) -> list[str]:
        """The command line of its process; run again, it resumes from the newest checkpoint."""
        where = f"--workdir={self.workdir}"
        return [sys.executable, "-m", "moe_jax.train", *self.arguments, where]


def plan(arguments: Sequence[str], sets: Sequence[str], out: pathlib.Path) -> list[TrainingRun]:
    """Plans the runs of a grid and builds their configs; writes nothing.

    Args:
      arguments: the flags --config and --config.NAME that all runs share.
      sets: the value of each --set.
      out: directory of the runs. Existing runs keep their names; see `workdirs_of`.

    Raises:
      ValueError: a name is not a setting, or a config is invalid.
    """
    axes = [parse_axis(text) for text in sets]
    base = load(arguments)
    settings = {name.removeprefix("config.") for name in settings_of(base)}
    check_names(axes, settings)
    given = {argument.partition("=")[0] for argument in arguments}
    for axis in axes:
        for name in axis.names:
            require(f"--config.{name}" not in given, "a setting may be given only once",
                    f"{name} in --set and in --config.{name}", "Remove one")  # fmt: skip
    strings = {name for name in settings if isinstance(read(base, name), str)}
    points = [
        {name: without_quotes(text) if name in strings else text for name, text in point.items()}
        for point in grid(axes)
    ]
    flags_of = [with_values(arguments, point) for point in points]
    dicts = [load(one) for one in flags_of]
    configs = [from_config_dict(one) for one in dicts]
    values = [
        {name: point[name] if name == PRESETS else read(config, name) for name in point}
        for point, config in zip(points, dicts, strict=True)
    ]
    check_different(axes, points, configs)
    names = names_of(axes, values)
    workdirs = workdirs_of(out, names, configs)
    return [
        TrainingRun(name, workdir, config, tuple(own))
        for name, workdir, config, own in zip(names, workdirs, configs, flags_of, strict=True)
    ]


def load(arguments: Sequence[str]) -> ConfigDict:
    """The config that the flags of a training run give."""
    (spec,), overrides = command_line.split_overrides(arguments)
    return config_with(spec.removeprefix("--config="), overrides)


def with_values(arguments: Sequence[str], point: Mapping[str, str]) -> list[str]:
    """The flags of one point: the shared flags and its values."""
    found = list(arguments)
    presets = point.get(PRESETS, NO_PRESET)
    if presets != NO_PRESET:
        place = next(i for i, one in enumerate(found) if one.startswith("--config="))
        found[place] += ("," if ":" in found[place] else ":") + presets.replace("+", ",")
    return found + [f"--config.{name}={value}" for name, value in point.items() if name != PRESETS]


def shared_arguments(argv: Sequence[str]) -> list[str]:
    """The flags of a command line that give the config, each as one word."""
    argv = flags.FLAGS.read_flags_from_files(list(argv))  # of --flagfile
    plain, overrides = command_line.split_overrides(argv)
    found = [f"--config={name}" for name in configs_in(plain)[-1:]]
    # A flag without a value is a boolean; flags write booleans in lower case.
    return found + [
        f"--{name}={str(text).lower() if isinstance(text, bool) else text}"
        for name, text in overrides
    ]


def read(config: Any, name: str) -> Any:
    """The value of a setting by its dotted path."""
    for part in name.split("."):
        config = config[part]
    return config


def check_different(
    axes: Sequence[Axis], points: Sequence[Mapping[str, str]], configs: Sequence[ExperimentConfig]
) -> None:
    """Refuses a grid in which two points are the same run, such as 1e-3 and 0.001.

    Raises:
      ValueError: naming both.
    """
    first: dict[str, int] = {}
    for place, config in enumerate(configs):
        same = first.setdefault(key_of(config), place)
        require(
            same == place, "the runs of a grid must differ",
            f"{dict(points[same])} and {dict(points[place])} give the same config",
            f"Remove a value of {', '.join(axes[-1].names)}" if len(axes) == 1 else "Remove one",
        )  # fmt: skip


def key_of(config: ExperimentConfig, *, only_results: bool = False) -> str:
    """A text that is equal for two configs only if the configs are equal.

    With `only_results`, only settings that change results are compared.
    """
    return json.dumps(to_dict(config, only_results=only_results), sort_keys=True)


def workdirs_of(
    out: pathlib.Path, names: Sequence[str], configs: Sequence[ExperimentConfig]
) -> list[pathlib.Path]:
    """The directory of each run: its name, or an unused existing run with the same results.

    The config that a run wrote has a resolved mesh and absolute paths, and its logging settings,
    for example, may have changed. Settings that do not change results are not compared.
    """
    from moe_jax.training.workdir import with_whole_paths

    known = known_runs(out, frozenset().union(*map(foreign_kinds, configs)))
    found = [out / name for name in names]
    for i, config in enumerate(configs):
        key = key_of(with_whole_paths(config), only_results=True)
        if known.get(found[i]) != key:
            same = (run for run, other in known.items() if other == key and run not in found)
            found[i] = next(same, found[i])
    return found


def known_runs(out: pathlib.Path, trust: frozenset[str]) -> dict[pathlib.Path, str]:
    """The results-only `key_of` of each run in a directory; unreadable runs are left out.

    Args:
      out: the directory, which may be absent.
      trust: the kinds whose modules may be imported.
    """
    from moe_jax.analysis.runs import runs_in
    from moe_jax.training.files import CONFIG_FILE, read_json

    found = {}
    for run in runs_in(out):
        try:
            config = read_config(read_json(run / CONFIG_FILE), ExperimentConfig, trust=trust)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            continue
        found[run] = key_of(config, only_results=True)
    return found


def check(runs: Sequence[TrainingRun], machine: Machine, num_devices: int) -> None:
    """Runs the checks before the first step for all runs, before any of them starts.

    Makes the token files if the cache has none, so that parallel runs do not each make them.

    Raises:
      ValueError: naming the run.
    """
    from moe_jax.data import Data, check_data, open_data
    from moe_jax.planning.workload import resolve
    from moe_jax.training.loop import content_of, source_of
    from moe_jax.training.trackers import check_trackers
    from moe_jax.training.vocabulary import check_vocabulary
    from moe_jax.training.workdir import check_workdir

    platform = {"cuda": "gpu", "rocm": "gpu"}.get(machine.platform, machine.platform)
    opened: dict[DataConfig, Data] = {}
    begun: set[Any] = set()
    checked: set[Any] = set()
    for run in runs:
        try:
            config = run.config.on_devices(num_devices)
            resolve(config, config.mesh.num_devices, platform)
            check_trackers(config.training.trackers)
            of_any_seed = dataclasses.replace(config.data, seed=0)
            data = opened.get(of_any_seed)
            if data is None:
                data = opened[of_any_seed] = open_data(of_any_seed)
            evaluates = config.training.evaluate_every > 0
            if (of_any_seed, evaluates) not in checked:
                check_data(data, evaluates=evaluates)
                checked.add((of_any_seed, evaluates))
            check_vocabulary(config, data.tokenizer)
            data = dataclasses.replace(data, fingerprints=content_of(config, data))
            check_workdir(config, run.workdir, data.fingerprints)
            begins = (config.init_from, config.model, config.optimizer, of_any_seed)
            if begins not in begun:  # a source is hashed once for all seeds
                source_of(config, run.workdir, data)
                begun.add(begins)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error


def places_for(runs: Sequence[TrainingRun], machine: Machine, num_jobs: int) -> list[Place]:
    """The places of the runs: at most one per run, each with the devices that a mesh needs."""
    meshes = [run.config.mesh for run in runs]
    needed = max(mesh.slices * math.prod(n for n in mesh.sizes if n != -1) for mesh in meshes)
    places = machine.places(num_jobs, needed)
    if len(places) > len(runs):
        places = machine.places(len(runs), needed)
    return places


def sweep(
    runs: Sequence[TrainingRun], places: Sequence[Place], *, skip_failed: bool = False
) -> list[TrainingRun]:
    """Trains the unfinished runs; returns the runs that failed, now or before.

    Raises:
      Stopped: by a signal; the active runs have saved.
    """
    left = [run for run in runs if not run.is_finished()]
    skipped = [run for run in left if skip_failed and failure(run.workdir)]
    left = [run for run in left if run not in skipped]
    counts = {
        "finished before": len(runs) - len(left) - len(skipped),
        "failed before and skipped": len(skipped),
        "to do": len(left),
        "at a time": min(len(places), len(left)),
    }
    text = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"{len(runs)} runs: {text}", flush=True)
    with Board(left) as board:
        failed = run_side_by_side(left, places, board)
    return [run for run in runs if run in failed or run in skipped]


def main(arguments: Sequence[str]) -> None:
    """Trains the grid that the command's arguments define, and compares its runs."""
    import jax

    # The runs' processes take the accelerators; this one only checks.
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    command_line.require_folder("out", values.out)
    out = pathlib.Path(values.out)
    runs = plan(shared_arguments(arguments), values.set, out)
    machine = this_machine(os.environ.get("JAX_PLATFORMS", ""))
    places = places_for(runs, machine, values.jobs)
    check(runs, machine, places[0].num_devices or jax.device_count())
    try:
        failed = sweep(runs, places, skip_failed=values.skip_failed)
    except Stopped as stopped:
        print(
            f"\nstopped by {stopped}; runs with a step to save have saved. To go on, run again:\n  "
            + shlex.join(sys.orig_argv),
            flush=True,
        )
        sys.exit(128 + stopped.number)
    begun = [run.workdir for run in runs if run.workdir.exists()]
    print()
    compare.run(begun, "bits_per_byte", str(out / "compare.csv"), str(out))
    if failed:
        names = ", ".join(run.name for run in failed)
        print(
            f"\n{len(failed)} of {len(runs)} runs failed: {names}. The same command tries them "
            "again, with --skip_failed it does not.",
            file=sys.stderr,
        )
        sys.exit(1)


def define_flags() -> None:
    """Defines the flags of the command."""
    command_line.define_config_flag()
    flags.DEFINE_multi_string(
        "set", None, "NAME=VALUE,VALUE of a setting to vary; may be given again. NAME,NAME=... "
        "sets several alike; presets=none,a,b+c varies the presets of --config.",
    )  # fmt: skip
    flags.DEFINE_string("out", None, "Directory of the runs, each in a folder of its own.")
    flags.DEFINE_integer(
        "jobs", 0, "Runs side by side. 0: a core or a GPU each, and one on another accelerator.", 0
    )
    flags.DEFINE_boolean("skip_failed", False, "Leave out the runs that failed before.")


command = command_line.Command(
    main,
    define_flags,
    required=("config", "set", "out"),
    gets_arguments=True,
    uses_devices=False,
)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
