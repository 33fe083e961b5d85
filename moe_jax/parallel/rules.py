"""The one table from names of array dims to axes of the mesh."""

import contextlib
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Axes that the mesh in use does not have are left out: a mesh has either "slice" or, where experts
# span slices, "expert_slice".
RULES: dict[str, tuple[str, ...]] = {
    # of activations
    "batch": ("slice", "expert_slice", "data", "fsdp", "expert"),
    "group": ("slice", "expert_slice", "data", "fsdp", "expert"),  # tokens outside the experts
    "expert_group": ("slice", "data", "fsdp"),  # the groups whose slots an expert computes
    # of activations and parameters
    "expert": ("expert_slice", "expert"),
    "hidden": ("tensor",),  # of an FFN
    "heads": ("tensor",),  # heads and their dims in one
    "vocab": ("tensor",),
    # of parameters and of the optimizer state that goes with them
    "model": ("fsdp",),
}


def mesh_in_use() -> jax.sharding.AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set, or None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """A context in which no mesh is in use: for what is too small to be split."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def platform() -> str:
    """What a program is compiled for: "cpu", "tpu" or "gpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    # The devices of a mesh may be of a machine that is not here.
    if not mesh.empty and mesh.abstract_device is not None:
        name = mesh.abstract_device.platform
    else:
        name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def mesh_axes(
    name: str | None, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh
) -> tuple[str, ...]:
    """The axes of the mesh that a named dim is split over; none for None, nor any of size 1.

    Raises:
      ValueError: the table does not know the name.
    """
    if name is None:
        return ()
    if name not in RULES:
        raise ValueError(f"A dim is one of {sorted(RULES)}: got {name!r}. Add it to RULES.")
    return tuple(axis for axis in RULES[name] if mesh.shape.get(axis, 1) > 1)


def num_shards(name: str, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh) -> int:
    """In how many parts a named dim is split."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh))


def partition_spec(
    names: tuple[str | None, ...], mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh
) -> PartitionSpec:
    """The axes of each dim of an array, by the names of its dims."""
    return PartitionSpec(*(mesh_axes(name, mesh) or None for name in names))


def named_sharding(names: tuple[str | None, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """How an array lies on the mesh, by the names of its dims."""
    return NamedSharding(mesh, partition_spec(names, mesh))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lays an array on the mesh in use as the table says; without a mesh, nothing.

    Args:
      x: an array of the whole program. Inside `jax.shard_map` axes that it made manual are left
        out.
      *names: of its dims; None for a dim that is not split.

    Raises:
      ValueError: a dim cannot be split evenly.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return x
    assert len(names) == x.ndim, (names, x.shape)
    for name, size in zip(names, x.shape, strict=True):
        if name is not None and size % num_shards(name, mesh):
            raise ValueError(
                f"The mesh splits a dim evenly: {name!r} of size {size} over "
                f"{num_shards(name, mesh)} devices ({mesh_axes(name, mesh)}), array {x.shape}. "
                "Change the mesh or the size."
            )
    automatic = [
        tuple(axis for axis in mesh_axes(name, mesh) if axis not in mesh.manual_axes) or None
        for name in names
    ]
    if len(mesh.manual_axes) == len(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*automatic))
