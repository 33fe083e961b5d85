"""Files and directories that are written whole or not at all."""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces a file; a killed process leaves the old content or the new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    temporary.replace(path)


def write_synced(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file and syncs it to disk: a later power failure leaves it whole."""
    with path.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())


def sha256_of(path: pathlib.Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_absent(path: pathlib.Path) -> None:
    """Refuses a path that exists, unless it is an empty directory.

    Raises:
      ValueError: the path exists.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"Output must go to a new directory: {path} is there already. Name another, or remove "
            "it."
        )


@contextlib.contextmanager
def whole_or_absent(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory to fill, renamed to `path` at the end; a failure leaves nothing.

    A killed process leaves `.NAME.partial` beside it, which the next call removes.

    Raises:
      ValueError: the path exists.
    """
    require_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
