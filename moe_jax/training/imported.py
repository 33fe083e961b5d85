"""The directory of a model that was not trained here: a checkpoint without optimizer state."""

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import ExperimentConfig, write_config
from moe_jax.config.json_text import json_text
from moe_jax.training.arrays import gigabytes_of_largest
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.files import write_atomically
from moe_jax.training.metrics import CONFIG_FILE
from moe_jax.training.state import TrainState
from moe_jax.training.workdir import CHECKPOINTS, IMPORTED_FILE

TOKENIZER = "tokenizer"  # the folder with the files of the tokenizer
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "generation_config.json", "vocab.json",
    "merges.txt",
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
      config: of the model, and of the data that it is to be used with.
      params: in the tree of `model.specs()`, float32.
      model_state: in the tree of `model.state_specs()`, float32.
      content: sha256 of the tokenizer.
      origin: what else to keep of the import, as JSON can hold it.
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
      config: of the run.
      state: its `opt_state` may be (), as that of a model that was imported.
      content: sha256 of the tokenizer, and of the corpus if it was trained on one.
      origin: where the model is from, as JSON can hold it.
    """
    record = write_config(config, content)
    path, few = workdir / CHECKPOINTS, gigabytes_of_largest(state)
    with Checkpoints(path, keep=1, gigabytes_in_flight=few) as checkpoints:
        checkpoints.save(int(state.step), state, metadata={"run": record}, wait=True)
    write_atomically(workdir / CONFIG_FILE, json_text(record, indent=2) + "\n")
    write_atomically(workdir / IMPORTED_FILE, json_text(origin, indent=2) + "\n")


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies the files of a tokenizer from one folder to another; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
