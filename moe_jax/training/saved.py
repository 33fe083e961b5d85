"""Loads a trained model from its run's directory."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    read_config,
    write_config,
)
from moe_jax.config.installed import require_local
from moe_jax.data import Data, open_data, open_tokenizer_of
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.arrays import gigabytes_of_largest
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.files import CONFIG_FILE, EVALUATION_FILE, complete_steps, read_json
from moe_jax.training.placement import inference_rows, state_shardings
from moe_jax.training.state import (
    TrainState,
    abstract_state,
    evaluation_params,
    for_evaluation,
)
from moe_jax.training.workdir import CHECKPOINTS, Record, changed_hashes, recorded_run

logger = logging.getLogger(__name__)


def load_run(
    workdir: str | pathlib.Path,
    mesh: MeshConfig | None = None,
    step: int | None = None,
    *,
    trust: bool = False,
    moments: bool = False,
) -> tuple[ExperimentConfig, TrainState]:
    """Loads the config and a checkpoint of a run, even during training, to evaluate or sample from.

    By default, the parameters are `evaluation_params`, and `opt_state` is (): moments are not read,
    as they take twice the memory of the parameters.

    Args:
      workdir: the run's directory.
      mesh: mesh of the loaded state, whatever mesh saved it; None: one device. The returned config
        contains it.
      step: step of the checkpoint, one of `kept_steps`; None: the newest whole checkpoint.
      trust: whether to import modules outside the library for the parts that they define.
      moments: whether to return the full training state: the parameters of the last step and the
        optimizer's state.

    Raises:
      ValueError: the directory holds no run, the run has no checkpoint or none of this step, the
        mesh does not split the model evenly, or the tokenizer has changed.
      DamagedCheckpointError: the checkpoint of this step is damaged, or all are.
    """
    require_local("workdir", str(workdir))
    workdir = pathlib.Path(workdir)
    record, _ = recorded_run(workdir, step)
    if not record:
        raise ValueError(
            f"The workdir of a run must hold {CONFIG_FILE} or a checkpoint that knows its config: "
            f"there is neither in {workdir}. Pass the --workdir that `python -m moe_jax.train` "
            "was given."
        )
    config = read_config(record, ExperimentConfig, trust=trust)
    config = dataclasses.replace(config, data=newest_places(workdir, record, config.data))
    warn_of_sources(record, config, workdir)
    check_content(record, encoding_of(workdir, config), workdir)
    config = dataclasses.replace(config, mesh=mesh or MeshConfig(data=1))
    config = config.on_devices(jax.device_count())
    placed_on = make_mesh(config.mesh)
    inference_rows(config, placed_on)  # refuses a mesh that does not split the model
    few = gigabytes_of_largest(abstract_state(config))
    directory = workdir / CHECKPOINTS
    with Checkpoints(directory, keep=None, gigabytes_in_flight=few) as checkpoints:
        restored = restore(config, checkpoints, placed_on, step, moments=moments)
    if restored is None:
        is_finished = (workdir / EVALUATION_FILE).exists()
        raise ValueError(
            f"A run is loaded from its checkpoints: there is none in {workdir / CHECKPOINTS}. "
            + ("The run has finished: bring them back." if is_finished else
               "Wait for the first one (training.checkpoint_every).")
        )  # fmt: skip
    if moments:
        return config, restored
    return config, restored._replace(params=evaluation_params(restored), opt_state=())


def newest_places(workdir: pathlib.Path, record: Record, data: DataConfig) -> DataConfig:
    """The data config with the paths of `config.json`, if that records the same content.

    A run that resumes with moved data writes the new paths there, and so may a user.
    """
    path = workdir / CONFIG_FILE
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        newer = read_json(path)
        if record.get("content") and newer.get("content") == record["content"]:
            names = ("corpus", "tokenizer", "cache_dir")
            paths: dict[str, Any] = {name: newer["data"][name] for name in names}
            objective = newer["data"]["objective"]
            files = [name for name in data.objective.file_settings if getattr(data.objective, name)]
            if files and isinstance(objective, Mapping):
                moved: dict[str, Any] = {name: objective[name] for name in files}
                paths["objective"] = dataclasses.replace(data.objective, **moved)
            return dataclasses.replace(data, **paths)
    return data


def encoding_of(workdir: pathlib.Path, config: ExperimentConfig) -> dict[str, str]:
    """The sha256 of a run's tokenizer, and of its chat template if it has one.

    Raises:
      ValueError: one of them cannot be opened.
    """
    what, setting = "tokenizer", "data.tokenizer"
    try:
        tokenizer = open_tokenizer_of(config.data)
        what, setting = "chat template", "data.objective.chat_template"
        read = config.data.objective.fingerprints(tokenizer)
        return {"tokenizer": tokenizer.fingerprint(), **read}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the {what} of {workdir} cannot be opened: {error} If it was moved, write its path "
            f"into {workdir / CONFIG_FILE}, as {setting}."
        ) from error


def warn_of_sources(record: Record, config: ExperimentConfig, workdir: pathlib.Path) -> None:
    """Warns of parts outside the library whose source has changed since the run."""
    lines = changed_hashes("source", record.get("sources", {}), write_config(config)["sources"])
    if lines:
        logger.warning("Since %s was saved, %s: results may differ.", workdir, "; ".join(lines))


def open_run_data(workdir: str | pathlib.Path, config: ExperimentConfig) -> Data:
    """Opens the data of a run, if its content is what the run was started with.

    Args:
      workdir: the run's directory.
      config: the run's config, as `load_run` returns it.

    Raises:
      ValueError: the content of the corpus or the tokenizer has changed, or cannot be opened.
    """
    workdir = pathlib.Path(workdir)
    data = open_data(config.data)
    check_content(recorded_run(workdir)[0], data.fingerprints, workdir)
    return data


def check_content(record: Record, found: Mapping[str, str], workdir: pathlib.Path) -> None:
    """Refuses data whose content differs from what a run was started with.

    Args:
      record: the run's record. Content that it lacks is not checked: earlier releases recorded
        none, and an imported model was trained on no corpus here.
      found: sha256 of the data in use.
      workdir: the run's directory, for the message.

    Raises:
      ValueError: naming what changed.
    """
    known = record.get("content", {})
    found = {name: value for name, value in found.items() if name in known}
    lines = changed_hashes("content", {name: known.get(name) for name in found}, found)
    if known and lines:
        corpus_changed = known.get("corpus") != found.get("corpus", known.get("corpus"))
        other = ", or name other text: --text or --corpus of evaluate, --text of analyze"
        raise ValueError(
            f"a run must be used with the data it was trained on: since {workdir} was started, "
            f"{'; '.join(lines)}. Bring back the data{other if corpus_changed else ''}."
        )


def kept_steps(workdir: str | pathlib.Path) -> list[int]:
    """The steps of a run whose checkpoints are complete on disk, whole or damaged, in order."""
    return complete_steps(pathlib.Path(workdir) / CHECKPOINTS)


def restore(
    config: ExperimentConfig,
    checkpoints: Checkpoints,
    mesh: Mesh,
    step: int | None = None,
    *,
    moments: bool = True,
) -> TrainState | None:
    """Restores the newest whole checkpoint, read straight onto the devices of the mesh.

    Args:
      config: the run's config.
      checkpoints: the run's checkpoints.
      mesh: mesh of the restored state.
      step: step of the checkpoint; None: the newest.
      moments: whether to read all of `opt_state`, or only what `for_evaluation` keeps.

    Returns:
      The state, or None if there is no checkpoint.

    Raises:
      DamagedCheckpointError: see `Checkpoints.whole`.
      ValueError: there is no checkpoint of this step, or its arrays differ from the run's.
    """
    # A checkpoint is not read before it is known to be whole.
    step = checkpoints.whole(step)
    if step is None:
        return None
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(config),
        state_shardings(config, mesh),
    )
    if not checkpoints.has(step, "opt_state"):
        abstract = abstract._replace(opt_state=())
    if not moments:
        return checkpoints.restore(step, for_evaluation(abstract), some_of="opt_state")
    return checkpoints.restore(step, abstract)
