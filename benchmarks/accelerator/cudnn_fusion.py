"""`jax.lax.ragged_dot` with XLA's experimental fusion for cuDNN, which can abort its process."""

import functools

from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.other_kernels import measure
from benchmarks.accelerator.shapes import SHAPES, TINY
from moe_jax.parallel.rules import platform


def rows(dry: bool) -> list[Row]:
    """Every shape with even loads; [] without a GPU."""
    shapes = TINY if dry else SHAPES
    return [
        Row(name, 12, functools.partial(measure, shape, "lax", dry))
        for name, shape in shapes.items()
        if platform() == "gpu" or dry
    ]
