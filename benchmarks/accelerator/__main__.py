"""One prepared run for a machine with a GPU or TPU: how accurate and how fast the library is.

    python -m benchmarks.accelerator [--minutes=8] [--out=DIR] [--dry] [--retry]
    python -m benchmarks.accelerator --page [--out=DIR]

The first form measures, the most valuable rows first, and writes a line after each row to
DIR/accelerator.jsonl. It may be killed at any time; the same command continues with the missing
rows, also if DIR is a copy from an earlier run. `--retry` also repeats failed rows. The second form
puts the rows of DIR into docs/accelerators/ and makes the page docs/accelerators.md. `--dry`
measures tiny shapes on a CPU: it tests the run, not the speed.
"""

import argparse
import pathlib
import signal
import sys

from benchmarks.accelerator import page
from benchmarks.accelerator.groups import BY_NAME, GROUPS
from benchmarks.accelerator.record import ROOT, Record, commit
from benchmarks.accelerator.supervisor import Supervisor


def main(arguments: list[str]) -> int:
    """Measures, or makes the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="that the run may take")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "accelerator")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--retry", action="store_true", help="measure again what has failed")
    parser.add_argument("--only", nargs="*", choices=sorted(BY_NAME), help="these groups alone")
    parser.add_argument("--page", action="store_true", help="make docs/accelerators.md")
    given = parser.parse_args(arguments)
    record = Record(given.out.resolve() / "accelerator.jsonl")
    if given.page:
        print(page.publish(record))
        return 0
    if given.retry:
        record.forget_failed()
    groups = GROUPS if given.only is None else [BY_NAME[name] for name in given.only]
    if not commit():
        print("no commit is known: MOE_JAX_COMMIT names it", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # this also ends its child process
    run = Supervisor(record, given.minutes, given.dry, lambda text: print(text, flush=True))
    try:
        run.run(tuple(groups))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"rows: {record.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
