"""What a run writes about itself: its metrics, step by step, and what it was run with.

`metrics.jsonl` is the record: one JSON object a write, each step once even if the run was killed
and resumed. TensorBoard events are written beside it for looking at while a run goes.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX

from moe_jax.config import ExperimentConfig, write_config
from moe_jax.config.json_text import json_text, numbers
from moe_jax.training.ways import ways_of

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
CONFIG_FILE = "config.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard events.

    Write the metrics of a step before its checkpoint is saved: then whatever step a killed run
    resumes from, the file has all metrics up to that step, and each step once. Only process 0
    writes; on the others this does nothing.

    Args:
      directory: the run's directory, made if absent.
      start_step: the step the run starts or resumes from. What the file has of later steps, which
        will be run again, is dropped.

    Raises:
      ValueError: the file that is there is not a metrics file.
    """

    def __init__(self, directory: str | pathlib.Path, start_step: int = 0) -> None:
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        path = pathlib.Path(directory) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= start_step]
            write_atomically(path, "".join(json_text(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(path.parent / "tensorboard"),
            purge_step=start_step + 1,
            flush_secs=10,
            filename_suffix=f".from_{start_step}",
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step; what was written survives a kill.

        Args:
          step: the number of finished training steps.
          metrics: numbers, scalar arrays or vectors by name. Vectors, such as the load of each
            expert, are left out of the TensorBoard events.

        Raises:
          ValueError: a metric is called "step", or is neither a number nor a vector of numbers.
        """
        if not self._writes:
            return
        row: dict[str, int | float | list[Any]] = {"step": int(step)}
        row.update({name: _plain(name, value) for name, value in metrics.items()})
        self._file.write(json_text(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and not isinstance(value, list):
                self._events.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Closes the files."""
        if self._writes:
            self._file.close()
            self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads a metrics file.

    Args:
      path: a `metrics.jsonl`. A last line that a kill cut short is left out.

    Returns:
      One dict a line, in the order of writing: "step" and the metrics by name. Values are floats,
      integers or lists of them; null, which stands for what was not finite, is read as nan.

    Raises:
      ValueError: another line than the last is not a JSON object with a step.
    """
    lines = pathlib.Path(path).read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f'every line of a metrics file is a JSON object with a "step": {path} line '
                f"{number} is {line[:60]!r}. Repair or remove the line."
            ) from error
        rows.append({name: numbers(value) for name, value in row.items()})
    return rows


def run_record() -> dict[str, Any]:
    """What this process runs on and from, as JSON can hold it.

    Returns:
      "started" (UTC), "command", "python", "versions" of the libraries, "platform", "device_kind",
      "num_devices", "num_processes", and "commit" and "dirty" (whether tracked files differ from
      the commit) of the checkout this package is part of, None if it is not in one.
    """
    device = jax.devices()[0]
    commit, dirty = _checkout()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "commit": commit,
        "dirty": dirty,
    }


def write_run_record(
    directory: str | pathlib.Path,
    config: ExperimentConfig,
    *,
    start_step: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `config.json` and `run.json` into a run's directory; process 0 only.

    A run that resumes keeps the records of its earlier sessions under "earlier". Its settings are
    the same: `check_workdir` has refused any other.

    Args:
      directory: the run's directory, made if absent.
      config: the resolved settings.
      start_step: the step the run starts or resumes from.
      facts: more to record, as JSON can hold it, such as {"parameters": {"total": 1, "active": 1}}.

    Returns:
      The record.
    """
    directory = pathlib.Path(directory)
    ways = {name: way._asdict() for name, way in ways_of(config.model).items()}
    record = {"start_step": start_step, **run_record(), "losses": ways, **(facts or {})}
    if jax.process_index() != 0:
        return record
    directory.mkdir(parents=True, exist_ok=True)
    settings = write_config(config)
    if start_step > 0 and (directory / RUN_FILE).exists():
        last = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
        record["earlier"] = [*last.pop("earlier", []), last]
    write_atomically(directory / CONFIG_FILE, json_text(settings, indent=2) + "\n")
    write_atomically(directory / RUN_FILE, json_text(record, indent=2) + "\n")
    return record


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces a file by one with this text; a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _plain(name: str, value: Any) -> int | float | list[Any]:
    """A number or a list of numbers, of no more digits than its dtype has."""
    array = np.asarray(value)
    if name == "step" or array.ndim > 1 or not jax.numpy.issubdtype(array.dtype, np.number):
        raise ValueError(
            'a metric is a number or a vector of numbers, under any name but "step": '
            f"{name!r} is of dtype {array.dtype} and shape {array.shape}. Reduce or rename it."
        )
    if jax.numpy.issubdtype(array.dtype, np.integer):
        return array.tolist()
    # str gives the shortest digits that read back as the same float32.
    numbers = [float(str(number)) for number in array.reshape(-1)]
    return numbers if array.ndim else numbers[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout() -> tuple[str | None, bool | None]:
    """The commit of the git checkout with this file in it, and whether it was modified."""
    here = pathlib.Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        # An installed copy may lie inside a checkout of something else, which does not track it.
        git("ls-files", "--error-unmatch", here.name)
        commit = git("rev-parse", "HEAD")
        return commit, bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
