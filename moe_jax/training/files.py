"""Files of a run: checked before they are used, set aside if damaged."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import types
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moe_jax.files import sha256_of, write_synced

# In the directory of a run.
METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
CONFIG_FILE = "config.json"
EVALUATION_FILE = "evaluation.json"
SAMPLE_FILE = "sample.txt"
REPORT = "report"  # the folder of the report
# In a checkpoint.
STATE = "state"  # the folder of the arrays
METADATA = "metadata.json"
MANIFEST = "manifest.json"
# One core hashes 1 to 2 GB/s; a thread reads 256 KiB at a time, and releases the GIL meanwhile.
THREADS = min(32, os.cpu_count() or 1)


class DamagedFileError(ValueError):
    """A file of a run differs from what the run wrote."""


class DamagedCheckpointError(ValueError):
    """A checkpoint, or every checkpoint of a run, fails its integrity check."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads an object from a JSON file.

    Raises:
      DamagedFileError: naming its path.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(
            f"{path} is damaged: it is not valid JSON ({error}). Bring back a copy of it."
        ) from error
    if not isinstance(content, dict):
        raise DamagedFileError(
            f"{path} is damaged: it is not a JSON object. Bring back a copy of it."
        )
    return content


def set_aside(path: pathlib.Path, *, prefix: str = "damaged", copy: bool = False) -> str:
    """Renames a file or folder that is damaged or, with the prefix "earlier", of an earlier run.

    With `copy` it also stays in place, since its undamaged part stays in use.

    Returns:
      The new name, `PREFIX-NAME` or `PREFIX-NAME-2`, ...
    """
    names = (f"{prefix}-{path.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    name = next(name for name in names if not path.with_name(name).exists())
    if copy:
        shutil.copyfile(path, path.with_name(name))
    else:
        path.rename(path.with_name(name))
    return name


def write_hashes(path: pathlib.Path, state: pathlib.Path, process: int) -> None:
    """Writes size and SHA-256 of the files that a process has written, for `write_manifest`.

    Args:
      path: the checkpoint's directory.
      state: the folder of its arrays, which has a temporary name until all are written.
      process: the index of the process; Orbax names the folder of its files by it.
    """
    written = _described(state, (state / f"ocdbt.process_{process}").rglob("*"))
    named = {f"{STATE}/{name}": file for name, file in written.items()}
    write_synced(_hashes_of(path, process), json.dumps(named))


def write_manifest(path: pathlib.Path, processes: int = 1) -> None:
    """Writes the manifest: size and SHA-256 of the state and metadata files of a checkpoint.

    Args:
      path: the checkpoint's directory. Orbax's own files in it are left out: Orbax writes them
        after the manifest, and restoring does not need them.
      processes: number of processes that may have called `write_hashes`. Their hashes are reused;
        only files that none of them lists with this size are read here.
    """
    known: dict[str, dict[str, Any]] = {}
    for process in range(processes):
        with contextlib.suppress(OSError, ValueError):
            part = _hashes_of(path, process)
            known |= json.loads(part.read_bytes())
            part.unlink()
    manifest = _described(path, [path / METADATA, *sorted((path / STATE).rglob("*"))], known)
    write_synced(path / MANIFEST, json.dumps({"files": manifest}, indent=1) + "\n")


def _hashes_of(path: pathlib.Path, process: int) -> pathlib.Path:
    return path / f"hashes.process_{process}.json"


def _described(
    path: pathlib.Path,
    files: Iterable[pathlib.Path],
    known: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> dict[str, Mapping[str, Any]]:
    """Size and SHA-256 of each file, by its name relative to `path`; folders are skipped."""
    sizes = {
        file.relative_to(path).as_posix(): file.stat().st_size for file in files if file.is_file()
    }
    found = {name: known.get(name, {}) for name in sizes}
    unread = [name for name, size in sizes.items() if found[name].get("bytes") != size]
    for name, sha256 in zip(unread, _sha256(path / name for name in unread), strict=True):
        found[name] = {"bytes": sizes[name], "sha256": sha256}
    return found


def damage(path: pathlib.Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or None if all its files match its manifest.

    Args:
      path: the checkpoint's directory.
      only: the one file to check; nothing is checked if the manifest does not list it.
    """
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        names = [name for name in files if only in (None, name)]
        for name in names:
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes in place of {files[name]['bytes']}"
        for name, sha256 in zip(names, _sha256(path / name for name in names), strict=True):
            if sha256 != files[name]["sha256"]:
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

    Any process may call this alone: it makes no Orbax manager, which all make together.
    """
    if not directory.is_dir():
        return []
    return sorted(
        int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()
    )


def metadata_of(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """The metadata given to `Checkpoints.save`; any process may read it at any time.

    Args:
      directory: directory of the checkpoints.
      step: one of `complete_steps`.

    Returns:
      The metadata; {} if there is none, as in old checkpoints.

    Raises:
      DamagedCheckpointError: the metadata file does not match the manifest.
      ValueError: there is no checkpoint of this step.
    """
    file = path_of_whole(directory, step, only=METADATA) / METADATA
    return json.loads(file.read_bytes()) if file.exists() else {}


def path_of_whole(directory: pathlib.Path, step: int, only: str | None = None) -> pathlib.Path:
    """The path of a checkpoint that matches its manifest, or whose file `only` does."""
    path, steps = directory / str(step), complete_steps(directory)
    if not steps:
        raise ValueError(f"There is no checkpoint in {directory}. Correct the path.")
    if step not in steps:
        raise ValueError(
            "Only kept checkpoints (training.keep_checkpoints, training.keep_every) can be used: "
            f"there is none of step {step} in {directory}, which has "
            f"{', '.join(map(str, steps))}. Pass one of them."
        )
    reason = damage(path, only)
    if reason is not None:
        raise DamagedCheckpointError(
            f"a checkpoint can be used only if it matches its manifest: in {path}, {reason}. "
            "Use another step."
        )
    return path


def _sha256(files: Iterable[pathlib.Path]) -> Iterator[str]:
    """SHA-256 of each file, in order; several are read at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(sha256_of, files)
