"""Held-out loss of a finished run on a sample, with other parameters or another capacity."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.data import Data, heldout_batches
from moe_jax.models.selection import select
from moe_jax.parallel.batches import from_whole
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.evaluation import DomainSums, evaluate_batch
from moe_jax.training.saved import load_run, open_run_data
from moe_jax.training.state import TrainState

SAMPLES = 4  # times training.evaluation_batches


def open_run(workdir: pathlib.Path) -> tuple[ExperimentConfig, TrainState, Data]:
    """The settings, last state and data of a run."""
    config, state = load_run(workdir)
    return config, state, open_run_data(workdir, config)


def sample_loss(
    config: ExperimentConfig,
    data: Data,
    state: TrainState,
    *,
    params: Any = None,
    capacity: float = 0.0,
) -> float:
    """Held-out bits per byte on a sample that is the same for every call.

    Args:
      config: settings of the run.
      data: its data.
      state: its state.
      params: parameters to use; None: those of `state`.
      capacity: the capacity factor; 0 for no limit.
    """
    sums = DomainSums(data.domains)
    batches = heldout_batches(
        data,
        batch_size=config.training.batch_size,
        max_batches=SAMPLES * config.training.evaluation_batches or None,
    )
    mesh = make_mesh(config.mesh)
    for batch in map(dict, batches):
        domain_B = batch.pop("domain")
        with jax.set_mesh(mesh):
            of_batch = evaluate_batch(
                state.params if params is None else params,
                state.model_state,
                from_whole(batch, mesh, ("batch", None)),
                data.tokenizer.token_bytes_V,
                model=config.model,
                capacity=capacity,
            )
        sums.add(of_batch, domain_B)
    return sums.losses()["bits_per_byte"]


def without_shared_expert(config: ExperimentConfig, params: Any) -> Any:
    """The parameters with the output of shared experts set to 0."""
    return jax.tree.map(
        lambda marked, value: value * 0 if marked else value,
        select(config.model.specs(), ("shared_experts/wo",)),
        params,
    )


def without_routed_expert(config: ExperimentConfig, params: Any, expert: int) -> Any:
    """The parameters with the output of one routed expert of every layer set to 0."""
    specs = config.model.specs()

    def cleared(marked: bool, spec: Any, value: Any) -> Any:
        if not marked:
            return value
        axis = spec.axes.index("expert")
        return value * (np.arange(value.shape[axis]) != expert).reshape(
            [-1 if dim == axis else 1 for dim in range(value.ndim)]
        )

    return jax.tree.map(cleared, select(specs, ("experts/wo",)), specs, params)


def routed_experts(config: ExperimentConfig, most: int) -> Iterator[int]:
    """At most `most` expert indices, evenly spaced."""
    (moe,) = config.model.moe_parts.values()
    yield from range(0, moe.num_experts, -(-moe.num_experts // most))
