"""How slots move between the devices of their tokens and those of their experts.

Tokens are split over all devices, experts over the expert axes of the mesh. Both classes below move
the slots of every expert to its device, and the outputs back, by all-to-all. On one device, both do
nothing. Legend: `moe_jax.moe`.
"""

from typing import Protocol

import jax

from moe_jax.parallel.rules import constrain


class Exchange(Protocol):
    """Moves slots between the devices of tokens and those of experts.

    Attributes:
      num_chunks: number of chunks of slots; while one is computed, another can be in transit.
    """

    num_chunks: int

    def to_experts(self, x_EGCM: jax.Array) -> jax.Array:
        """Slots of all experts for own groups -> slots of own experts for all groups."""

    def to_tokens(self, y_EGCM: jax.Array) -> jax.Array:
        """The inverse of `to_experts`."""


class ByConstraint:
    """Constrains the sharding of slots before and after; the compiler inserts the all-to-all.

    Without a mesh it does nothing.
    """

    def __init__(self, num_chunks: int = 1):
        self.num_chunks = num_chunks

    def to_experts(self, x_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; a global array."""
        x_EGCM = constrain(x_EGCM, None, "group", None, None)
        return constrain(x_EGCM, "expert", "expert_group", None, None)

    def to_tokens(self, y_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; a global array."""
        y_EGCM = constrain(y_EGCM, "expert", "expert_group", None, None)
        return constrain(y_EGCM, None, "group", None, None)


BY_CONSTRAINT = ByConstraint()


class ByAllToAll:
    """`jax.lax.all_to_all` inside `jax.shard_map`, one mesh axis after another.

    With experts split over slices this is hierarchical. Slots are first collected within a slice,
    on the device that talks to its counterparts in other slices. So each slot crosses the slower
    network once, in large messages.

    Args:
      axes: mesh axes of the experts, outermost first.
      num_chunks: see `Exchange`.
    """

    def __init__(self, axes: tuple[str, ...], num_chunks: int = 1):
        self.axes = axes
        self.num_chunks = num_chunks

    def to_experts(self, x_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; an array of one device."""
        sizes = [jax.lax.axis_size(axis) for axis in self.axes]
        x = x_EGCM.reshape(*sizes, -1, *x_EGCM.shape[1:])  # expert axes, own experts, G, C, M
        groups_dim = len(sizes) + 1
        for dim in reversed(range(len(sizes))):
            x = jax.lax.all_to_all(x, self.axes[dim], dim, groups_dim, tiled=True)
        return x.reshape(x.shape[len(sizes) :])

    def to_tokens(self, y_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; an array of one device."""
        y = y_EGCM.reshape(*(1,) * len(self.axes), *y_EGCM.shape)
        groups_dim = len(self.axes) + 1
        for dim, axis in enumerate(self.axes):
            y = jax.lax.all_to_all(y, axis, groups_dim, dim, tiled=True)
        return y.reshape(-1, *y.shape[groups_dim:])
