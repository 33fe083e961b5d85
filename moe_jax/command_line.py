"""What the commands share: quiet logs, and errors of the user as one message."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


def run(main: Callable[[], None], required: Sequence[str]) -> None:
    """Runs a command.

    Args:
      main: does the work; a `ValueError` or `FloatingPointError` of it ends the process with its
        message and exit code 1.
      required: the flags that must be given.
    """

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main()
        except (ValueError, FloatingPointError) as error:
            sys.exit(f"error: {error}")

    flags.mark_flags_as_required(required)
    app.run(checked)
