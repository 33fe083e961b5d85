"""The progress of a run: a bar on a terminal, plain lines in a log file."""

import contextlib
import datetime
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

import jax
import rich.console
import rich.progress


class Progress:
    """Shows the progress of a run; a context manager.

    A terminal shows one bar. Elsewhere, such as in a log file, each update with metrics prints a
    plain line. Processes other than the first show nothing. A closed terminal does not fail the
    run.

    Args:
      num_steps: steps of the whole run.
      start_step: the step the run starts or resumes from.
      utilization: label of `perf/mfu`: "mfu" for a share of the device's data-sheet peak, or for
        example "of matmul peak".
      file: where to write; standard output by default.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        utilization: str = "mfu",
        file: TextIO | None = None,
    ) -> None:
        self._num_steps = num_steps
        self._utilization = utilization
        self._quiet = jax.process_index() != 0
        self._console = rich.console.Console(file=cast(TextIO, _Shown(file or sys.stdout)))
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=self._quiet or not self._console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task(
            progress_line(start_step, num_steps, {}), total=num_steps, completed=start_step
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that a step is finished.

        Args:
          step: the number of finished training steps.
          metrics: metrics of a logged step by their names in `metrics.jsonl`. It shows train/loss,
            perf/tokens_per_s, perf/mfu and perf/seconds_per_step, if present.
        """
        if metrics is None:
            self._bar.update(self._task, completed=step)
            return
        line = progress_line(step, self._num_steps, metrics, self._utilization)
        if self._bar.disable:
            self.print(line)
        else:
            self._bar.update(self._task, completed=step, description=line)

    def print(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar.disable:
            print(text, file=self._console.file, flush=True)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Shown:
    """A file that ignores write errors: a run continues, or saves, after its terminal is closed."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def progress_line(
    step: int, num_steps: int, metrics: Mapping[str, float], utilization: str = "mfu"
) -> str:
    """One line about a step.

    Args:
      step: the number of finished training steps.
      num_steps: steps of the whole run.
      metrics: see `Progress.update`.
      utilization: see `Progress`.

    Returns:
      The line; missing metrics are left out.

    >>> progress_line(200, 1000, {"train/loss": 2.3456, "perf/tokens_per_s": 12_345.0,
    ...                           "perf/mfu": 0.41, "perf/seconds_per_step": 0.189})
    'step  200/1000  loss 2.3456 (nats/token)  12.3k tok/s  mfu 41%  eta 02:31'
    """
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    if "train/loss" in metrics:
        parts.append(f"loss {float(metrics['train/loss']):.4f} (nats/token)")
    if "perf/tokens_per_s" in metrics:
        parts.append(f"{_thousands(float(metrics['perf/tokens_per_s']))} tok/s")
    if "perf/mfu" in metrics:
        parts.append(f"{utilization} {float(metrics['perf/mfu']):.0%}")
    if "perf/seconds_per_step" in metrics:
        seconds = (num_steps - step) * float(metrics["perf/seconds_per_step"])
        parts.append(f"eta {_duration(seconds)}")
    return "  ".join(parts)


def _thousands(number: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    """Minutes and seconds; hours and days when there are any."""
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text[2:] if text.startswith("0:") else text
