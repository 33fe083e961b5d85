"""Device memory of a training step: checked before it starts, explained when it runs out."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig
from moe_jax.config.kinds import kind_of
from moe_jax.parallel.rules import num_shards
from moe_jax.training.placement import state_shardings
from moe_jax.training.state import abstract_state, trained_params

PROFILE_FILE = "memory.prof"
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
FLOAT32 = 4
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def needed_bytes(config: ExperimentConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes on one device that no compiler can avoid, by kind.

    Returns:
      `parameters`, `optimizer`, `gradients` (with several microbatches, their sum and the newest
      one), float32 `logits` of a microbatch or of a chunk of it, and arrays that the training loss
      reads, if any, under its kind. Activations are extra.
    """
    state, shardings = abstract_state(config), state_shardings(config, mesh)

    def local(of: Any, placed: Any) -> int:
        sizes = jax.tree.map(
            lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
            of,
            placed,
        )
        return sum(jax.tree.leaves(sizes))

    parameters = local(state.params, shardings.params)
    trained = local(*(trained_params(config, tree.params) for tree in (state, shardings)))
    parts = config.training.num_microbatches
    sequences = config.training.batch_size // parts // num_shards("batch", mesh)
    vocab = config.model.vocab_size // num_shards("vocab", mesh)
    positions = config.lengths.decoder // config.training.logits_chunks
    read = config.training.loss.abstract_arrays(config, mesh)
    of_loss = local(read, jax.tree.map(lambda leaf: leaf.sharding, read))
    return {
        "parameters": parameters,
        "optimizer": local(state.opt_state, shardings.opt_state),
        "gradients": trained * (2 if parts > 1 else 1),
        "logits": sequences * positions * vocab * FLOAT32,
    } | ({kind_of(config.training.loss): of_loss} if of_loss else {})


def available_bytes(mesh: Mesh) -> int | None:
    """The memory of one device of this process, or None if unknown.

    CPU devices share the memory of the machine, or of the container if it has a lower limit.
    """
    devices = mesh.local_devices
    if devices[0].platform != "cpu":
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(pathlib.Path, CGROUP_LIMITS):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(path.read_text()))
    return min(limits) // len(devices)


def check_memory(config: ExperimentConfig, mesh: Mesh) -> None:
    """Refuses a model or a batch that the devices cannot hold; takes a fraction of a second.

    Raises:
      ValueError: naming what needs memory, how much there is, and which settings to change.
    """
    needed, available = needed_bytes(config, mesh), available_bytes(mesh)
    if available is None or sum(needed.values()) <= available:
        return
    of_state = 2 * needed["logits"] < sum(needed.values())
    if of_state:
        fix = f"For the state, {smaller_state(config)}"
    else:
        fix = smaller_logits(config, mesh, needed, available)
    raise ValueError(
        f"a training step does not fit the memory of its devices: {describe(needed)}, and "
        f"activations, on {each(mesh)} of {in_units(available)}. {fix[0].upper()}{fix[1:]}."
    )


def each(mesh: Mesh) -> str:
    """The devices in words."""
    return "one device" if mesh.size == 1 else f"each of {mesh.size} devices"


@contextlib.contextmanager
def out_of_memory_explained(
    config: ExperimentConfig, mesh: Mesh, workdir: pathlib.Path
) -> Iterator[None]:
    """A context that reports a device's lack of memory in one line.

    Raises:
      MemoryError: naming what needs memory, which settings to change, and the memory profile:
        `memory.prof` in the workdir, for `pprof`.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if not is_out_of_memory(error):
            raise
        needed, available = needed_bytes(config, mesh), available_bytes(mesh)
        size = "" if available is None else f" of {in_units(available)}"
        rest = smaller_step(config)
        raise MemoryError(
            f"a training step ran out of memory: {text.splitlines()[0].rstrip('.')}; it needs "
            f"{describe(needed)}, and activations, on {each(mesh)}{size}. For activations, {rest}. "
            f"For the state, {smaller_state(config)}.{profile(workdir)}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a runtime error reports that memory ran out."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def profile(workdir: pathlib.Path) -> str:
    """Writes a memory profile and returns a sentence with its path; empty if that fails too."""
    index = jax.process_index()
    path = workdir / (f"{index}_{PROFILE_FILE}" if index else PROFILE_FILE)
    try:
        jax.profiler.save_device_memory_profile(str(path))
    except (OSError, RuntimeError):
        return ""
    return f" What is in it: {path} (pprof)."


def smaller_logits(
    config: ExperimentConfig, mesh: Mesh, needed: Mapping[str, int], available: int
) -> str:
    """Which settings shrink the logits; fewer sequences are not enough if one does not fit."""
    training, length = config.training, config.data.sequence_length
    sequences = training.batch_size // training.num_microbatches // num_shards("batch", mesh)
    one, rest = needed["logits"] // sequences, sum(needed.values()) - needed["logits"]
    changes = [f"lower data.sequence_length (now {length})"]
    if training.loss.takes_chunks:
        changes.append(f"raise training.logits_chunks (now {training.logits_chunks})")
    if one + rest > available:
        return f"{', or '.join(changes)}: the logits of one sequence are {in_units(one)}"
    changes.append(f"raise training.num_microbatches (now {training.num_microbatches})")
    changes.append(f"lower training.batch_size (now {training.batch_size})")
    return ", or ".join(reversed(changes))


def smaller_step(config: ExperimentConfig) -> str:
    """Which settings reduce what a step needs beyond the state."""
    training, changes = config.training, []
    if training.num_microbatches < training.batch_size // config.mesh.batch_shards:
        changes.append(f"raise training.num_microbatches (now {training.num_microbatches})")
    if config.model.remat != "full":
        changes.append(f"set model.remat='full' (now {config.model.remat!r})")
    return ", or ".join([*changes, "lower training.batch_size or data.sequence_length"])


def smaller_state(config: ExperimentConfig) -> str:
    """Which settings reduce the state per device."""
    name, spec = max(
        jax.tree_util.tree_leaves_with_path(config.model.specs()), key=lambda pair: pair[1].size
    )
    largest = f"{jax.tree_util.keystr(name, simple=True, separator='/')} {spec.shape}"
    split = "mesh.data=1 and mesh.fsdp=-1" if config.mesh.data > 1 else "mesh.fsdp on more devices"
    return f"split it by {split}, or lower sizes of config.model (its largest array: {largest})"


def describe(needed: dict[str, int]) -> str:
    """For example "parameters 1.5 GiB, optimizer 3.0 GiB"."""
    return ", ".join(f"{name} {in_units(size)}" for name, size in needed.items())


def in_units(size: float) -> str:
    """Bytes in the largest unit that gives at least 1."""
    index = min(int(math.log(max(size, 1), 1024)), len(UNITS) - 1)
    return f"{size / 1024**index:.1f} {UNITS[index]}"
