"""Machines by name, checked before anything compiles, and their devices without the machine.

Names: `v5p:8x16x16` (a TPU slice, chips along each dim of its torus), `2*v5e:16x16` (two of them,
joined by the data-centre network), `h100:8` (GPUs of one node), `h100:4x8` (nodes x GPUs).
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from moe_jax.config.installed import install_command
from moe_jax.planning.gpu_targets import target_config
from moe_jax.planning.hardware import CHIPS, Chip

GPUS_PER_NODE = 8
MAX_NODES = 1024
# Chips along each dim. Larger slices of three dims consist of cubes of 4 x 4 x 4.
SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SHAPES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
MAX_CHIPS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # of the largest slice that is offered
MAX_SLICES = 64
# Types of Cloud TPU, such as v5p-256: the chip, and how many of the counted units make one chip.
CLOUD_TYPES = {"v4": ("v4", 2), "v5p": ("v5p", 2), "v5litepod": ("v5e", 1), "v6e": ("v6e", 1)}
EXAMPLES = "v5p:8x16x16, 2*v5e:16x16, h100:8 or h100:4x8"
# What compiling for a machine needs, by platform: one of these modules; pip extra.
PACKAGES = {
    "tpu": (("libtpu",), "tpu"),
    "gpu": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda"),
}
# libtpu looks for the machine that it runs on, and lets only one process per machine load it. Here
# only its compiler is needed.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # has no effect here, but it must be some type
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
      name: as it was written.
      chip: one of them.
      shape: chips along each dim of a slice's torus; for GPUs: nodes, GPUs per node.
      slices: TPU slices; 1 for GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        """Chips of all slices or nodes."""
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """Devices, as JAX counts them."""
        return self.num_chips * self.chip.devices

    @property
    def devices_per_island(self) -> int:
        """Devices that the fast interconnect joins: those of one slice or node."""
        chips = math.prod(self.shape) if self.chip.platform == "tpu" else self.shape[-1]
        return chips * self.chip.devices


def parse_topology(name: str) -> Topology:
    """Reads the name of a machine.

    Raises:
      ValueError: the name does not have this form, the chip is not in `hardware.CHIPS`, or the chip
        is not built in this shape. The shape is not left to the compiler, which would end the
        process.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name.strip().lower())
    if match is None:
        raise ValueError(
            "a topology must be CHIP:SHAPE, or SLICES*CHIP:SHAPE for several TPU slices: got "
            f"{name!r}. Write it like {of_cloud_type(name) or EXAMPLES}."
        )
    slices, chip_name, shape_text = int(match[1] or 1), match[2], match[3]
    if chip_name not in CHIPS:
        raise ValueError(
            f"the chip of a topology must be one of {sorted(CHIPS)}: got {chip_name!r} in "
            f"{name!r}. v5litepod is v5e, v7x is tpu7x."
        )
    chip = CHIPS[chip_name]
    shape = tuple(int(size) for size in shape_text.split("x"))
    if chip.platform == "gpu":
        shape = (1, *shape) if len(shape) == 1 else shape
        _check_gpus(name, slices, shape)
    else:
        _check_slices(name, chip, slices, shape)
    return Topology(name.strip().lower(), chip, shape, slices)


def of_cloud_type(name: str) -> str:
    """The topology of a type of Cloud TPU, and what its number counts; "" for any other name.

    >>> of_cloud_type("v5p-256")
    'v5p:4x4x8: v5p-256 counts cores, 2 a chip, and has 128 chips'
    """
    match = re.fullmatch(r"(\w+)-(\d+)", name.strip().lower())
    if match is None or match[1] not in CLOUD_TYPES:
        return ""
    chip, cores = CLOUD_TYPES[match[1]]
    num_chips = int(match[2]) // cores
    shapes: Sequence[tuple[int, ...]] = SHAPES_2D
    if chip in MAX_CHIPS:
        cubes = itertools.combinations_with_replacement(range(4, 25, 4), 3)
        shapes = (*SHAPES_3D, *sorted(cubes, key=sum))  # the nearest to a cube first
    shape = next((s for s in shapes if math.prod(s) == num_chips), None)
    if shape is None:
        return ""
    counted = f"cores, {cores} a chip, and has {num_chips} chips" if cores > 1 else "chips"
    return f"{chip}:{_written([shape])}: {name} counts {counted}"


def _check_gpus(name: str, slices: int, shape: tuple[int, ...]) -> None:
    fits = len(shape) == 2 and 1 <= shape[0] <= MAX_NODES and 1 <= shape[1] <= GPUS_PER_NODE
    if slices != 1 or not fits:
        raise ValueError(
            f"a GPU topology must be CHIP:GPUS or CHIP:NODESxGPUS, of 1 to {GPUS_PER_NODE} GPUs a "
            f"node and up to {MAX_NODES} nodes: got {name!r}. Write it like h100:8 or h100:4x8."
        )


def _check_slices(name: str, chip: Chip, slices: int, shape: tuple[int, ...]) -> None:
    if not 1 <= slices <= MAX_SLICES:
        raise ValueError(
            f"a topology must have 1 to {MAX_SLICES} slices: got {slices} in {name!r}."
        )
    prefix = f"{slices}*{chip.name}" if slices > 1 else chip.name
    known: Sequence[tuple[int, ...]] = SHAPES_3D if chip.name in MAX_CHIPS else SHAPES_2D
    if chip.name in MAX_CHIPS:
        ordered = tuple(sorted(shape))
        cubes = len(shape) == 3 and all(size > 0 and size % 4 == 0 for size in shape)
        fits = math.prod(shape) <= MAX_CHIPS[chip.name] and ordered == shape
        allowed = shape in known or (cubes and fits)
        rule = (
            f"a {chip.name} slice has three dims: {_written(SHAPES_3D)}, or multiples of 4 in "
            f"ascending order, {MAX_CHIPS[chip.name]} chips at most"
        )
        near = sorted(max(4, -(-size // 4) * 4) for size in (*ordered, 4, 4)[:3])
        fix = f"The next whole cubes are {prefix}:{_written([near])}"
        if math.prod(near) > MAX_CHIPS[chip.name]:
            fix = f"Take several slices, such as 2*{chip.name}:8x16x16"
    else:
        allowed = shape in known
        rule = f"a {chip.name} slice has two dims, in ascending order: {_written(SHAPES_2D)}"
        fix = f"For more chips take several slices, such as 2*{chip.name}:16x16"
    same = [one for one in known if sorted(one) == sorted(shape)]
    if same:
        fix = f"Write {prefix}:{_written(same)}"
    if not allowed:
        raise ValueError(f"{rule}: got {name!r}. {fix}.")


def _written(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(str(size) for size in shape) for shape in shapes)


def devices(topology: Topology) -> list[jax.Device]:
    """Absent devices to compile for; JAX's own backend is left alone.

    Raises:
      ValueError: the compiler for these chips is not installed.
    """
    platform = topology.chip.platform
    modules, extra = PACKAGES[platform]
    if all(importlib.util.find_spec(module) is None for module in modules):
        raise ValueError(
            f"compiling for {topology.name} needs the {platform.upper()} compiler, though no "
            f"{platform.upper()}: the package {' or '.join(modules)} is not installed. "
            f"{install_command(extra)}, or plan by arithmetic alone with --nocompile."
        )
    shape = "x".join(str(size) for size in topology.shape)
    if platform == "gpu":
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=target_config(topology.chip),
            topology=f"1x{shape}",
        ).devices
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, object] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as on the machine
    if topology.num_chips == topology.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology.chip.name}:{shape}", **options
    ).devices
