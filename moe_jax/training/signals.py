"""SIGTERM, Ctrl-C, SIGHUP: a run ends after the step it is in, the same in all its processes."""

import contextlib
import signal
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
    """Remembers SIGTERM, Ctrl-C or SIGHUP until the step that runs is over; a second acts at once.

    So does one that finds nothing to save: before the first step is over, and in `nothing_to_save`.
    To act is what the handler does that was there before: a command ends with one line
    (`moe_jax.interrupts`), a program of the user's gets its KeyboardInterrupt. A checkpoint that
    is being written is complete before. SIGHUP comes when a terminal is closed; it stays ignored
    under `nohup`.

    Of several processes, which are never in the same step, JAX hands SIGTERM on from one to all
    and finds a step that none of them has begun. It keeps on catching SIGTERM until then, so that a
    second one does not kill; Ctrl-C counts as SIGTERM.

    Args:
      start: the step that the run goes on from.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._several = jax.process_count() > 1
        self._received: int | None = None
        self._old: dict[int, Any] = {}
        self._unsaved = False
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "SignalFlag":
        # Several processes agree on a step, however early the signal comes.
        self._exit.enter_context(interrupts.deferring(lambda: self._several or self._unsaved))
        if self._several:
            self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._pass_on)
            return self
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._several:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # in the place of JAX's

    def stops_after(self, step: int) -> int | None:
        """The signal that ends the run after this step, or None; all processes ask after each."""
        self._unsaved = True
        if self._several:
            # JAX counts the calls from 1 on, and agrees on one of them.
            reached = multihost_utils.reached_preemption_sync_point(step - self._start)
            return signal.SIGTERM if reached else None
        return self._received

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """A signal to a single process acts at once in this block, which comes after a save."""
        if self._received is not None:
            self._act(self._received)
        before, self._unsaved = self._unsaved, False
        try:
            yield
        finally:
            self._unsaved = before

    def _handle(self, number: int, frame: object) -> None:
        del frame
        self._received = number
        for each, handler in self._old.items():
            signal.signal(each, handler)
        if not self._unsaved:
            self._act(number)

    def _act(self, number: int) -> None:
        with contextlib.suppress(Exception):
            interrupts.said_before_end()  # waits for a save: SIGTERM may kill, with no `finally`
        signal.raise_signal(number)

    def _pass_on(self, number: int, frame: object) -> None:
        del frame
        signal.signal(number, self._old[number])
        signal.raise_signal(signal.SIGTERM)
