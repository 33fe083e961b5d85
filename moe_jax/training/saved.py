"""A trained model out of its run's directory."""

import json
import pathlib

import jax

from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.metrics import CONFIG_FILE
from moe_jax.training.state import TrainState, init_state

CHECKPOINTS = "checkpoints"


def load_run(workdir: str | pathlib.Path) -> tuple[ExperimentConfig, TrainState]:
    """The config and the newest whole checkpoint of a run, which may be training.

    Raises:
      ValueError: the directory holds no run, or a run without a checkpoint.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"The workdir of a run holds {CONFIG_FILE}: there is none in {workdir}. Pass the "
            "--workdir that `python -m moe_jax.train` was given."
        )
    config = from_config_dict(json.loads(path.read_text(encoding="utf-8")))
    with Checkpoints(workdir / CHECKPOINTS, keep=None) as checkpoints:
        restored = restore(config, checkpoints)
    if restored is None:
        raise ValueError(
            f"A run is used from its checkpoints: there is none yet in {workdir / CHECKPOINTS}. "
            "Wait for the first one (training.checkpoint_every)."
        )
    return config, restored


def restore(config: ExperimentConfig, checkpoints: Checkpoints) -> TrainState | None:
    """The state of the newest whole checkpoint, or None if there is no checkpoint."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: init_state(config)),
    )
    restored = checkpoints.restore_latest(abstract)
    return None if restored is None else restored[1]
