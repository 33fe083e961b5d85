"""The record of a run: a file of JSON lines that stays valid whichever process is killed.

A row gets a line when it starts and a line when it ends. The last line of a row counts.
"""

import functools
import json
import os
import pathlib
import subprocess
import time
from typing import Any

from moe_jax.config.json_text import json_text

STARTED, MEASURED, FAILED, SKIPPED = "started", "measured", "failed", "skipped"
START = "start"  # name of the row for a process that ended before its first row
DONE = (MEASURED, FAILED)  # not measured again
NOT_REACHED = "not reached"  # reason of a row that was not tried yet
ROOT = pathlib.Path(__file__).resolve().parents[2]

Line = dict[str, Any]
Key = tuple[str, str]  # group and row


class Record:
    """A record file. Several processes may append to it, one at a time.

    Args:
      path: path of the file, which need not exist.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def add(self, group: str, row: str, state: str, **found: Any) -> Line:
        """Appends a line and waits until it is on disk."""
        line = {"group": group, "row": row, "state": state, "at": round(time.time(), 1), **found}
        text = json_text(line) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # Ends a line that a kill cut off.
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        return line

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def lines(self) -> list[Line]:
        """All lines, except lines that a kill cut off."""
        if not self.path.exists():
            return []
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return found

    def last(self, *states: str) -> dict[Key, Line]:
        """The last line of every row, or the last line with one of these states."""
        return {
            (line["group"], line["row"]): line
            for line in self.lines()
            if not states or line["state"] in states
        }

    def forget_failed(self) -> None:
        """Marks failed rows as left out, so that they are measured again."""
        for (group, row), line in self.last().items():
            if line["state"] == FAILED:
                self.add(group, row, SKIPPED, reason="to be tried again", needs=0.0)

    def running(self) -> Line | None:
        """The line of the row that is running, or None."""
        lines = self.lines()
        return lines[-1] if lines and lines[-1]["state"] == STARTED else None


@functools.cache
def commit() -> str:
    """The commit of this checkout, with a + if files differ from it.

    The environment variable MOE_JAX_COMMIT sets it in a copy without git.
    """
    if "MOE_JAX_COMMIT" in os.environ:
        return os.environ["MOE_JAX_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return ""
    if name.returncode:
        return ""
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
