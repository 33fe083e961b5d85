"""`run.json`: which code, software and hardware trained a run, in each of its sessions."""

import datetime
import importlib.metadata
import itertools
import logging
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.config import ExperimentConfig, to_dict, write_config
from moe_jax.config.json_text import json_text
from moe_jax.files import write_atomically
from moe_jax.training.files import CONFIG_FILE, RUN_FILE, DamagedFileError, read_json, set_aside
from moe_jax.training.loss_labels import loss_labels

logger = logging.getLogger(__name__)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def run_record() -> dict[str, Any]:
    """The software and hardware of this process, as JSON-compatible values.

    Returns:
      "started" (UTC), "command", "python", "versions" of the libraries, "platform", "device_kind",
      "num_devices", "num_processes", and "commit" and "dirty" of the git checkout that contains
      this package, None outside one. A checkout is dirty if tracked files other than results of
      studies differ from the commit, or if it contains untracked Python files, such as configs.
    """
    device = jax.devices()[0]
    commit, dirty = _checkout()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "commit": commit,
        "dirty": dirty,
    }


def write_run_record(
    directory: str | pathlib.Path,
    config: ExperimentConfig,
    *,
    start_step: int = 0,
    content: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `config.json` and `run.json` into a run's directory; process 0 only.

    A resumed run keeps the records of its earlier sessions under "earlier". `config.json` contains
    the newest settings. Settings that `check_workdir` lets change and that may matter are recorded
    per session: "num_steps", "num_microbatches", "mesh".

    Args:
      directory: the run's directory, made if absent.
      config: the resolved settings.
      start_step: the step the run starts or resumes from.
      content: sha256 of the corpus and the tokenizer.
      facts: more to record, JSON-compatible, such as {"parameters": {"total": 1, "active": 1}}.

    Returns:
      The record.
    """
    directory = pathlib.Path(directory)
    losses = {name: label._asdict() for name, label in loss_labels(config.model).items()}
    record = {
        "start_step": start_step,
        "num_steps": config.training.num_steps,
        "num_microbatches": config.training.num_microbatches,
        "mesh": to_dict(config.mesh),
        **run_record(),
        "losses": losses,
        **(facts or {}),
    }
    if jax.process_index() != 0:
        return record
    directory.mkdir(parents=True, exist_ok=True)
    settings = write_config(config, content)
    if start_step > 0 and (directory / RUN_FILE).exists():
        record["earlier"] = earlier_sessions(directory / RUN_FILE)
    write_atomically(directory / CONFIG_FILE, json_text(settings, indent=2) + "\n")
    write_atomically(directory / RUN_FILE, json_text(record, indent=2) + "\n")
    return record


def earlier_sessions(path: pathlib.Path) -> list[dict[str, Any]]:
    """The sessions in a `run.json`; a damaged file is set aside, since it is only a record."""
    try:
        last = dict(read_json(path))
    except DamagedFileError as error:
        logger.warning("%s It is set aside as %s.", error, set_aside(path))
        return []
    return [*last.pop("earlier", []), last]


def extensions(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The steps at which a run's `num_steps` changed.

    Sessions whose steps were all lost and run again do not count; nor do sessions of earlier
    releases, which did not record `num_steps`.

    Args:
      record: the content of a `run.json`.

    Returns:
      Pairs in order: the step at which `num_steps` changed, and its value before.

    >>> extensions({"start_step": 9, "num_steps": 20,
    ...             "earlier": [{"start_step": 0, "num_steps": 10}]})
    [(9, 10)]
    """
    planned: list[tuple[int, int]] = []
    for session in (*record.get("earlier", []), record):
        if "num_steps" in session:
            start = session["start_step"]
            planned = [one for one in planned if one[0] < start] + [(start, session["num_steps"])]
    pairs = itertools.pairwise(planned)
    return [(start, old) for (_, old), (start, new) in pairs if new != old]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout() -> tuple[str | None, bool | None]:
    """The commit of the git checkout that contains this file, and whether it was modified."""
    here = pathlib.Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        # An installed copy may be inside the checkout of another project, which does not track it.
        git("ls-files", "--error-unmatch", here.name)
        commit = git("rev-parse", "HEAD")
        # A running study appends to its results, which affect nothing.
        results = ":(top,exclude)experiments/*/results.jsonl"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", results)
        unknown = git("ls-files", "--others", "--exclude-standard", "--", ":(top)*.py")
        return commit, bool(changed or unknown)
    except (OSError, subprocess.SubprocessError):
        return None, None
