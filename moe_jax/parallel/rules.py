"""The one table that maps names of array dims to mesh axes."""

import contextlib
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Axes that the mesh in use lacks are left out: a mesh has either "slice" or, if experts span
# slices, "expert_slice".
RULES: dict[str, tuple[str, ...]] = {
    # of activations
    "batch": ("slice", "expert_slice", "data", "fsdp", "expert"),
    "group": ("slice", "expert_slice", "data", "fsdp", "expert"),  # tokens outside the experts
    "expert_group": ("slice", "data", "fsdp"),  # the groups whose slots an expert computes
    # of activations and parameters
    "expert": ("expert_slice", "expert"),
    "hidden": ("tensor",),  # of an FFN
    "heads": ("tensor",),  # heads and head dims, merged
    "vocab": ("tensor",),
    # of parameters and of the optimizer state that goes with them
    "model": ("fsdp",),
}


def mesh_in_use() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None if there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """A context without a mesh, for arrays that are too small to split."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def platform() -> str:
    """The platform that a program is compiled for: "cpu", "tpu" or "gpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    # The devices of a mesh may belong to another machine.
    if not mesh.empty and mesh.abstract_device is not None:
        name = mesh.abstract_device.platform
    else:
        name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def mesh_axes(
    name: str | None, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh
) -> tuple[str, ...]:
    """The mesh axes that a named dim is split over, without axes of size 1; () for None.

    Raises:
      ValueError: the name is not in the table.
    """
    if name is None:
        return ()
    if name not in RULES:
        raise ValueError(f"A dim must be one of {sorted(RULES)}: got {name!r}. Add it to RULES.")
    return tuple(axis for axis in RULES[name] if mesh.shape.get(axis, 1) > 1)


def num_shards(name: str, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh) -> int:
    """The number of parts that a named dim is split into."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh))


def partition_spec(
    names: tuple[str | None, ...], mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh
) -> PartitionSpec:
    """The mesh axes of each dim of an array, from the names of its dims."""
    return PartitionSpec(*(mesh_axes(name, mesh) or None for name in names))


def named_sharding(names: tuple[str | None, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an array on the mesh, from the names of its dims."""
    return NamedSharding(mesh, partition_spec(names, mesh))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Shards an array over the mesh in use, by the table; no-op without a mesh.

    Args:
      x: a global array. Inside `jax.shard_map` it is the device's part along the manual axes, which
        are left out.
      *names: names of its dims; None for a dim that is not split.

    Raises:
      ValueError: a dim cannot be split evenly.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return x
    assert len(names) == x.ndim, (names, x.shape)
    automatic = [
        tuple(axis for axis in mesh_axes(name, mesh) if axis not in mesh.manual_axes)
        for name in names
    ]
    for name, axes, size in zip(names, automatic, x.shape, strict=True):
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            raise ValueError(
                f"The mesh must split a dim evenly: {name!r} of size {size} over {shards} devices "
                f"({axes}), array {x.shape}. Change the mesh or the size."
            )
    if len(mesh.manual_axes) == len(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes or None for axes in automatic)))
