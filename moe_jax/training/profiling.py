"""A trace of some steps, which TensorBoard and Perfetto open."""

import pathlib
from typing import Any

import jax

PROFILE = "profile"


class Profile:
    """Traces the steps of `training.profile_steps` into `WORKDIR/profile`, on process 0.

    An XPlane trace: what runs on the devices when, under the names of the model's scopes. A context
    that ends the trace however the run ends.

    Args:
      steps: the first and the last step to trace; (): none.
      workdir: of the run.
    """

    def __init__(self, steps: tuple[int, ...], workdir: pathlib.Path) -> None:
        self._first, self._last = steps or (0, -1)
        self._directory = workdir / PROFILE
        self._traces = False

    def at(self, step: int, state: Any) -> None:
        """To be called before each step, with the state before it."""
        inside = self._first <= step <= self._last and jax.process_index() == 0
        if inside == self._traces:
            return
        jax.block_until_ready(state)  # steps are still running: they are in the trace, or not
        if inside:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call would be an event
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._traces = True
        else:
            self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._traces:
            self._stop()

    def _stop(self) -> None:
        self._traces = False
        jax.profiler.stop_trace()
        print(f"profile: {self._directory} (tensorboard --logdir={self._directory})", flush=True)
