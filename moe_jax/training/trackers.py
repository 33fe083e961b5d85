"""Live views of a run's metrics: TensorBoard, a CSV file, Weights & Biases.

`metrics.jsonl` is the record. A tracker shows a copy. A tracker that fails causes one warning and
is dropped, and the run continues. `training.trackers` names them, and may change when a run
resumes.
"""

import contextlib
import csv
import functools
import importlib.util
import logging
import os
import pathlib
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from moe_jax.config import ExperimentConfig, write_config
from moe_jax.config.check import require
from moe_jax.training.files import set_aside
from moe_jax.user_errors import in_one_line

logger = logging.getLogger(__name__)

CSV_FILE = "metrics.csv"
WANDB_ID_FILE = "wandb_id.txt"
STARTUP_SECONDS = 30  # limit for Weights & Biases to answer, before step 1
FINISH_SECONDS = 60  # and to accept the remaining rows, after the last step


class Tracker(Protocol):
    """Shows the scalars of a run. Any of its methods may raise; see `Trackers`."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Receives the metrics after a number of finished steps; steps do not decrease."""

    def close(self) -> None:
        """Ends the tracker; written metrics are kept."""


class Trackers:
    """Several trackers, none of which can fail a run.

    Args:
      openers: the function that opens each tracker, by name.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]] | None = None) -> None:
        self._open: dict[str, Tracker] = {}
        for name, opener in (openers or {}).items():
            with self._without(name):
                self._open[name] = opener()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Passes on the scalars of a row; vectors, such as expert loads, are left out."""
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float)}
        for name, tracker in list(self._open.items()):
            with self._without(name):
                tracker.write(step, scalars)

    def close(self) -> None:
        """Closes all trackers."""
        for name, tracker in list(self._open.items()):
            with self._without(name):
                tracker.close()

    @contextlib.contextmanager
    def _without(self, name: str) -> Iterator[None]:
        """Drops a tracker that fails, with a warning."""
        try:
            yield
        except Exception as error:  # of third-party packages
            self._open.pop(name, None)
            why = in_one_line(error)
            print(
                f"warning: the tracker {name} failed, and the run goes on without it: {why}. "
                "metrics.jsonl has every row.",
                file=sys.stderr,
                flush=True,
            )


class TensorBoard:
    """TensorBoard events in `tensorboard/`; earlier events of repeated steps are purged."""

    def __init__(self, directory: pathlib.Path, start_step: int) -> None:
        with without_module("torch"):  # imported only for a type, which takes seconds
            from tensorboardX import SummaryWriter

        self._events = SummaryWriter(
            str(directory / "tensorboard"),
            purge_step=start_step + 1,
            flush_secs=10,
            filename_suffix=f".from_{start_step}",
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in scalars.items():
            self._events.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._events.close()


@contextlib.contextmanager
def without_module(name: str) -> Iterator[None]:
    """Hides a module from imports, as if it were not installed; a loaded module stays."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python then fails its import
    try:
        yield
    finally:
        sys.modules.pop(name, None)


class CsvFile:
    """`metrics.csv`: one line per write, one column per metric; cells of missing metrics are empty.

    A new metric rewrites the file with one more column.
    """

    def __init__(self, directory: pathlib.Path, start_step: int) -> None:
        self._path = directory / CSV_FILE
        self._names = ["step"]
        rows: list[dict[str, Any]] = []
        if self._path.exists():
            try:
                self._names, rows = read_table(self._path, start_step)
            except (ValueError, TypeError, csv.Error) as error:
                aside = set_aside(self._path)
                logger.warning("%s is damaged (%s): it is now %s.", self._path, error, aside)
        self._rewrite(rows)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        row = {"step": step, **scalars}
        new = [name for name in row if name not in self._names]
        if new:
            with self._path.open(encoding="utf-8", newline="") as stream:
                rows: list[Any] = list(csv.DictReader(stream))
            self._names += new
            self._rewrite([*rows, row])
            return
        with self._path.open("a", encoding="utf-8", newline="") as stream:
            csv.DictWriter(stream, self._names, lineterminator="\n").writerow(row)

    def close(self) -> None:
        """See `Tracker`; every line is in the file already."""

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, self._names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self._path)


def read_table(path: pathlib.Path, last_step: int) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns of a `metrics.csv`, and its rows up to a step.

    Raises:
      KeyError: it has no column "step", so another program wrote it.
      ValueError, TypeError, csv.Error: it is damaged.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = [row for row in reader if int(row["step"]) <= last_step]
        return list(reader.fieldnames or ["step"]), rows


class WeightsAndBiases:
    """A Weights & Biases run; a resumed run continues the same one.

    The package's variables configure it: WANDB_PROJECT (by default "moe_jax"), WANDB_ENTITY,
    WANDB_MODE=offline, and so on. Its id is kept in the workdir, in `wandb_id.txt`. For a repeated
    step it keeps the first values, which are the same. Without a key it does not prompt: it fails
    like any tracker.
    """

    def __init__(self, directory: pathlib.Path, config: Mapping[str, Any]) -> None:
        import wandb

        path = directory / WANDB_ID_FILE
        run_id = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            path.write_text(f"{run_id}\n", encoding="utf-8")
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        init = functools.partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", "moe_jax"),
            id=run_id,
            name=directory.resolve().name,
            dir=str(directory),
            config=dict(config),
            resume=None if offline else "allow",
            settings=wandb.Settings(console="off", quiet=True, init_timeout=STARTUP_SECONDS),
        )
        with without_terminal():
            self._run = within(STARTUP_SECONDS, init)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        within(FINISH_SECONDS, self._run.finish)


@contextlib.contextmanager
def without_terminal() -> Iterator[None]:
    """Detaches standard input, so that no question to an absent user blocks a run."""
    terminal = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Returns a function's result, if it comes in time; a hung thread is abandoned.

    Raises:
      TimeoutError: the function did not return in time.
      RuntimeError: the function raised an error; it has the same message.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def call() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # SystemExit too: it would end the thread silently
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise RuntimeError(str(error) or type(error).__name__) from error
    return value


def check_trackers(names: Iterable[str]) -> None:
    """Refuses a tracker whose package is not installed, before a run begins.

    Raises:
      ValueError: naming the command that installs it.
    """
    if "wandb" not in names:
        return
    found = importlib.util.find_spec("wandb")
    require(
        found is not None and found.origin is not None,  # a folder called wandb has no origin
        "training.trackers names 'wandb', which is a package of its own",
        "the package wandb is not installed",
        "Run `pip install wandb`, or leave it out of training.trackers",
    )


def open_trackers(
    config: ExperimentConfig, directory: str | pathlib.Path, start_step: int
) -> Trackers:
    """Opens the trackers that a config names; none on processes other than the first.

    Args:
      config: the run's config.
      directory: its workdir, which exists.
      start_step: the step it starts or resumes from; TensorBoard and CSV drop later steps.
    """
    if jax.process_index() != 0:
        return Trackers()
    directory = pathlib.Path(directory)
    known: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(directory, start_step),
        "csv": lambda: CsvFile(directory, start_step),
        "wandb": lambda: WeightsAndBiases(directory, write_config(config)),
    }
    return Trackers({name: known[name] for name in config.training.trackers})
