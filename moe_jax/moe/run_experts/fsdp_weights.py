"""Weights split over devices, which gather them for a product (see `moe_jax.parameters`)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.parallel.rules import constrain
from moe_jax.parameters import Axes, Layout, Weight, dense, grouped, weight_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllGathered(Weight):
    """A weight split over fsdp, but whole on every device that multiplies by it.

    Otherwise a compiler may leave the shards in place and move sums of rows around instead. In
    DeepSeek-V3's plan, rings of 32 shards moved 2,300 GB more (docs/planning.md). The backward pass
    gathers again; otherwise every device would keep the matrices of all layers. (Layers that are
    neither scanned nor under remat are one program, in which a compiler may keep them.)

    Attributes:
      weight: a global array, or a `Weight` of global arrays.
      axes: names of the dims of its matrix in `parallel.rules`.
    """

    weight: Any
    axes: Axes = dataclasses.field(metadata={"static": True})

    def product(self, x: jax.Array, layout: Layout) -> jax.Array:
        """See `Weight`: float32 is gathered in the dtype of `x`, quantised arrays as they are."""

        # If remat recomputes the layer, the compiler may merge that gathering with the one of the
        # backward pass. The forward pass of scanned layers is a separate program.
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
    """Casts float32 to the dtype of the tokens; quantised arrays and scales stay as they are."""
    return array.astype(dtype) if array.dtype == jnp.float32 else array
