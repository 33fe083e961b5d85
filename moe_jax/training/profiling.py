"""A profiler trace of some steps, for TensorBoard and Perfetto."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.user_errors import in_one_line

PROFILE = "profile"


class Profile:
    """Traces the steps of `training.profile_steps` into `WORKDIR/profile`, on process 0.

    The XPlane trace shows what the devices run over time, under the names of the model's scopes.
    The context ends the trace however the run ends. A failed trace never fails the run.

    Args:
      steps: the first and the last step to trace; (): none.
      workdir: the run's directory.
    """

    def __init__(self, steps: tuple[int, ...], workdir: pathlib.Path) -> None:
        self._first, self._last = steps or (0, -1)
        self._directory = workdir / PROFILE
        self._traces = False

    def before(self, step: int, state: Any) -> None:
        """Call this before each step, with the state before it."""
        if self._traces or not self._first <= step <= self._last or jax.process_index() != 0:
            return
        jax.block_until_ready(state)  # keeps steps that still run out of the trace
        with self._without():
            # First: JAX starts no trace after one that it could not write.
            self._directory.mkdir(parents=True, exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call would be an event
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._traces = True

    def after(self, step: int, state: Any) -> None:
        """Call this after each step, with the state after it."""
        if self._traces and step >= self._last:
            jax.block_until_ready(state)  # waits for the end of the step
            self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._traces:
            self._stop()

    def _stop(self) -> None:
        self._traces = False
        with self._without():
            jax.profiler.stop_trace()
            print(
                f"profile: {self._directory} (tensorboard --logdir={self._directory})", flush=True
            )

    @contextlib.contextmanager
    def _without(self) -> Iterator[None]:
        """Continues without the trace if it fails, with one warning."""
        try:
            yield
        except Exception as error:  # any error of the profiler
            self._first, self._last = 0, -1
            why = in_one_line(error)
            print(
                f"warning: no trace in {self._directory}, and the run goes on without it: {why}",
                file=sys.stderr,
                flush=True,
            )
