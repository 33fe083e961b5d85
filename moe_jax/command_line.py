"""What the commands share: quiet logs, and errors of the user as one message."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from moe_jax.training.checkpoints import DamagedCheckpointError

# What a user can put right, by another setting, file or directory.
USER_ERRORS = (ValueError, FloatingPointError, OSError, DamagedCheckpointError)


def run(main: Callable[[], None], required: Sequence[str]) -> None:
    """Runs a command.

    Args:
      main: does the work; one of `USER_ERRORS` ends the process with its message and exit code 1.
      required: the flags that must be given.
    """

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main()
        except USER_ERRORS as error:
            sys.exit(f"error: {error}")

    flags.mark_flags_as_required(required)
    app.run(checked, flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; what is wrong with one ends the process with a message and exit code 1."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # Where a config file raised an error, its traceback is in between.
        lines = str(error).splitlines()
        sys.exit("error: " + " ".join([lines[0], *lines[1:][-1:]]))
    except AttributeError as error:  # of a field that is not there, in --config.FIELD
        sys.exit(f"error: unknown setting in --config or --config.FIELD: {error}")
