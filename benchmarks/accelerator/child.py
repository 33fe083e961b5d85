"""The process that measures the rows of one group: `python -m benchmarks.accelerator.child`.

It writes a line before and after every row. If it dies, its parent knows in which row.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
import traceback

from benchmarks.accelerator.groups import BY_NAME, Row
from benchmarks.accelerator.record import DONE, FAILED, MEASURED, SKIPPED, STARTED, Record, commit

LIMIT = 3  # times the seconds that a row is thought to need, then it is stopped
PATIENCE = 60.0  # seconds that it has in any case


def limit_of(seconds: float) -> float:
    """Seconds after which a row that was thought to need so many is stopped."""
    return max(LIMIT * seconds, seconds + PATIENCE)


def message_of(error: BaseException) -> str:
    """One line: the type, and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def measure(group: str, rows: list[Row], record: Record, until: float) -> None:
    """Measures those rows that are not in the record yet, while there is time.

    Args:
      group: their group.
      rows: the most valuable first.
      record: to add to.
      until: time, in seconds since the epoch, when there is none left.
    """
    done = {key for key, line in record.last().items() if line["state"] in DONE}
    ratios = [1.0]  # of the seconds that rows took to those that they were thought to need
    parent = os.getppid()
    for row in rows:
        if os.getppid() != parent:
            return  # whoever asked for it is gone
        if (group, row.name) in done:
            continue
        needs, left = row.seconds * statistics.median(ratios), until - time.time()
        if needs > left:
            reason = f"needs about {needs:.0f} s, {max(left, 0):.0f} s were left"
            record.add(group, row.name, SKIPPED, reason=reason, needs=needs)
            continue
        record.add(group, row.name, STARTED, limit=limit_of(needs))
        begin = time.time()
        try:
            found = row.run()
        except Exception as error:
            traceback.print_exc()
            found, state = {"error": message_of(error)}, FAILED
        else:
            state = MEASURED
        record.add(group, row.name, state, seconds=since(begin), commit=commit(), **found)
        ratios.append((time.time() - begin) / row.seconds)


def since(begin: float) -> float:
    """Seconds since a time."""
    return round(time.time() - begin, 2)


def main() -> None:
    """Measures a group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=sorted(BY_NAME))
    parser.add_argument("--record", type=pathlib.Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]  # libraries that read flags find none
    rows = BY_NAME[arguments.group].rows(arguments.dry)
    measure(arguments.group, rows, Record(arguments.record), arguments.until)


if __name__ == "__main__":
    main()
