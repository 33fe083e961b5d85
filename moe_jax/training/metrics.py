"""The metrics of a run, by step.

`metrics.jsonl` contains one JSON object per write, and each step once even if the run was killed
and resumed. Trackers (`moe_jax.training.trackers`) show the same rows during a run.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config.json_text import json_text, numbers
from moe_jax.files import write_atomically
from moe_jax.training.files import EVALUATION_FILE, METRICS_FILE, REPORT, SAMPLE_FILE, set_aside
from moe_jax.training.trackers import Trackers

logger = logging.getLogger(__name__)

SECONDS_PER_STEP = "perf/seconds_per_step"
LAST_BYTES = 2**20  # at the end of a metrics file, which contain its last lines


class MetricsFile:
    """`metrics.jsonl`: one row per line, each step once.

    Args:
      path: path of the file, made if absent.
      start_step: the step the run starts or resumes from. Rows of later steps, which will be run
        again, are dropped.
      saved: `state` when the checkpoint of `start_step` was saved; None: unknown. Rows lost since
        then are reported, and a damaged file is set aside.
    """

    def __init__(
        self, path: pathlib.Path, start_step: int = 0, saved: Mapping[str, Any] | None = None
    ) -> None:
        lines = recover_rows(path, start_step, saved)
        text = b"".join(line + b"\n" for line in lines)
        write_atomically(path, text.decode())
        self._file = path.open("a", encoding="utf-8")
        self._num_rows, self._sha256 = len(lines), hashlib.sha256(text)
        self.evaluated = {row["step"] for row in map(json.loads, lines) if is_evaluation(row)}

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends a row; it survives a kill at once, and a power failure after `state`."""
        line = json_text(row) + "\n"
        self._file.write(line)
        self._file.flush()
        self._num_rows += 1
        self._sha256.update(line.encode())

    def state(self) -> dict[str, Any]:
        """Syncs the rows to disk, and returns their number and sha256."""
        os.fsync(self._file.fileno())
        return {"rows": self._num_rows, "sha256": self._sha256.hexdigest()}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row contains metrics of the held-out split."""
    return any(name.startswith("heldout/") for name in row)


def recover_rows(
    path: pathlib.Path, start_step: int, saved: Mapping[str, Any] | None
) -> list[bytes]:
    """Reads the lines up to a step; warns of lost rows, and sets a damaged file aside.

    A last line that a kill truncated is no damage. A run that starts over, such as after its
    checkpoints were moved away, sets the old file aside.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    if lines and step_of(lines[-1]) is None:
        lines.pop()
    steps = [step_of(line) for line in lines]
    rows = [(line, step) for line, step in zip(lines, steps, strict=True) if step is not None]
    kept = [line for line, step in rows if step <= start_step]
    prefix = "damaged"
    if not path.exists():
        problem = "is missing" if start_step else ""
    elif None in steps:
        problem = f"is damaged in line {steps.index(None) + 1}"
    elif saved and digest(lines[: saved["rows"]]) != saved["sha256"]:
        problem = f"is not what the checkpoint of step {start_step} was saved with"
    elif start_step and not lines and not (saved and saved["rows"] == 0):
        problem = "has no rows"
    elif not start_step and len(kept) < len(rows):
        problem = f"has {len(rows) - len(kept)} rows of later steps, but there is no checkpoint"
        prefix = "earlier"
    else:
        problem = ""
    if problem:
        lost = f" of {saved['rows']}" if saved else ""
        # A copy: a kill before the kept rows are written leaves them in the file.
        name = set_aside(path, prefix=prefix, copy=True) if path.exists() else ""
        aside = f" The file is set aside as {name}." if name else ""
        logger.warning("%s %s: %d rows%s are kept.%s", path, problem, len(kept), lost, aside)
    return kept


def set_results_aside(directory: pathlib.Path) -> None:
    """Sets aside what a run wrote after its last step, since the run begins anew; process 0 only.

    Otherwise the new run would look finished, with the old loss, until its own last step.
    """
    if jax.process_index() != 0:
        return
    for name in (EVALUATION_FILE, SAMPLE_FILE, REPORT):
        if (path := directory / name).exists():
            name = set_aside(path, prefix="earlier")
            logger.warning("%s is of a run without checkpoints: it is now %s.", path, name)


def step_of(line: bytes) -> int | None:
    """The step of a line of a metrics file; None if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return None


def digest(lines: Sequence[bytes]) -> str:
    """Sha256 of lines, each with its newline."""
    return hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()


class MetricWriter:
    """Appends metrics to `metrics.jsonl`, and passes them to trackers.

    Write the metrics of a step before its checkpoint is saved. Then the file contains all metrics
    up to the step that a killed run resumes from, each step once. Only process 0 writes; the others
    do nothing.

    Args:
      directory: the run's directory, made if absent.
      start_step: the step the run starts or resumes from.
      saved: see `MetricsFile`.
      trackers: they show each row once it is in the file; None: no trackers.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        start_step: int = 0,
        saved: Mapping[str, Any] | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path = path = pathlib.Path(directory) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(path, start_step, saved)
        self._trackers = trackers or Trackers()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step; they survive a kill.

        Args:
          step: the number of finished training steps.
          metrics: numbers, scalar arrays or vectors by name.

        Raises:
          ValueError: a metric is called "step", or is neither a number nor a vector of numbers.
          OSError: the file cannot be written, or is no longer there.
        """
        if not self._writes:
            return
        if not self._path.exists():  # rows written to a removed file are lost
            raise FileNotFoundError(
                f"A run appends to its metrics file: {self._path} was removed or renamed. Bring it "
                "back, and run the same command again."
            )
        row: dict[str, int | float | list[Any]] = {"step": int(step)}
        row.update({name: _plain(name, value) for name, value in metrics.items()})
        self._file.append(row)
        del row["step"]
        self._trackers.write(int(step), row)

    def state(self) -> dict[str, Any] | None:
        """See `MetricsFile`; None on other processes."""
        return self._file.state() if self._writes else None

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation of a step is written; False on other processes."""
        return self._writes and step in self._file.evaluated

    def close(self) -> None:
        """Closes the files."""
        if self._writes:
            self._file.close()
            self._trackers.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads a metrics file.

    Args:
      path: a `metrics.jsonl`. A last line that a kill truncated is left out.

    Returns:
      One dict per line, in writing order: "step" and the metrics by name. Values are floats,
      integers or lists of them; null, written for a value that was not finite, is read as nan.

    Raises:
      ValueError: a line before the last is not a JSON object with a step.
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
                f'every line of a metrics file must be a JSON object with a "step": {path} line '
                f"{number} is {line[:60]!r}. Repair or remove the line."
            ) from error
        rows.append({name: numbers(value) for name, value in row.items()})
    return rows


def elapsed(steps: np.ndarray, seconds_per_step: np.ndarray) -> np.ndarray:
    """Seconds of training steps until each logged step, without evaluations and checkpoints.

    A logged time applies to the steps since the previous one.

    >>> elapsed(np.array([10, 20, 40]), np.array([1.0, 2.0, 1.0])).tolist()
    [10.0, 30.0, 50.0]
    """
    return np.cumsum(np.diff(steps, prepend=0) * np.nan_to_num(seconds_per_step))


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """`elapsed` at the last logged step of these rows; 0 without one.

    >>> training_seconds([{"step": s, SECONDS_PER_STEP: 2.0} for s in (10, 20, 23)])
    46.0
    """
    timed = [(row["step"], row[SECONDS_PER_STEP]) for row in rows if SECONDS_PER_STEP in row]
    if not timed:
        return 0.0
    steps, seconds = np.array(timed, np.float64).T
    return float(elapsed(steps, seconds)[-1])


def last_step(path: str | pathlib.Path) -> int:
    """The step of the last whole line of a metrics file, read from its end; 0 if none is found."""
    try:
        with pathlib.Path(path).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LAST_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def _plain(name: str, value: Any) -> int | float | list[Any]:
    """A number or a list of numbers, with no more digits than its dtype has."""
    array = np.asarray(value)
    if name == "step" or array.ndim > 1 or not jax.numpy.issubdtype(array.dtype, np.number):
        raise ValueError(
            'a metric must be a number or a vector of numbers, under any name but "step": '
            f"{name!r} is of dtype {array.dtype} and shape {array.shape}. Reduce or rename it."
        )
    if jax.numpy.issubdtype(array.dtype, np.integer):
        return array.tolist()
    # str gives the shortest digits that read back as the same float32.
    numbers = [float(str(number)) for number in array.reshape(-1)]
    return numbers if array.ndim else numbers[0]
