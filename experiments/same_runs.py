"""Runs that studies share: they are trained once, and each study measures them."""

import os
import pathlib

from moe_jax.config import ExperimentConfig, read_config, write_config
from moe_jax.data import open_data
from moe_jax.training.files import CONFIG_FILE, EVALUATION_FILE, read_json
from moe_jax.training.loop import content_of
from moe_jax.training.workdir import IMPORTED_FILE, changes, recorded_run

# Training settings that do not change the result, but affect what a study can measure.
WATCHED = (
    "log_every", "evaluate_every", "evaluation_batches", "checkpoint_every", "keep_checkpoints",
    "keep_every",
)  # fmt: skip


def link_same_run(config: ExperimentConfig, workdir: pathlib.Path) -> pathlib.Path | None:
    """Links a new workdir to the same finished run of another study, if there is one.

    The same run has the settings, the seed and the data of `config`. Runs are in
    `STUDY/SIZE/ARM_seedN`. A run that started from a checkpoint placed by its study is left out:
    its settings do not tell what it started from.

    Args:
      config: settings of the requested run.
      workdir: its directory; an existing one is left as is.

    Returns:
      The directory of the other run, or None.
    """
    if workdir.exists():
        return None
    workdir.unlink(missing_ok=True)  # a link to a removed run
    content = content_of(config, open_data(config.data))
    studies = workdir.absolute().parents[2]
    for path in sorted(studies.glob(f"*/{workdir.parent.name}/*/{CONFIG_FILE}")):
        other = path.parent.resolve()
        if is_finished(other, config) and is_same(other, config, content):
            workdir.parent.mkdir(parents=True, exist_ok=True)
            workdir.symlink_to(os.path.relpath(other, workdir.parent.resolve()))
            return other
    return None


def is_finished(other: pathlib.Path, config: ExperimentConfig) -> bool:
    """Whether a run was trained from scratch to the last step of a config, and evaluated."""
    evaluation = other / EVALUATION_FILE
    if not evaluation.exists() or (other / IMPORTED_FILE).exists():
        return False
    return read_json(evaluation).get("step") == config.training.num_steps


def is_same(other: pathlib.Path, config: ExperimentConfig, content: dict[str, str]) -> bool:
    """Whether a run has the settings and the data; False if its record cannot be read."""
    try:
        record, _ = recorded_run(other)
        if changes(record, config, content):
            return False
    except (OSError, ValueError):
        return False
    sources = frozenset(write_config(config)["sources"])
    theirs = read_config(record, ExperimentConfig, trust=sources).training
    return all(getattr(theirs, name) == getattr(config.training, name) for name in WATCHED)
