"""The directory of a model that was not trained here: a checkpoint without optimizer state."""

import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import ExperimentConfig, write_config
from moe_jax.config.json_text import json_text
from moe_jax.files import write_atomically
from moe_jax.training.arrays import gigabytes_of_largest
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.files import CONFIG_FILE, read_json
from moe_jax.training.state import TrainState
from moe_jax.training.workdir import CHECKPOINTS, IMPORTED_FILE, recorded_run

logger = logging.getLogger(__name__)

INHERITED = "inherited"  # in the file of a made model: the result of `inherited`
TOKENIZER = "tokenizer"  # the folder with the files of the tokenizer
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "generation_config.json", "vocab.json",
    "merges.txt", "tiktoken.model", "spiece.model",
)  # fmt: skip


def save_imported(
    workdir: pathlib.Path,
    config: ExperimentConfig,
    params: Any,
    model_state: Mapping[str, Any],
    content: Mapping[str, str],
    origin: Mapping[str, Any],
) -> None:
    """Fills an empty directory so that `load_run` finds a run of 0 steps.

    Args:
      workdir: the directory.
      config: config of the model and of the data to use it with.
      params: float32, in the tree of `model.specs()`.
      model_state: float32, in the tree of `model.state_specs()`.
      content: sha256 of the tokenizer.
      origin: other facts of the import to keep, JSON-compatible.
    """
    key = jax.random.key_data(jax.random.key(config.seed))
    state = TrainState(jnp.zeros((), jnp.int32), params, (), dict(model_state), key)
    save_state(workdir, config, state, content, origin)


def save_state(
    workdir: pathlib.Path,
    config: ExperimentConfig,
    state: TrainState,
    content: Mapping[str, str],
    origin: Mapping[str, Any],
) -> None:
    """Fills an empty directory so that `load_run` finds a run of `state.step` steps.

    Args:
      workdir: the directory.
      config: the run's config.
      state: its `opt_state` may be (), as for an imported model.
      content: sha256 of the tokenizer, and of the corpus if it was trained on one.
      origin: the origin of the model, JSON-compatible.
    """
    record = write_config(config, content)
    path, few = workdir / CHECKPOINTS, gigabytes_of_largest(state)
    with Checkpoints(path, keep=1, gigabytes_in_flight=few) as checkpoints:
        checkpoints.save(int(state.step), state, metadata={"run": record}, wait=True)
    write_atomically(workdir / CONFIG_FILE, json_text(record, indent=2) + "\n")
    write_atomically(workdir / IMPORTED_FILE, json_text(origin, indent=2) + "\n")


def origin_of_run(
    workdir: pathlib.Path, above: frozenset[pathlib.Path] = frozenset()
) -> dict[str, Any]:
    """The facts that an export needs from the import that a run is based on.

    The import is found through `init_from` and the source of a made model, over any number of runs.

    Args:
      workdir: of the run.
      above: the runs that are based on this one. A run that took the place of one of its own
        sources names itself; that source is gone.

    Returns:
      Those of `family`, `settings` of a config.json, `dtypes` of tensors, and `source` that hold
      for the run. `source` holds only for the import itself and its quantised copies, since other
      runs have other parameters. {} if the run is based on no import.
    """
    below = above | {workdir.resolve()}
    if not workdir.is_dir() or below == above:
        logger.warning(
            "There is no %s any more: what was imported with it, such as ids of special tokens and "
            "dtypes, is not in what is written. Bring it back, or correct config.json.", workdir,
        )  # fmt: skip
        return {}
    path = workdir / IMPORTED_FILE
    if not path.exists():
        given = recorded_run(workdir)[0].get("init_from", {})
        if not given.get("path"):
            return {}
        return origin_of_trained(origin_of_run(pathlib.Path(given["path"]), below), given)
    origin: dict[str, Any] = read_json(path)
    if "made_by" not in origin:
        return origin
    if INHERITED in origin:
        return dict(origin[INHERITED])
    return inherited(origin_of_run(pathlib.Path(origin["source"]), below), origin["made_by"])


def origin_of_trained(origin: Mapping[str, Any], init_from: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an origin that holds for a run that started from it."""
    kept = {name: value for name, value in origin.items() if name != "source"}
    if "embedding" in init_from.get("fresh", ()):  # usually of another vocabulary
        settings = kept.get("settings", {}).items()
        kept["settings"] = {name: one for name, one in settings if not name.endswith("token_id")}
    return kept


def inherited(origin: Mapping[str, Any], made_by: str) -> dict[str, Any]:
    """The part of an origin that holds for a model that a command made from a run.

    Args:
      origin: origin of the run.
      made_by: the command. Others than "quantise" and "merge_adapters" change the set of tensors.
    """
    if made_by == "quantise":
        return dict(origin)
    if made_by == "merge_adapters":
        return origin_of_trained(origin, {})
    return {name: origin[name] for name in ("settings", "dtypes") if name in origin}


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies the files of a tokenizer from one folder to another; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
