"""The log of a job's process: its output, and why it failed."""

import pathlib

LOG_FILE = "log.txt"  # in the directory of the job
ERROR = "error: "  # begins the last line, if the job failed


def failure(directory: pathlib.Path) -> str:
    """The error that ended the process of a job, from its log; "" if none did."""
    path = directory / LOG_FILE
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.removeprefix(ERROR) if last.startswith(ERROR) else ""
