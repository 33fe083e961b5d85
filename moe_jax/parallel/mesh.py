"""The device mesh of a config."""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moe_jax.config import MeshConfig

logger = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in the mesh of a config.

    Args:
      config: sizes of the axes.
      devices: devices to arrange; None: all devices of all processes. A smaller mesh uses the first
        ones.

    Returns:
      A mesh with the axes `slice` (or, if experts span slices, `expert_slice`), `data`, `fsdp`,
      `expert`, `tensor`, of Auto type: the compiler propagates shardings between constraints.

    Raises:
      ValueError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    config = config.fill(len(devices))
    unused = len(devices) - config.num_devices
    if unused and jax.process_count() > 1:
        raise ValueError(
            "A run of several processes must use all their devices: the mesh has "
            f"{config.num_devices} of {len(devices)}. Set one of its sizes to -1."
        )
    arranged = arrange(config, devices[: config.num_devices])
    outer = "expert_slice" if config.experts_span_slices else "slice"
    names = (outer, "data", "fsdp", "expert", "tensor")
    return Mesh(arranged, names, axis_types=(AxisType.Auto,) * len(names))


def arrange(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges devices in the mesh's shape, with network neighbours near each other."""
    shape = (config.slices, *config.sizes)
    if devices[0].platform == "gpu":  # ids of a node are consecutive, as in JAX's meshes
        devices = sorted(devices, key=lambda device: device.id)
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices != config.slices:
        raise ValueError(
            f"mesh.slices must be the number of TPU slices: {config.slices}, and the "
            f"{len(devices)} devices of the mesh are in {slices}. Set config.mesh.slices={slices} "
            f"(--mesh=slices={slices} of a trained model)."
        )
    inner = (1, *config.sizes)
    try:
        if config.slices == 1:
            return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            inner, (config.slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    # JAX raises these if the torus has no room for a mesh, such as 3 of 8 chips: slower, not wrong.
    except (NotImplementedError, AssertionError) as error:
        reason = str(error)[:200]  # the rest lists devices
        logger.warning("The mesh is in the order of the devices, not of the torus: %s", reason)
        return np.asarray(devices).reshape(shape)


def describe_mesh(mesh: Mesh) -> str:
    """One line: the axes larger than 1, and the devices."""
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0]
    total = jax.device_count() if device.client is jax.devices()[0].client else mesh.size
    of_all = "" if mesh.size == total else f" of {total}"
    plural = "" if mesh.size == 1 else "s"
    return f"mesh: {axes or 'one device'} ({mesh.size}{of_all} {device.device_kind} device{plural})"
