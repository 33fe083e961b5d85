"""Expert layers to measure, and their loads. It imports no JAX, since PyTorch's process uses it.

R counts rows (choices of experts), M model dims, H hidden units, E experts.
"""

from typing import NamedTuple

import numpy as np

ROUTINGS = ("even", "zipf")
PRODUCTS = 3  # matrix products of SwiGLU
FACTOR = 1.25  # ratio of slots to mean load


class Shape(NamedTuple):
    """SwiGLU experts on one device.

    Attributes:
      rows: R, rows of all experts.
      experts: E.
      model_dim: M.
      expert_dim: H.
    """

    rows: int
    experts: int
    model_dim: int
    expert_dim: int

    @property
    def slots(self) -> int:
        """Slots per expert at `FACTOR`."""
        return -(-int(self.rows * FACTOR) // self.experts)

    def flops(self, rows: int) -> float:
        """FLOPs of `rows` rows, forward and backward to rows and weights: three times forward."""
        return 3 * PRODUCTS * 2.0 * rows * self.model_dim * self.expert_dim


SHAPES = {
    "mixtral_E8": Shape(8192, 8, 4096, 14336),
    "fine_E64": Shape(32768, 64, 2048, 1024),
    "dsv3_E32": Shape(32768, 32, 7168, 2048),
}
TINY = {"tiny_E4": Shape(128, 4, 32, 64)}


def group_sizes(shape: Shape, routing: str) -> np.ndarray:
    """Rows of each expert, int32 [E]: equal, or proportional to 1 / rank; the last has none."""
    busy = shape.experts - 1
    weights = np.ones(busy) if routing == "even" else 1 / np.arange(1, busy + 1)
    sizes = np.floor(weights / weights.sum() * shape.rows).astype(np.int32)
    sizes[0] += shape.rows - sizes.sum()
    return np.append(sizes, 0).astype(np.int32)


def kept_in_slots(shape: Shape, routing: str) -> int:
    """Rows that fit into `shape.slots` slots per expert."""
    return int(np.minimum(group_sizes(shape, routing), shape.slots).sum())
