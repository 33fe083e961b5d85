"""Training speed: seconds per step, tokens per second, and MFU."""

import time
from collections.abc import Callable

from moe_jax.config import ExperimentConfig


class Rates:
    """Speed between two logged steps, without the time of evaluations and checkpoints.

    Args:
      config: the run's config.
      step_flops_per_token: model FLOPs of a training step per token.
      peak: peak FLOP/s of all devices together; None: unknown.
    """

    def __init__(self, config: ExperimentConfig, step_flops_per_token: float, peak: float | None):
        self._tokens = config.training.batch_size * sum(config.lengths)
        self._flops = step_flops_per_token
        self._peak = peak
        self._step, self._since = 0, 0.0

    def start(self, step: int) -> None:
        """Starts the measurement at a step."""
        self._step, self._since = step, time.perf_counter()

    def measure(self, step: int) -> dict[str, float]:
        """Returns the rates since the last call and starts again; {} if no step has passed."""
        if step == self._step:
            return {}
        seconds = (time.perf_counter() - self._since) / (step - self._step)
        self.start(step)
        tokens_per_second = self._tokens / seconds
        row = {"perf/seconds_per_step": seconds, "perf/tokens_per_s": tokens_per_second}
        if self._peak:
            rate = tokens_per_second * self._flops / self._peak
            row["perf/mfu"] = rate
        return row

    def paused(self) -> "Pause":
        """A context whose time is not counted."""
        return Pause(self._shift)

    def _shift(self, seconds: float) -> None:
        self._since += seconds


class Pause:
    """Reports how long a `with` block took."""

    def __init__(self, report: Callable[[float], None]):
        self._report = report

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._report(time.perf_counter() - self._begin)
