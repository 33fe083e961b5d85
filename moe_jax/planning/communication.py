"""The fewest bytes that a training step must send between devices on its mesh.

Legend of shapes: `moe_jax.moe`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.config import MeshConfig
from moe_jax.costs import KIND_OF_COMPONENT
from moe_jax.models.trained import training_marks
from moe_jax.parallel.rules import mesh_axes
from moe_jax.parameters import ParameterSpec
from moe_jax.planning.flops import KINDS, num_heads
from moe_jax.planning.parameters import abstract_mesh, local_size
from moe_jax.planning.workload import Workload

# Bytes that a device sends in one direction, divided by the bytes of the array, for n devices.
WIRE = {
    "all-gather": lambda n: (n - 1) / n,  # of the gathered array
    "reduce-scatter": lambda n: (n - 1) / n,  # of the array before it is split
    "all-reduce": lambda n: 2 * (n - 1) / n,  # a reduce-scatter and an all-gather
    "all-to-all": lambda n: (n - 1) / n,  # of the device's own buffer
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of message of a training step.

    Attributes:
      name: what is sent.
      layer_kind: one of `flops.KINDS`, or "teacher".
      operation: one of `WIRE`.
      axes: mesh axes that it spans.
      group_size: n, devices of a group.
      array_bytes: bytes of the array that `WIRE` refers to, on one device, summed over all layers
        and microbatches of a step.
    """

    name: str
    layer_kind: str
    operation: str
    axes: tuple[str, ...]
    group_size: int
    array_bytes: float

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends per step."""
        return WIRE[self.operation](self.group_size) * self.array_bytes

    def crossing_bytes(self, mesh: MeshConfig, devices_per_island: int) -> float:
        """The part of `wire_bytes` that must leave the slice or node."""
        islands = num_islands(mesh, self.axes, devices_per_island)
        return crossing_share(self.operation, islands, self.group_size) * self.array_bytes


def crossing_share(operation: str, islands: int, group_size: int) -> float:
    """Bytes that a device must send out of its slice or node, divided by the bytes of the array.

    If k islands of m devices each gather an array, (k - 1) / k of it must enter every island,
    through its m network cards. An all-reduce is two such passes. An all-to-all, and a permute at
    worst, send (k - 1) / k of every device's own buffer.
    """
    share = (islands - 1) / islands
    if operation in ("all-gather", "reduce-scatter", "all-reduce"):
        return (2 if operation == "all-reduce" else 1) * share * islands / group_size
    return share


@functools.lru_cache(maxsize=4096)
def num_islands(mesh: MeshConfig, axes: tuple[str, ...], devices_per_island: int) -> int:
    """How many slices or nodes a group of devices spans, if the mesh follows their order."""
    shape = dict(abstract_mesh(mesh).shape)
    strides, stride = {}, 1
    for axis in reversed(list(shape)):
        strides[axis] = stride
        stride *= shape[axis]
    steps = [[i * strides[axis] for i in range(shape[axis])] for axis in axes]
    members = (sum(offsets) for offsets in itertools.product(*steps))
    return len({member // devices_per_island for member in members})


def collectives(work: Workload) -> list[Collective]:
    """All messages of a training step on one device, one row per purpose."""
    found = [*_of_weights(work), *_of_slots(work), *_of_tensor_parallel(work)]
    for teacher in work.teachers:
        found += (
            dataclasses.replace(one, name=f"teacher's {one.name}", layer_kind="teacher")
            for one in collectives(teacher)
        )
    merged: dict[tuple[str, str, tuple[str, ...]], Collective] = {}
    for one in found:
        key = (one.name, one.operation, one.axes)
        before = merged[key].array_bytes if key in merged else 0.0
        merged[key] = dataclasses.replace(one, array_bytes=one.array_bytes + before)
    return [one for one in merged.values() if one.group_size > 1 and one.array_bytes > 0]


def _of_weights(work: Workload) -> Iterator[Collective]:
    """Weights gathered over fsdp, for the forward and again for the backward pass, and gradients.

    They are sent once per microbatch, in the compute dtype, or as stored if that is smaller. A tied
    table is gathered for the head, and tokens look up their rows in what was gathered. A gradient
    is summed over the devices that saw other tokens: reduce-scattered over fsdp, then all-reduced
    over the axes that hold copies.
    """
    mesh, num_microbatches = work.mesh, work.config.training.num_microbatches
    sizes = dict(abstract_mesh(mesh).shape)
    batch_axes = mesh_axes("batch", abstract_mesh(mesh))
    specs = work.model.specs()  # as stored: with adapters, and quantised
    trains = jax.tree.leaves(training_marks(work.config.optimizer, specs))
    for (path, spec), trained in zip(jax.tree.leaves_with_path(specs), trains, strict=True):
        has_gradient = work.learns and trained
        kind = KIND_OF_COMPONENT.get(spec.component, "other")
        name = spec.component.replace("_", " ")
        split = _axes_of(spec, mesh)
        itemsize = min(work.itemsize, jnp.dtype(spec.dtype).itemsize)
        local = local_size(spec, mesh) * itemsize * num_microbatches
        if "fsdp" in split:
            whole = local * sizes["fsdp"]
            is_tied = work.model.tie_embeddings and path[0].key == "embedding"
            forward, passes = whole, 1 + work.learns
            if spec.component == "embedding":
                # A lookup may send the tokens' rows instead of the table; it has no backward pass.
                rows = work.tokens * work.model.model_dim * work.itemsize
                forward = min(whole, rows * num_microbatches)
                passes = 1 + work.learns * is_tied
            gathered = passes * (whole if is_tied else forward)
            gathered += work.extra_forward_passes * (spec.component != "head") * forward
            yield Collective(
                f"{name} weights", kind, "all-gather", ("fsdp",), sizes["fsdp"], gathered
            )
            if has_gradient:
                yield Collective(
                    f"{name} gradient", kind, "reduce-scatter", ("fsdp",), sizes["fsdp"], whole
                )
        if not has_gradient:
            continue
        copies = tuple(a for a in batch_axes if a not in split and sizes[a] > 1)
        n = _product(sizes, copies)
        yield Collective(f"{name} gradient", kind, "all-reduce", copies, n, local)


def _of_slots(work: Workload) -> Iterator[Collective]:
    """Slots of every token to the devices of its experts and back: T x slots per token x M.

    Both ways in the forward pass and in the backward pass. Remat sends slots to the experts again,
    and their outputs back if the gradient of the gates needs them.
    """
    axes = tuple(
        axis
        for axis in mesh_axes("expert", abstract_mesh(work.mesh))
        if abstract_mesh(work.mesh).shape[axis] > 1
    )
    tokens, runs = work.tokens * work.config.training.num_microbatches, work.runs_of_layers
    again = work.learns and work.model.remat != "none"
    back = work.total(lambda cost: cost.exchanged * (runs - (again and not cost.returned_again)))
    n = work.mesh.expert_shards
    there = runs * work.total(lambda cost: cost.exchanged)
    for name, passes in (("dispatch", there), ("combine", back)):
        yield Collective(name, "routing", "all-to-all", axes, n, tokens * passes)


def _of_tensor_parallel(work: Workload) -> Iterator[Collective]:
    """Sums over `tensor` of the outputs of heads and hidden units: T x M, or slots x M.

    One forward (the output), one backward (the input's gradient). Remat "full" repeats a sum if its
    layer needs the result. An embedding is summed forward, the input's gradient of the head
    backward; a multi-token module has both.
    """
    model, passes = work.model, 1 + work.learns + work.extra_forward_passes
    full = work.learns and model.remat == "full"

    def of_kind(kind: str) -> float:
        return work.total(lambda c: c.sums * (passes + (full and not c.ends_layer)), kind)

    sums = {kind: of_kind(kind) for kind in KINDS}
    of_head = work.decoder_tokens / work.tokens
    ends = 1 + work.extra_forward_passes + work.learns * of_head
    ends *= num_heads(model) if work.learns else 1
    sums["head"] = ends * model.model_dim * work.itemsize
    for kind, size in sums.items():
        name, tokens = f"{kind.replace('_', ' ')} output", work.tokens
        size *= tokens * work.config.training.num_microbatches
        yield Collective(name, kind, "all-reduce", ("tensor",), work.mesh.tensor, size)


def _axes_of(spec: ParameterSpec, mesh: MeshConfig) -> tuple[str, ...]:
    """The mesh axes of more than one device that a parameter is split over."""
    sizes = abstract_mesh(mesh)
    names = (axis for dim in spec.axes for axis in mesh_axes(dim, sizes))
    return tuple(axis for axis in names if sizes.shape[axis] > 1)


def _product(sizes: dict[str, int], axes: tuple[str, ...]) -> int:
    n = 1
    for axis in axes:
        n *= sizes[axis]
    return n
