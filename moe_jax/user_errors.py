"""Errors that a user can fix, as one line: what is wrong, the values, the fix."""

import errno
import os
import re
from collections.abc import Iterable

# Errors that a user can fix, by another setting, file or directory.
USER_ERRORS = (ValueError, FloatingPointError, MemoryError, OSError)
FIX_PERMISSIONS = "Pass a path that this user may read and write, or change its permissions"
FIX_FOLDER = "A file stands where a folder is needed: pass another path"
FIXES = {
    errno.EACCES: FIX_PERMISSIONS,
    errno.EPERM: FIX_PERMISSIONS,
    errno.EROFS: "Pass a path on a file system that can be written",
    errno.ENOENT: "Correct the path",
    errno.ENOTDIR: FIX_FOLDER,
    errno.EEXIST: FIX_FOLDER,
    errno.EISDIR: "A folder stands where a file is needed: pass another path",
    errno.ENAMETOOLONG: "Shorten the path",
    errno.ENOSPC: "Free some space, and run the same command again",
    errno.EDQUOT: "Free some space, and run the same command again",
}
# Of a disk or a network: another try may pass.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK, errno.EHOSTDOWN)


def is_transient(error: Exception) -> bool:
    """Whether another try may pass. The error, or one it tells of, has the system's words."""
    text = describe(error)
    return isinstance(error, OSError) and any(os.strerror(number) in text for number in TRANSIENT)


def describe(error: Exception) -> str:
    """What is wrong, the values and the fix, on one line."""
    if isinstance(error, OSError) and error.errno is not None:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        fix = FIXES.get(error.errno)
        text = ": ".join([error.strerror or type(error).__name__, *paths])
        return f"{text}. {fix}." if fix else text
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    joined = ""
    for line in lines:
        joined += _between(joined, line) + line
    return joined or type(error).__name__


def in_one_line(error: Exception) -> str:
    """The class and the message of an error that is no user's fault, for a warning."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _between(text: str, line: str) -> str:
    """The separator of a line from the text before it: a sentence begins with a capital."""
    if not text or text[-1] in ".:;,":
        return " " if text else ""
    return ". " if re.match(r"[A-Z](?![\w.]*[=:])", line) else "; "


def whole_flags(message: str, settings: Iterable[str]) -> str:
    """A message with each setting named by its whole flag.

    Names in paths stay, and so do a run's name before the message and the fields of an object,
    `Linear(temperature=2.0)`: they may contain NAME=VALUE.

    Args:
      message: may name a setting as the library does: `training.batch_size`, or `batch_size=7`.
      settings: the dotted paths of all settings.

    >>> whole_flags("Lower training.batch_size: batch_size=7.", ["config.training.batch_size"])
    'Lower --config.training.batch_size: --config.training.batch_size=7.'
    """
    paths = set(settings)
    if of_run := re.match(r"\S+=\S*: ", message):
        return of_run[0] + whole_flags(message[of_run.end() :], paths)
    scope = re.match(r"config[\w.]*(?=: )", message)

    def whole(found: re.Match[str]) -> str:
        name, equals = found.groups()
        before = message[: found.start()]
        in_path = "/" in re.split(r"\s", before)[-1]
        if in_path or _in_object(before) or (not equals and "." not in name):
            return found[0]
        within = f"{scope[0]}.{name}" if scope else name
        matches = [path for path in paths if f".{path}".endswith(f".{name}")]
        matches = [within] if within in paths else matches
        return f"--{matches[0]}{equals}" if len(matches) == 1 else found[0]

    return re.sub(r"(?<![\w./'\"=-])((?:\w+\.)*\w+)(=?)", whole, message)


def _in_object(before: str) -> bool:
    """Whether a text ends inside the parentheses of an object, such as `Linear(axis=0, `."""
    opened: list[bool] = []  # whether each open parenthesis follows a word
    for place, one in enumerate(before):
        if one == "(":
            opened.append(place > 0 and (before[place - 1].isalnum() or before[place - 1] == "_"))
        elif one == ")" and opened:
            opened.pop()
    return any(opened)
