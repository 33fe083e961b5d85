"""Starts a process for each group of rows, and stops it if a row or the run is out of time.

This process never uses the accelerator. A kernel that aborts or hangs ends its own process; its row
is recorded as failed, and the next process continues with the following rows.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from benchmarks.accelerator.groups import END, FACTS, GROUPS, Group
from benchmarks.accelerator.record import (
    DONE,
    FAILED,
    NOT_REACHED,
    ROOT,
    SKIPPED,
    START,
    STARTED,
    Line,
    Record,
)

STARTUP = 10.0  # seconds before a process starts to measure
RESERVED = 25.0  # seconds for the last rows and for stopping
POLL = 0.1
DEVICE = ("facts", "device")
OUT_OF_TIME = "the time was up"
GO_ON: Line = {}  # another process measures the following rows


def environment_of_child(
    environment: Mapping[str, str], dry: bool, xla_flags: str = ""
) -> dict[str, str]:
    """The environment variables of a child process; variables that are already set are kept.

    Memory is not preallocated, which leaves memory for PyTorch's process; up to 92 % may be used.
    Compiled programs are cached for the next start.
    """
    cache = ROOT / ".cache" / "accelerator"
    wanted = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    made = {**wanted, **environment}
    platforms = "cpu" if dry else environment.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        platforms += ",cpu"  # parity uses it for float64
    made["JAX_PLATFORMS"] = platforms
    if xla_flags:
        made["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}".strip()
    made["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    return made


class Supervisor:
    """A run of all groups in limited time.

    Args:
      record: record to add to.
      minutes: time limit.
      dry: whether to run tiny sizes on a CPU.
      say: called with a line of text for every row.
    """

    def __init__(self, record: Record, minutes: float, dry: bool, say: Callable[[str], None]):
        self.record, self.dry, self.say = record, dry, say
        self.seconds, self.end = minutes * 60, time.time() + minutes * 60
        record.path.parent.mkdir(parents=True, exist_ok=True)
        self.log = record.path.with_suffix(".log")
        self.tried: set[str] = set()  # groups that had a process in this run
        running = record.running()
        if running is not None:  # an earlier run was killed
            line = left_out(running, "the run was killed", running.get("needs", 0.0))
            record.add(running["group"], running["row"], SKIPPED, **line)
        self.said = len(record.lines())

    def run(self, groups: tuple[Group, ...] = GROUPS) -> None:
        """Runs the first rows of all groups; then all their rows; then the rows left out.

        In the first two passes a group has its share of the time.

        Raises:
          RuntimeError: there is no accelerator.
        """
        before = self.record.last().get(DEVICE, {})
        self.record.add(*DEVICE, SKIPPED, reason="looked at in every run")
        stop = self.end - RESERVED
        self.run_group(FACTS, stop, only_first=not self.dry)
        self.check_machine(before.get("kind"))
        shares = {group: group.share * self.seconds for group in (FACTS, *groups)}
        whole = dict.fromkeys(shares, self.seconds)
        passes = ((True, shares), (False, shares), (False, whole))
        for only_first, seconds in passes[self.dry :]:
            for group, share in seconds.items():
                share = min(share, stop - time.time() - STARTUP)
                if self.fits(group, share, only_first):
                    self.run_group(group, time.time() + STARTUP + share, only_first)
        self.run_group(END, self.end)

    def check_machine(self, before: str | None = None) -> None:
        """Refuses to measure a CPU as an accelerator, or two kinds of device in one record.

        Raises:
          RuntimeError: the device is unsuitable, or JAX did not start.
        """
        device = self.record.last().get(DEVICE, {})
        if device.get("platform") == "cpu" and not self.dry:
            self.record.add(*DEVICE, SKIPPED, reason="no accelerator")
            raise RuntimeError(
                "a GPU or TPU is measured: JAX found a CPU only. Install moe_jax[cuda] or "
                "moe_jax[tpu], or try the run with --dry."
            )
        if "platform" not in device:
            raise RuntimeError(
                f"JAX must start: {device.get('error', 'it did not')}. See {self.log}."
            )
        if before not in (None, device["kind"]):
            raise RuntimeError(
                f"a record is of one kind of device: {self.record.path} is of {before}, this is "
                f"{device['kind']}. Choose another --out."
            )

    def fits(self, group: Group, seconds: float, only_first: bool = False) -> bool:
        """Whether any remaining row would fit in `seconds`."""
        own = [line for (name, row), line in self.record.last().items()
               if name == group.name and row != START]  # fmt: skip
        if not own:  # no process has listed the rows yet
            return seconds > 0 and group.name not in self.tried
        return any(
            line["state"] == SKIPPED
            and line.get("needs", 0.0) < seconds
            and line.get("first", True) >= only_first
            for line in own
        )

    def run_group(self, group: Group, until: float, only_first: bool = False) -> None:
        """Measures a group, in as many processes as needed."""
        self.tried.add(group.name)
        while time.time() + STARTUP / 2 < until or self.dry:
            outcome = self.run_child(group, until, only_first)
            if outcome is None:
                self.forget_start(group)
                return
            if outcome:
                self.record.add(group.name, **outcome)
                self.tell()
            if outcome.get("row") == START or time.time() > until:
                return

    def forget_start(self, group: Group) -> None:
        """Clears an earlier failure to start, once a process has measured."""
        if self.record.last().get((group.name, START), {}).get("state") == FAILED:
            self.record.add(group.name, START, SKIPPED, reason="a later process started")

    def run_child(self, group: Group, until: float, only_first: bool = False) -> Line | None:
        """Runs one process.

        Returns:
          The line of the row in which it ended (`START` before the first row); `GO_ON` if it ended
          after a row; None if it has measured all rows that it could.
        """
        command = [sys.executable, "-m", "benchmarks.accelerator.child", group.name]
        command += [f"--record={self.record.path}", f"--until={until}", *["--dry"] * self.dry]
        command += ["--only-first"] * only_first
        lines = len(self.record.lines())
        begin_of_log = self.log.stat().st_size if self.log.exists() else 0
        begin = time.time()
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, process_group=0,
                env=environment_of_child(os.environ, self.dry, group.xla_flags),
            )  # fmt: skip
            try:
                stopped = self.wait(process, begin, until)
            finally:
                end_process(process)
        self.tell()
        running = self.record.running()
        if running is None and process.returncode == 0:
            return None
        said = last_words(self.log, begin_of_log)
        error = stopped or f"its process ended with {ending(process.returncode)}: {said}"
        if running is None and stopped == OUT_OF_TIME:
            return {"row": START, "state": SKIPPED, "reason": stopped}
        if running is None and any(line["state"] in DONE for line in self.record.lines()[lines:]):
            return GO_ON
        if running is None:
            return {"row": START, "state": FAILED, "error": error[:400]}
        took = time.time() - running["at"]
        if stopped == OUT_OF_TIME and took < running["limit"] / 2:
            return {"row": running["row"], "state": SKIPPED, **left_out(running, stopped, took)}
        return {"row": running["row"], "state": FAILED, "error": error[:400]}

    def wait(self, process: subprocess.Popen[bytes], begin: float, until: float) -> str:
        """Waits until a process ends; returns "" or the reason to stop it."""
        latest = begin
        while process.poll() is None:
            time.sleep(POLL)
            now, running = time.time(), self.record.running()
            self.tell()
            if now > max(until, self.end - RESERVED / 2) and not self.dry:
                return OUT_OF_TIME
            if running is not None:
                latest = running["at"]
                if now - latest > running["limit"]:
                    return f"stopped after {running['limit']:.0f} s"
            elif now - max(latest, self.last_line()) > 120:
                return "stopped: it did nothing for 120 s"
        return ""

    def last_line(self) -> float:
        """Time of the last line of the record."""
        lines = self.record.lines()
        return lines[-1]["at"] if lines else 0.0

    def tell(self) -> None:
        """Reports the new lines of the record."""
        lines = self.record.lines()
        for line in lines[self.said :]:
            if line["state"] != STARTED and line.get("reason") != NOT_REACHED:
                self.say(text_of(line))
        self.said = len(lines)


def left_out(running: Line, reason: str, took: float) -> Line:
    """The record of a stopped row: its new estimate is at least twice the time it took."""
    needs = max(running.get("needs", 0.0), 2 * took)
    return {"reason": reason, "needs": needs, "cut": took, "first": running.get("first", True)}


def text_of(line: Line) -> str:
    """A line of the record as readable text."""
    hidden = ("group", "row", "state", "at", "limit", "needs", "cut", "first", "commit", "form")
    values = ", ".join(f"{name} {short(value)}" for name, value in line.items()
                       if name not in hidden)  # fmt: skip
    return f"{line['group']}/{line['row']}: {line['state']}: {values}"


def short(value: object) -> str:
    """A value as short text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ending(code: int) -> str:
    """How a process ended: "signal 6 (SIGABRT)", "exit code 1"."""
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)  # a driver may hold it longer


def last_words(log: pathlib.Path, begin: int) -> str:
    """The last output line of a process that looks like a reason."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [
        line for line in lines if "Error" in line or "F0000" in line or "Check failed" in line
    ]
    return " ".join((telling or lines or ["nothing was said"])[-1].split())[:250]
