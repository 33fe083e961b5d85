"""The process that measures the rows of one group: `python -m benchmarks.accelerator.child`.

It writes a line before and after every row. If it dies, its parent knows in which row.
"""

import argparse
import ctypes
import os
import pathlib
import signal
import statistics
import sys
import time
import traceback

from benchmarks.accelerator.groups import BY_NAME, Row
from benchmarks.accelerator.record import (
    DONE,
    FAILED,
    MEASURED,
    NOT_REACHED,
    SKIPPED,
    STARTED,
    Record,
    commit,
)

LOST = 70  # exit code: this process may have lost the device; another process continues
LIMIT = 3  # a row is stopped after this multiple of its estimated seconds
PATIENCE = 45.0  # seconds that a row always has beyond its estimate


def limit_of(seconds: float) -> float:
    """Seconds after which a row with an estimate of `seconds` is stopped."""
    return max(LIMIT * seconds, seconds + PATIENCE)


def message_of(error: BaseException) -> str:
    """One line: the type of the error, and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def loses_device(error: BaseException) -> bool:
    """Whether this process cannot compute any more after an error, such as a CUDA fault.

    JAX raises the same error for such a fault, for a kernel that does not compile, and if memory
    is exhausted, so a small computation is tried. Types are compared by name, since PyTorch's
    process does not import JAX.
    """
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
    import jax

    try:
        return float(jax.numpy.ones(8).sum()) != 8
    except Exception:
        return True


def measure(
    group: str, rows: list[Row], record: Record, until: float, only_first: bool = False
) -> int:
    """Measures the rows that are not in the record yet, while there is time.

    All rows get a line at once, so that rows that are not reached are known.

    Args:
      group: group of the rows.
      rows: the rows, the most valuable first; rows that ran out of time before are measured last.
      record: record to add to.
      until: end of the time, in seconds since the epoch.
      only_first: whether to measure only rows that are `first`.

    Returns:
      The exit code of this process: 0, or `LOST`.
    """
    last = record.last()
    for row in rows:
        if (group, row.name) not in last:
            record.add(group, row.name, SKIPPED, reason=NOT_REACHED, needs=row.seconds,
                       first=row.first)  # fmt: skip
    ratios = [1.0]  # of actual to estimated seconds of rows
    parent = os.getppid()
    cut = {row.name: last.get((group, row.name), {}).get("cut", 0.0) for row in rows}
    for row in sorted(rows, key=lambda row: cut[row.name]):
        if os.getppid() != parent:
            return LOST  # the parent process is gone
        is_done = last.get((group, row.name), {}).get("state") in DONE
        if is_done or (only_first and not row.first):
            continue
        needs = max(row.seconds * statistics.median(ratios), 2 * cut[row.name])
        left = until - time.time()
        if needs > left:
            reason = f"needs about {needs:.0f} s, {max(left, 0):.0f} s were left"
            record.add(group, row.name, SKIPPED, reason=reason, needs=needs, first=row.first,
                       cut=cut[row.name])  # fmt: skip
            continue
        limit = limit_of(max(needs, row.seconds))
        record.add(group, row.name, STARTED, limit=limit, needs=needs, first=row.first)
        begin = time.time()
        try:
            found = row.run()
        except Exception as error:
            traceback.print_exc()
            failed = {"seconds": since(begin), "commit": commit(), "error": message_of(error)}
            record.add(group, row.name, FAILED, **failed)
            if loses_device(error):
                return LOST
        else:
            record.add(group, row.name, MEASURED, seconds=since(begin), commit=commit(), **found)
            ratios.append((time.time() - begin) / row.seconds)
    return 0


def since(begin: float) -> float:
    """Seconds since a time."""
    return round(time.time() - begin, 2)


def end_with_parent() -> None:
    """Makes Linux kill this process when its parent ends, even if a row hangs."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """Measures a group."""
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=sorted(BY_NAME))
    parser.add_argument("--record", type=pathlib.Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only-first", action="store_true")
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]  # hides the flags from libraries that read flags
    rows = BY_NAME[arguments.group].rows(arguments.dry)
    record = Record(arguments.record)
    code = measure(arguments.group, rows, record, arguments.until, arguments.only_first)
    sys.stdout.flush()
    os._exit(code)  # a normal exit may hang on a lost device


if __name__ == "__main__":
    main()
