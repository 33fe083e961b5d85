"""Runs jobs as parallel processes, shows their progress, and stops them so that they save.

A job is a process with a directory. Its output goes to `log.txt` there, after "starts: COMMAND". If
it fails, the last line begins with "error: " and gives the reason.
"""

import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import rich.console
import rich.progress

from moe_jax import interrupts
from moe_jax.jobs.log import ERROR, LOG_FILE, failure
from moe_jax.jobs.places import Place

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: the terminal was closed


class Job(Hashable, Protocol):
    """Something to run.

    Attributes:
      name: name to show.
      workdir: its directory.
      num_steps: number of its training steps.
    """

    # The class documents these.
    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def workdir(self) -> pathlib.Path: ...  # noqa: D102

    @property
    def num_steps(self) -> int: ...  # noqa: D102

    def finished_steps(self) -> int:
        """The number of finished steps."""

    def is_finished(self) -> bool:
        """Whether nothing is left to do, even if another process did it."""

    def command(self) -> list[str]:
        """The command line of its process; run again, it resumes a stopped job."""


J = TypeVar("J", bound=Job)


class Board:
    """Shows the progress of jobs: a line when each starts or ends, and bars on a terminal."""

    def __init__(self, jobs: Sequence[Job], what: str = "runs") -> None:
        self._console = rich.console.Console()
        self._bar = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._all = self._bar.add_task(what, total=len(jobs))
        self._tasks: dict[Job, rich.progress.TaskID] = {}
        self._count, self._total = 0, len(jobs)

    def __enter__(self) -> "Board":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, job: Job) -> None:
        """Shows that a job starts or resumes."""
        steps = job.finished_steps()
        name = rich.markup.escape(job.name)
        self._tasks[job] = self._bar.add_task(name, total=job.num_steps, completed=steps)
        self.say(f"{job.name}: " + (f"goes on after step {steps}" if steps else "starts"))

    def look(self) -> None:
        """Updates the bars of the running jobs."""
        if not self._bar.disable:
            for job, task in self._tasks.items():
                self._bar.update(task, completed=job.finished_steps())

    def end(self, job: Job, problem: str = "") -> None:
        """Shows that a job has ended."""
        self._bar.remove_task(self._tasks.pop(job))
        self._bar.advance(self._all)
        self._count += 1
        self.say(f"{job.name}: {problem or 'finished'} ({self._count} of {self._total})")

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Stopped(Exception):
    """A signal came; the running jobs have saved and ended."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopFlag:
    """Records signals that would end this process, so that no started job is lost."""

    def __init__(self) -> None:
        self.count, self.number = 0, 0

    @contextmanager
    def listening(self) -> Iterator["StopFlag"]:
        """Handles the signals within this context."""
        old = {number: signal.signal(number, self._take) for number in STOPPING}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        del frame
        self.count, self.number = self.count + 1, number


def run_side_by_side(jobs: Sequence[J], places: Sequence[Place], board: Board) -> list[J]:
    """Runs each job as a process, as many at a time as there are places.

    A signal that would end this process is forwarded to every job, which saves its state and ends.
    A second one is forwarded too, and ends a job at once. A job may also receive the first one from
    elsewhere: it counts two within `interrupts.SAME_SECONDS` as one.

    Returns:
      The jobs that failed.

    Raises:
      Stopped: by a signal.
    """
    waiting, free = list(jobs), list(places)
    running: dict[J, tuple[subprocess.Popen[Any], Place]] = {}
    failed: list[J] = []
    with interrupts.left_to_handlers(), StopFlag().listening() as stop:
        try:
            while (waiting or running) and not stop.count:
                while waiting and free and not stop.count:
                    job = waiting.pop(0)
                    board.begin(job)
                    if job.is_finished():
                        board.end(job)
                        continue
                    place = free.pop(0)
                    running[job] = (start(job, place), place)
                time.sleep(0.2)
                if stop.count:  # jobs get it within `interrupts.SAME_SECONDS`
                    break
                board.look()
                for job, (process, place) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        free.append(place)
                        problem = failure_of(job, process.returncode)
                        failed += [job] * bool(problem)
                        board.end(job, problem)
        finally:
            end_all([process for process, _ in running.values()], stop)
        if stop.count:
            raise Stopped(stop.number)
    return failed


def start(job: Job, place: Place) -> subprocess.Popen[Any]:
    """Starts a job's process in a place, detached from the terminal's Ctrl-C.

    If this process is killed, a job that imports `moe_jax` is stopped too, and saves first.
    """
    job.workdir.mkdir(parents=True, exist_ok=True)
    command = job.command()
    with place.entered(), (job.workdir / LOG_FILE).open("a", encoding="utf-8") as log:
        # A line of its own, so that an error of an earlier attempt is not the last line.
        log.write(f"starts: {' '.join(shlex.join(command).splitlines())}\n")
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=place.environment() | {interrupts.PARENT: str(os.getpid())},
            start_new_session=True,
        )


def end_all(processes: Sequence[subprocess.Popen[Any]], stop: StopFlag) -> None:
    """Asks processes to end, waits for them, and asks again at every further signal."""
    asked = -1
    while any(process.poll() is None for process in processes):
        if asked < stop.count:
            asked = stop.count
            for process in processes:
                process.send_signal(signal.SIGTERM)
        time.sleep(0.05)


def failure_of(job: Job, code: int) -> str:
    """The message about a job that ended with this exit code; "" if it did its work.

    If the last line of the log does not begin with "error: ", such a line is added.
    """
    if code == 0:
        return ""
    path = job.workdir / LOG_FILE
    found = failure(job.workdir)
    if not found:
        found = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = "the lines above may say why"
        if code == -signal.SIGKILL:
            why = "the system kills what needs more memory than there is: lower --jobs or the model"
        found = f"the process ended by {found}; {why}"
        with path.open("a", encoding="utf-8") as log:
            log.write(f"\n{ERROR}{found}\n")
    return f"failed: {found} ({path})"
