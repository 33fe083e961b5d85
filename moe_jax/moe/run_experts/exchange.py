"""How slots and rows travel between the devices of their tokens and those of their experts.

Tokens are split over all devices, experts over the expert axes of the mesh. Both ways below carry
the slots of every expert to its device and its outputs back, by all-to-all; on one device, both do
nothing. Rows sorted by expert go as many as there are. Legend: `moe_jax.moe`; here also Q, devices
that share the experts, and W, rows that a device receives.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.run_experts.rows import num_experts_of, sort_by_expert, through_sorted_rows
from moe_jax.moe.run_experts.summing import sum_choices
from moe_jax.parallel.collectives import axes_size, ragged_all_to_all
from moe_jax.parallel.rules import constrain


class Exchange(Protocol):
    """A way between tokens and experts.

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
    """Says where slots lie before and after; the compiler inserts the all-to-all.

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


def through_ragged_exchange(
    x_JM: jax.Array,
    expert_JK: jax.Array,
    gate_JK: jax.Array,
    kept_JK: jax.Array,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    *,
    axes: tuple[str, ...],
    max_rows: int,
) -> jax.Array:
    """Carries the kept choices to their experts' devices and back, and sums them by token.

    Inside `jax.shard_map`; arrays are those of one device.

    Args:
      x_JM: tokens of this device.
      expert_JK: int32 in [0, E), over the experts of all devices.
      gate_JK: float32.
      kept_JK: bool.
      weights: of this device's experts, by name, leading dim E / Q.
      experts: computes rows; see `run_sorted_rows`.
      rng: key for the experts, or None.
      axes: mesh axes that the experts are split over.
      max_rows: W, which no device ever receives more rows than.

    Returns:
      [J, M] in the dtype of `x_JM`: the gated sum over a token's kept choices.
    """
    num_choices, num_devices = kept_JK.shape[1], axes_size(axes)
    num_own = num_experts_of(weights)
    choice_R, row_JK, rows_E = sort_by_expert(expert_JK, kept_JK, num_own * num_devices)
    x_RM = x_JM[choice_R // num_choices]

    # Rows of every expert on every device; and, summed over a device's experts, who sends how many
    # rows to whom: sender, receiver.
    rows_QE = jax.lax.all_gather(rows_E, axes, axis=0, tiled=False)
    rows_QQ = jnp.sum(rows_QE.reshape(num_devices, num_devices, num_own), axis=-1)
    me = jax.lax.axis_index(axes)
    sent_Q, received_Q = rows_QQ[me], rows_QQ[:, me]
    first_sent_Q, first_received_Q = starts(sent_Q), starts(received_Q)
    # Where this device's rows begin at each receiver, and those it computed at each sender.
    place_there_Q = starts(rows_QQ, axis=0)[me]
    place_back_Q = starts(rows_QQ, axis=1)[:, me]

    empty_WM = jnp.zeros_like(x_RM, shape=(max_rows, x_RM.shape[1]))
    x_WM = ragged_all_to_all(
        x_RM, empty_WM, first_sent_Q, sent_Q, place_there_Q, received_Q, axis_name=axes
    )
    own_QE = jax.lax.dynamic_slice_in_dim(rows_QE, me * num_own, num_own, axis=1)
    expert_W, is_filled_W = expert_of_rows(own_QE, max_rows)
    y_WM = through_sorted_rows(
        x_WM,
        expert_W[:, None],
        is_filled_W[:, None].astype(jnp.float32),
        is_filled_W[:, None],
        weights,
        experts,
        rng,
    )
    y_RM = ragged_all_to_all(
        y_WM,
        jnp.zeros_like(x_RM),
        first_received_Q,
        received_Q,
        place_back_Q,
        sent_Q,
        axis_name=axes,
    )
    return sum_choices(y_RM, row_JK, gate_JK, kept_JK).astype(x_JM.dtype)


def starts(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Where each of some runs begins if they follow each other."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def expert_of_rows(rows_QE: jax.Array, max_rows: int) -> tuple[jax.Array, jax.Array]:
    """The expert of each received row.

    Args:
      rows_QE: int32, how many rows each device has sent for each expert here; they arrive sender by
        sender, and expert by expert from each.
      max_rows: W.

    Returns:
      int32 [W] in [0, E / Q), and whether anything was received into the row, bool [W].
    """
    ends = jnp.cumsum(rows_QE.reshape(-1))
    row_W = jnp.arange(max_rows)
    run_W = jnp.searchsorted(ends, row_W, side="right")
    return (run_W % rows_QE.shape[1]).astype(jnp.int32), row_W < ends[-1]


def most_received_rows(
    tokens: int, num_choices: int, num_own: int, num_devices: int, slots: int
) -> int:
    """W: no device can receive more rows, whatever the router does.

    Args:
      tokens: J, of one device.
      num_choices: K.
      num_own: experts of one device.
      num_devices: Q.
      slots: of one expert, in the groups of one device: the capacity bounds W too.
    """
    per_sender = min(tokens * min(num_choices, num_own), num_own * slots)
    return per_sender * num_devices
