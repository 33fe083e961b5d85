"""Writes the report of a run again: `python -m moe_jax.report --workdir=RUN`.

It reads only the files in the run's directory. It can be made at any time, also during a run.
"""

import sys

from absl import flags

from moe_jax import command_line


def main() -> None:
    """Writes `report/report.md` and its figures into the run's directory."""
    from moe_jax.analysis.report import write_report  # matplotlib takes a second to import

    print(write_report(flags.FLAGS.workdir))


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.")


command = command_line.Command(main, define_flags, required=("workdir",), uses_devices=False)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
