"""A trained model out of its run's directory."""

import dataclasses
import json
import pathlib

import jax
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig, MeshConfig, read_config
from moe_jax.config.convert import check_format
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.metrics import CONFIG_FILE
from moe_jax.training.placement import check_run, state_shardings
from moe_jax.training.state import TrainState, abstract_state

CHECKPOINTS = "checkpoints"


def load_run(
    workdir: str | pathlib.Path,
    mesh: MeshConfig | None = None,
    step: int | None = None,
    *,
    trust: bool = False,
) -> tuple[ExperimentConfig, TrainState]:
    """The config and a checkpoint of a run, which may be training.

    Args:
      workdir: of the run.
      mesh: where the state goes, whatever mesh it was saved from; None: one device. The config
        that is returned has it.
      step: whose checkpoint, one of `kept_steps`; None: the newest whole one.
      trust: whether modules outside the library may be imported for the parts that they define.

    Raises:
      ValueError: the directory holds no run, or a run without a checkpoint or without this one; or
        the mesh does not split the run's batch or model evenly.
      DamagedCheckpointError: the checkpoint of this step is damaged, or all are.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"The workdir of a run holds {CONFIG_FILE}: there is none in {workdir}. Pass the "
            "--workdir that `python -m moe_jax.train` was given."
        )
    written = json.loads(path.read_text(encoding="utf-8"))
    check_format(written, str(path))
    config = read_config(written, ExperimentConfig, trust=trust)
    config = dataclasses.replace(config, mesh=mesh or MeshConfig(data=1))
    config = config.on_devices(jax.device_count())
    placed_on = make_mesh(config.mesh)
    check_run(config, placed_on)
    with Checkpoints(workdir / CHECKPOINTS, keep=None) as checkpoints:
        restored = restore(config, checkpoints, placed_on, step)
    if restored is None:
        raise ValueError(
            f"A run is used from its checkpoints: there is none yet in {workdir / CHECKPOINTS}. "
            "Wait for the first one (training.checkpoint_every)."
        )
    return config, restored


def kept_steps(workdir: str | pathlib.Path) -> list[int]:
    """The steps of a run whose checkpoints are complete on disk, whole or damaged, in order."""
    with Checkpoints(pathlib.Path(workdir) / CHECKPOINTS, keep=None) as checkpoints:
        return checkpoints.steps()


def restore(
    config: ExperimentConfig, checkpoints: Checkpoints, mesh: Mesh, step: int | None = None
) -> TrainState | None:
    """The state of the newest whole checkpoint, read straight to where it lies on the mesh.

    Args:
      config: of the run.
      checkpoints: of the run.
      mesh: where the state goes.
      step: the checkpoint of this step in place of the newest; see `Checkpoints.restore`.

    Returns:
      The state, or None if there is no checkpoint.
    """
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(config),
        state_shardings(config, mesh),
    )
    if step is not None and checkpoints.latest_step is not None:
        return checkpoints.restore(step, abstract)
    restored = checkpoints.restore_latest(abstract)
    return None if restored is None else restored[1]
