"""What Orbax logs and raises, as a user is to read it."""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from absl import logging as absl_logging


@contextlib.contextmanager
def no_warning_of_reading() -> Iterator[None]:
    """Orbax warns, twice, that what is opened for reading is only read."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback, in several threads, of an error that it raises as well."""
    return not (record.exc_info and "/orbax/" in record.pathname)


def reason_of(error: BaseException) -> str:
    """An error of the system as the system says it, out of whatever carries it; one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        if os.strerror(number) in said:
            return os.strerror(number)
    return f"{type(error).__name__}: {said[:300]}"
