"""SIGTERM, Ctrl-C, SIGHUP: a run ends after the current step, the same in all processes."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from moe_jax import interrupts


class Interrupted(Exception):
    """A signal ended the run; its state is saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"{signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number
        self.step = step


class SignalFlag:
    """Defers SIGTERM, Ctrl-C or SIGHUP to the end of the current step; a second acts at once.

    A second signal within `interrupts.SAME_SECONDS` counts as the first: a scheduler signals every
    process, and a sweep forwards its own signal to its runs. A signal also acts at once if there is
    nothing to save: before the first step ends, and in `nothing_to_save`.

    To act is to call the previous handler: a command ends with one line (`moe_jax.interrupts`), a
    user's program gets its KeyboardInterrupt. A checkpoint that is being written is completed
    first. Closing a terminal sends SIGHUP; it stays ignored under `nohup`.

    Several processes are never in the same step. JAX forwards SIGTERM from one to all, and finds a
    step that none of them has begun. Until then it catches SIGTERM, so a second one does not kill;
    Ctrl-C counts as SIGTERM.

    Python handles signals only in the main thread: in another thread this does nothing.

    Args:
      start: the step that the run resumes from.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._several = jax.process_count() > 1
        self._on_main_thread = threading.current_thread() is threading.main_thread()
        self._received: int | None = None
        self._since: float | None = None  # when the first signal came
        self._old: dict[int, Any] = {}
        self._unsaved = False
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "SignalFlag":
        if not self._on_main_thread:
            return self
        # Several processes agree on a step, however early the signal comes.
        self._exit.enter_context(interrupts.deferring(lambda: self._several or self._unsaved))
        if self._several:
            self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
            return self
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._several and self._on_main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # replaces JAX's handler
        self._restore()
        self._exit.close()

    def stops_after(self, step: int) -> int | None:
        """The signal that ends the run after this step, or None; all processes ask every step."""
        self._unsaved = True
        if self._several:
            # JAX counts the calls from 1, and chooses one of them for all processes.
            reached = multihost_utils.reached_preemption_sync_point(step - self._start)
            return signal.SIGTERM if reached else None
        return self._received

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Lets a signal to a single process act at once in this block, which follows a save."""
        if self._received is not None:
            self._act(self._received)
        before, self._unsaved = self._unsaved, False
        try:
            yield
        finally:
            self._unsaved = before

    def _handle(self, number: int, frame: object) -> None:
        del frame
        now = time.monotonic()
        if self._since is None:
            self._since = now
            if self._several:
                signal.raise_signal(signal.SIGTERM)
                return
            self._received = number
            if not self._unsaved:
                self._act(number)
            return
        # In a command, a thread judged the second signal on arrival; this handler may run late.
        if not interrupts.are_watched() and now - self._since > interrupts.SAME_SECONDS:
            self._act(number)

    def _act(self, number: int) -> None:
        if not self._several:
            with contextlib.suppress(Exception):
                # This waits for a running save: SIGTERM may kill without running `finally`.
                interrupts.said_before_end()
        self._restore()
        signal.raise_signal(number)

    def _restore(self) -> None:
        while self._old:
            signal.signal(*self._old.popitem())
