"""SIGTERM and Ctrl-C: a run ends after the step it is in."""

import signal
from typing import Any


class Interrupted(Exception):
    """A signal ended the run; its state is saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"{signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number
        self.step = step


class SignalFlag:
    """Remembers SIGTERM or Ctrl-C until the step that runs is over; a second one kills at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "SignalFlag":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        del frame
        self.received = number
        for each, handler in self._old.items():
            signal.signal(each, handler)
