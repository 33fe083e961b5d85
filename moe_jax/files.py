"""Files and directories that are written whole or not at all."""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces a file by one with this content; a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    temporary.replace(path)


def write_synced(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file that is on the disk when this returns: a power failure leaves it whole."""
    with path.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())


def sha256_of(path: pathlib.Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_absent(path: pathlib.Path) -> None:
    """Refuses a path that is taken; an empty directory is free.

    Raises:
      ValueError: with the path.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"Output goes to a new directory: {path} is there already. Name another, or remove it."
        )


@contextlib.contextmanager
def whole_or_absent(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill, which gets its name when it is full; what fails leaves nothing.

    A killed process leaves `.NAME.partial` beside it, which the next one removes.

    Raises:
      ValueError: there is something of this name.
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
