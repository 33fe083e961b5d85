"""Files and directories that are written whole or not at all."""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces a file; a failure or a killed process leaves the old content or the new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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
    """Refuses a path that exists, except an empty directory, or that cannot be made.

    Raises:
      ValueError: the path exists, or its folder cannot be made or written to.
    """
    is_there = path.exists() or path.is_symlink()
    if is_there and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"Output must go to a new directory: {path} is there already. Name another, or remove "
            "it."
        )
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if folder.is_dir() else "is a file"
        raise ValueError(
            f"Output must go to a new directory: {folder} {why}, {path}. Name another place."
        )


@contextlib.contextmanager
def whole_or_absent(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a directory to fill, renamed to `path` at the end; a failure leaves nothing.

    Folders above `path` are made, and removed again after a failure.

    A killed process leaves `.NAME.partial` beside it, which the next call removes.

    Raises:
      ValueError: the path exists.
    """
    require_absent(path)
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # one that is in use is not empty
                folder.rmdir()
