"""How slots travel between the devices of their tokens and those of their experts.

Tokens are split over all devices, experts over the expert axes of the mesh. Both ways below carry
the slots of every expert to its device and its outputs back, by all-to-all; on one device, both do
nothing. Legend: `moe_jax.moe`.
"""

from typing import Protocol

import jax

from moe_jax.parallel.rules import constrain


class Exchange(Protocol):
    """A way to carry slots between the devices of tokens and those of experts.

    Attributes:
      num_chunks: in how many parts the slots travel; while one part is computed, another can be
        under way.
    """

    num_chunks: int

    def to_experts(self, x_EGCM: jax.Array) -> jax.Array:
        """The slots of all experts for own groups -> those of own experts for all groups."""

    def to_tokens(self, y_EGCM: jax.Array) -> jax.Array:
        """The way back."""


class ByConstraint:
    """States where slots lie before and after; the compiler inserts the all-to-all.

    Without a mesh this is the way of a single device.
    """

    def __init__(self, num_chunks: int = 1):
        self.num_chunks = num_chunks

    def to_experts(self, x_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; an array of all devices."""
        x_EGCM = constrain(x_EGCM, None, "group", None, None)
        return constrain(x_EGCM, "expert", "expert_group", None, None)

    def to_tokens(self, y_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; an array of all devices."""
        y_EGCM = constrain(y_EGCM, "expert", "expert_group", None, None)
        return constrain(y_EGCM, None, "group", None, None)


BY_CONSTRAINT = ByConstraint()


class ByAllToAll:
    """`jax.lax.all_to_all` inside `jax.shard_map`, one mesh axis after another.

    With experts split over slices this is hierarchical: slots first meet, within a slice, on the
    device that talks to the same device of the other slices, so that each crosses the slower
    network once and in large messages.

    Args:
      axes: mesh axes of the experts, outermost first.
      num_chunks: see `Exchange`.
    """

    def __init__(self, axes: tuple[str, ...], num_chunks: int = 1):
        self.axes = axes
        self.num_chunks = num_chunks

    def to_experts(self, x_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; arrays of one device."""
        sizes = [jax.lax.axis_size(axis) for axis in self.axes]
        x = x_EGCM.reshape(*sizes, -1, *x_EGCM.shape[1:])  # expert axes, own experts, G, C, M
        groups_dim = len(sizes) + 1
        for dim in reversed(range(len(sizes))):
            x = jax.lax.all_to_all(x, self.axes[dim], dim, groups_dim, tiled=True)
        return x.reshape(x.shape[len(sizes) :])

    def to_tokens(self, y_EGCM: jax.Array) -> jax.Array:
        """See `Exchange`; arrays of one device."""
        y = y_EGCM.reshape(*(1,) * len(self.axes), *y_EGCM.shape)
        groups_dim = len(self.axes) + 1
        for dim, axis in enumerate(self.axes):
            y = jax.lax.all_to_all(y, axis, groups_dim, dim, tiled=True)
        return y.reshape(-1, *y.shape[groups_dim:])
