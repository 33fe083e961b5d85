"""Files of a run: written whole, checked before they are used, set aside if damaged."""

import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

STATE = "state"  # the folder of the arrays in a checkpoint
METADATA = "metadata.json"
MANIFEST = "manifest.json"


class DamagedFileError(ValueError):
    """A file that a run wrote is not as it was written."""


class DamagedCheckpointError(ValueError):
    """No checkpoint of a run passes its integrity check."""


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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads an object from a JSON file.

    Raises:
      DamagedFileError: with its path.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(
            f"{path} is damaged: it is no JSON ({error}). Bring back a copy of it."
        ) from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged: it has no object. Bring back a copy of it.")
    return content


def set_aside(path: pathlib.Path) -> str:
    """Renames a damaged file; returns the new name, `damaged-NAME` or `damaged-NAME-2`, ..."""
    names = (f"damaged-{path.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    name = next(name for name in names if not path.with_name(name).exists())
    path.rename(path.with_name(name))
    return name


def write_manifest(path: pathlib.Path) -> None:
    """Writes the size and SHA-256 of the files of a checkpoint's state and metadata beside them.

    Args:
      path: the checkpoint's directory. Orbax's own files in it are left out: Orbax writes them
        after the manifest, and restoring does not need them.
    """
    files = [path / METADATA, *sorted((path / STATE).rglob("*"))]
    files = [file for file in files if file.is_file()]
    manifest = {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    }
    write_synced(path / MANIFEST, json.dumps({"files": manifest}, indent=1) + "\n")


def damage(path: pathlib.Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or None if all its files match its manifest.

    Args:
      path: the checkpoint's directory.
      only: the name of the one file to check; none if the manifest does not name it.
    """
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        for name, expected in files.items():
            if only not in (None, name):
                continue
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes in place of {expected['bytes']}"
            if _sha256(path / name) != expected["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{pathlib.Path(error.filename).relative_to(path)} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be understood ({error!r})"
    return None if files else f"{MANIFEST} names no files"


def complete_steps(directory: pathlib.Path) -> list[int]:
    """The steps whose checkpoints are complete on disk, unchecked, in order; [] if there are none.

    Any process may ask, alone: Orbax's manager is not made, which all processes make together.
    """
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()
    )


def metadata_of(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """What `Checkpoints.save` was given beside the state; any process, at any time.

    Args:
      directory: of the checkpoints.
      step: one of `complete_steps`.

    Returns:
      The metadata; {} if the checkpoint was saved without, as old ones are.

    Raises:
      DamagedCheckpointError: its file does not match the manifest.
      ValueError: there is no checkpoint of this step.
    """
    file = path_of_whole(directory, step, only=METADATA) / METADATA
    return json.loads(file.read_bytes()) if file.exists() else {}


def path_of_whole(directory: pathlib.Path, step: int, only: str | None = None) -> pathlib.Path:
    """The path of a checkpoint that matches its manifest, or of which one file does."""
    path, steps = directory / str(step), complete_steps(directory)
    if step not in steps:
        raise ValueError(
            "A checkpoint is one that was kept (training.keep_checkpoints): there is none of "
            f"step {step} in {directory}, but {steps}. Pass one of them."
        )
    reason = damage(path, only)
    if reason is not None:
        raise DamagedCheckpointError(
            f"a checkpoint is used if it matches its manifest: of {path} {reason}. "
            "Use another step."
        )
    return path


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
