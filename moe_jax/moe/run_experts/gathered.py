"""Weights that a device has a part of, and gathers for a product (see `moe_jax.parameters`)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.parallel.rules import constrain
from moe_jax.parameters import Axes, Layout, Weight, dense, grouped, weight_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered(Weight):
    """A weight split over fsdp, whole on every device that multiplies by it.

    Left to itself, a compiler may keep the parts where they are and carry sums of rows around
    instead: 32 times over in DeepSeek-V3's plan, which moved 2,300 GB more (docs/planning.md). The
    backward pass gathers again: kept, the matrices of all layers would lie on every device. (Layers
    that are neither scanned nor under remat are one program, in which a compiler may keep them.)

    Attributes:
      weight: an array of the whole program, or a `Weight` of such.
      axes: names of the dims of its matrix in `parallel.rules`.
    """

    weight: Any
    axes: Axes = dataclasses.field(metadata={"static": True})

    def product(self, x: jax.Array, layout: Layout) -> jax.Array:
        """See `Weight`: float32 is gathered in the dtype of `x`, quantised arrays as they are."""

        # Where remat computes the layer again, one gathering is enough for that and the backward
        # pass: the compiler may merge them. Scanned layers' forward pass is another program.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def multiplied(x: jax.Array, weight: Any) -> jax.Array:
            arrays = jax.tree.map(lambda array: in_compute_dtype(array, x.dtype), weight)
            return grouped(x, self._whole(arrays), layout)

        return multiplied(x, self.weight)

    def dense(self) -> jax.Array:
        """See `Weight`."""
        return dense(self._whole(self.weight))

    def _whole(self, weight: Any) -> Any:
        return jax.tree.map(
            lambda array, axes: constrain(
                array, *(name if name != "model" else None for name in axes)
            ),
            weight,
            weight_axes(self.axes, weight),
        )


def in_compute_dtype(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Float32 in the dtype of the tokens; quantised arrays, scales too, stay what they are."""
    return array.astype(dtype) if array.dtype == jnp.float32 else array
