"""Makes what Orbax logs and raises readable for users."""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from absl import logging as absl_logging


@contextlib.contextmanager
def no_warning_of_reading() -> Iterator[None]:
    """Silences Orbax's two warnings that a read-only manager only reads."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Drops tracebacks that Orbax logs, in several threads, of errors that it also raises."""
    return not (record.exc_info and "/orbax/" in record.pathname)


def reason_of(error: BaseException) -> str:
    """The system's message of an error, whichever exception wraps it; one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number)
    return f"{type(error).__name__}: {text[:300]}"
