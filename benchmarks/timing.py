"""Times programs in turn, including programs of another checkout of the repository."""

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

Run = Callable[[], object]

# Executes the setup code, then runs the program of each name it reads, and answers with a line.
WORKER = """
import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what is printed meanwhile is no answer
exec(sys.argv[1])
for name in sys.stdin:
    if name.strip():
        programs[name.strip()]()
    print(file=answers, flush=True)
"""


class Checkout:
    """A process with the code of another checkout, which runs programs on request."""

    def __init__(self, directory: str, setup: str):
        """Starts the process and waits until its programs are ready.

        Args:
          directory: directory of the checkout.
          setup: Python code, run there, that makes `programs`: functions without arguments by name.

        Raises:
          RuntimeError: the code failed; its message was printed.
        """
        path = str(pathlib.Path(directory).resolve())
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=path,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.run("")

    def run(self, name: str) -> None:
        """Runs a program and waits for it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(name, file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            raise RuntimeError(f"the other checkout ended at {name!r}: see above")

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def seconds(run: Run) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def ratios(pairs: Mapping[str, tuple[Run, Run]], rounds: int) -> dict[str, list[float]]:
    """The time of a program over that of its floor, by name, one number per round.

    The floor runs before and after the program, and all pairs take turns.
    """
    for program, floor in pairs.values():
        floor(), program()
    result: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(rounds):
        for name, (program, floor) in pairs.items():
            before, taken, after = seconds(floor), seconds(program), seconds(floor)
            result[name].append(2 * taken / (before + after))
    return result


def cell(values: list[float]) -> str:
    """Median and range, such as 1.02 [0.98, 1.07]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
