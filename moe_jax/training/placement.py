"""The placement of a run's state on the mesh, and the training step compiled for it."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from moe_jax.config import ExperimentConfig, InitFrom
from moe_jax.config.check import require
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.rules import RULES, named_sharding, num_shards
from moe_jax.part import RunShape
from moe_jax.training.state import TrainState, abstract_state, init_state
from moe_jax.training.step import make_train_step

# Microbatches run one after another; the sequences of each are split over the devices.
BATCH_AXES = (None, "batch", None)
Kind = TypeVar("Kind")


def check_run(config: ExperimentConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a training batch or a model that the mesh, or `logits_chunks`, cannot split evenly.

    Raises:
      ValueError: naming the sizes and what to change.
    """
    shards = {name: num_shards(name, mesh) for name in RULES}
    sequences = config.training.batch_size // config.training.num_microbatches
    if sequences % shards["batch"]:
        raise ValueError(
            "a microbatch must split over slices * data * fsdp * expert devices, in whole "
            f"sequences: {sequences} sequences (batch_size={config.training.batch_size}, "
            f"num_microbatches={config.training.num_microbatches}), over {shards['batch']} "
            f"devices. Use a multiple of {shards['batch']} sequences a microbatch."
        )
    lengths, chunks = config.lengths, config.training.logits_chunks
    require(
        lengths.decoder % chunks == 0,
        "training.logits_chunks must divide the positions that the head scores",
        f"logits_chunks={chunks}, {lengths.decoder} positions in a sequence",
        "Use a divisor",
    )
    config.model.check_run(RunShape(sequences, lengths.decoder, shards, lengths.encoder))


def resolved_model(config: ExperimentConfig) -> LanguageModel:
    """The model with its settings "auto" resolved for the mesh and platform in use.

    Raises:
      ValueError: a kernel requested by name cannot do its task.
    """
    dtype, in_prefix = config.model.compute_dtype, config.data.objective.sees_prompt
    return config.model.map_parts(lambda part: part.resolved(dtype, in_prefix=in_prefix))


def inference_rows(
    config: ExperimentConfig, mesh: Mesh | AbstractMesh, at_least: int | None = None
) -> int:
    """Sequences of an inference batch, rounded up to split evenly over devices and groups.

    Args:
      config: the run's config.
      mesh: mesh of the model, whatever mesh it was trained on.
      at_least: least number of sequences, before rounding up; None: a training microbatch.

    Raises:
      ValueError: the mesh does not split the model evenly.
    """
    shards = {name: num_shards(name, mesh) for name in RULES}
    lengths, training = config.lengths, config.training
    groups = [
        moe.group_size // lengths.of(name)
        for name, stack in config.model.stacks.items()
        for part, moe in config.model.moe_parts.items()
        if part in stack.parts()
    ]
    multiple = shards["batch"] * math.lcm(*(max(sequences, 1) for sequences in groups))
    wanted = at_least or training.batch_size // training.num_microbatches
    rows = -(-wanted // multiple) * multiple
    config.model.check_run(RunShape(rows, lengths.decoder, shards, lengths.encoder))
    return rows


def state_shardings(config: ExperimentConfig, mesh: Mesh) -> TrainState:
    """A sharding for every array of the state; moments are placed like their parameters.

    Raises:
      ValueError: a parameter's dim cannot be split evenly.
    """
    abstract = abstract_state(config)
    specs = {path: spec for path, spec in jax.tree_util.tree_leaves_with_path(config.model.specs())}

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        found = parameter_of(path, specs)
        if found is None:
            return named_sharding((None,) * leaf.ndim, mesh)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = axes_of_moment(found.axes, found.shape, leaf.shape)
        placed = named_sharding(axes, mesh)
        try:
            placed.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(
                f"The mesh must split every parameter evenly: {name} {leaf.shape} with dims "
                f"{axes} over {placed.spec} of {dict(mesh.shape)}. Change the mesh or the size."
            ) from error
        return placed

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def parameter_of(path: tuple[Any, ...], specs: Mapping[Any, Kind]) -> Kind | None:
    """Finds, in `specs` by path, the parameter that an array of the state belongs to.

    The path of a moment contains the path of its parameter, from the first dict key on. Returns
    None for other arrays, such as the step.
    """
    is_key = [isinstance(entry, jax.tree_util.DictKey) for entry in path]
    path = path[is_key.index(True) :] if any(is_key) else ()
    ends = range(len(path), 0, -1)
    return next((specs[path[:end]] for end in ends if path[:end] in specs), None)


def axes_of_moment(
    axes: tuple[str | None, ...], shape: tuple[int, ...], moment_shape: tuple[int, ...]
) -> tuple[str | None, ...]:
    """The dim names of an array that the optimizer keeps for a parameter.

    Adam's moments have the parameter's shape; Adafactor's lack one of its dims. Other arrays are
    small and not split.
    """
    if moment_shape == shape:
        return axes
    for dim in range(len(shape)):
        if moment_shape == shape[:dim] + shape[dim + 1 :]:
            return axes[:dim] + axes[dim + 1 :]
    return (None,) * len(moment_shape)


def new_state(config: ExperimentConfig, mesh: Mesh) -> TrainState:
    """The initial state, created on its devices; its values do not depend on the mesh.

    Like `compile_train_step`, it compiles once for consecutive runs that differ only in seeds.
    """
    return _compile_init(of_any_seed(config), mesh)(np.uint32(config.seed))


@functools.lru_cache(maxsize=1)
def _compile_init(config: ExperimentConfig, mesh: Mesh) -> Callable[[np.uint32], TrainState]:
    return jax.jit(
        functools.partial(init_state, config),
        out_shardings=state_shardings(config, mesh),
        compiler_options=quick_to_compile(mesh),
    )


def quick_to_compile(mesh: Mesh) -> dict[str, str] | None:
    """Compiler options of a program that runs once: on a CPU, to optimize less."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    level = "xla_backend_optimization_level"
    chosen = f"--{level}=" in os.environ.get("XLA_FLAGS", "")
    return {level: "1"} if on_cpu and not chosen else None


def of_any_seed(config: ExperimentConfig) -> ExperimentConfig:
    """The config without what no program depends on: name, seeds and `init_from`."""
    data = dataclasses.replace(config.data, seed=0)
    return dataclasses.replace(config, name="", seed=0, data=data, init_from=InitFrom())


def compile_train_step(config: ExperimentConfig, mesh: Mesh) -> Any:
    """`step.make_train_step`, jitted for the mesh; the state is donated, metrics are replicated.

    Its arguments are the state, the batch, and what `training.loss` reads.

    Call (or lower) it under `jax.set_mesh(mesh)`. Consecutive runs of one process that differ only
    in name, seeds and `init_from` share one function, which is compiled once.
    """
    return _compile_train_step(of_any_seed(config), mesh)


@functools.lru_cache(maxsize=1)
def _compile_train_step(config: ExperimentConfig, mesh: Mesh) -> Any:
    state = state_shardings(config, mesh)
    everywhere = named_sharding((), mesh)
    arrays = config.training.loss.abstract_arrays(config, mesh)
    of_loss = jax.tree.map(lambda leaf: leaf.sharding, arrays)
    return jax.jit(
        make_train_step(config),
        in_shardings=(state, named_sharding(BATCH_AXES, mesh), *of_loss),
        out_shardings=(state, everywhere),
        donate_argnums=0,
        compiler_options=compiler_options(config, mesh),
    )


def compiler_options(config: ExperimentConfig, mesh: Mesh) -> dict[str, str] | None:
    """Compiler options: on a TPU, to overlap the chunks of an exchange; None elsewhere.

    By default, libtpu compiles a synchronous all-to-all, with which chunks overlap nothing.
    """
    parts: Iterable[Any] = config.model.all_parts.values()
    in_chunks = any(part.routes and part.exchange_chunks > 1 for part in parts)
    if in_chunks and mesh.devices.flat[0].platform == "tpu":
        return {"xla_tpu_enable_async_all_to_all": "true"}
    return None
