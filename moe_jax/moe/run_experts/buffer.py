"""The outputs of experts, and the buffer of rows that a device receives.

Legend: `moe_jax.moe`; here also Q, devices that experts are split over, and W, rows of the buffer.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.run_experts.sorting import Order, UngroupedChoices

TILE = 128  # rows; a bounded buffer consists of whole tiles of the grouped matmul


class Buffer(NamedTuple):
    """Statistics of a bounded buffer of received rows.

    Attributes:
      overflow: int32, choices that were lost because they did not fit.
      rows: int32, the most rows for one device, whether they fit or not.
      factor: float32, `rows` over the mean: the `buffer_factor` that would suffice.
    """

    overflow: jax.Array
    rows: jax.Array
    factor: jax.Array

    def over_all(self) -> "Buffer":
        """Combines devices or chunks, which are a leading dim."""
        overflow = jnp.sum(self.overflow, dtype=jnp.int32)
        return Buffer(overflow, jnp.max(self.rows), jnp.max(self.factor))


class Combined(NamedTuple):
    """The outputs of experts, by token.

    Attributes:
      y: [G, S, M], or [J, M] for the tokens of all groups, in the dtype of the tokens.
      kept: bool, [G, S, K] or [J, K]: the choices that were computed: those that the assignment
        kept, except those that do not fit in a bounded buffer.
      buffer: statistics of the buffer if it is bounded; else None.
    """

    y: jax.Array
    kept: jax.Array
    buffer: Buffer | None = None


def most_received_rows(
    tokens: int, num_choices: int, num_own: int, num_devices: int, slots: int
) -> int:
    """The worst case: no device can receive more rows, whatever the router does.

    Args:
      tokens: J, tokens of one device.
      num_choices: K.
      num_own: experts of one device.
      num_devices: Q.
      slots: of one expert, in the groups of one device; capacity also bounds W.
    """
    per_sender = min(tokens * min(num_choices, num_own), num_own * slots)
    return per_sender * num_devices


def buffer_rows(mean: int, most: int, factor: float) -> int:
    """W, rows of the buffer.

    >>> buffer_rows(mean=1000, most=8000, factor=1.25)
    1280

    Args:
      mean: J K, rows that a device receives if experts are equally loaded.
      most: `most_received_rows`.
      factor: W over the mean, before it is rounded up to whole tiles; 0: the worst case.
    """
    if factor == 0:
        return most
    return min(most, math.ceil(round(factor * mean, 9) / TILE) * TILE)


def rows_that_fit(rows_QE: jax.Array, num_own: int, room: int) -> jax.Array:
    """The number of rows per sender and expert that fit on the expert's device: max-min fair.

    There is one run of rows per sender and expert. Runs take turns, one row at a time, until the
    buffer is full. So all truncated runs have the same length, to within one row, and shorter runs
    lose nothing. All devices compute this from the same counts.

    Args:
      rows_QE: int32, rows of every sender for every expert.
      num_own: E / Q, experts of one device.
      room: W.

    Returns:
      int32 [Q, E], at most `rows_QE`; the sum over the experts of one device is at most W.
    """
    senders, num_experts = rows_QE.shape
    rows = rows_QE.reshape(senders, -1, num_own)  # sender, device of the experts, its experts

    def total(rows: jax.Array) -> jax.Array:
        return jnp.sum(rows, axis=(0, 2), keepdims=True)

    # The largest number of whole turns that fit on each device, bit by bit.
    most = jnp.zeros((1, num_experts // num_own, 1), jnp.int32)
    for bit in reversed(range(room.bit_length())):
        longer = most | (1 << bit)
        most = jnp.where(total(jnp.minimum(rows, longer)) <= room, longer, most)
    left = room - total(jnp.minimum(rows, most))
    # In the last turn, runs are ordered by sender, then by expert.
    is_longer = (rows > most).swapaxes(0, 1)
    number = jnp.cumsum(is_longer.reshape(is_longer.shape[0], -1), axis=1)
    number = number.reshape(is_longer.shape).swapaxes(0, 1)
    fitting = jnp.minimum(rows, most + (number <= left))
    return fitting.reshape(rows_QE.shape)


def keep_first(
    choices: UngroupedChoices, order: Order, fitting_E: jax.Array
) -> tuple[UngroupedChoices, Order]:
    """Keeps the first rows of every expert, and packs them without gaps.

    Args:
      choices: with experts in [0, E).
      order: of the kept choices.
      fitting_E: int32, rows to keep per expert.

    Returns:
      The choices with fewer kept, and their order; unchanged if all rows fit.
    """
    expert_JK, gate_JK, kept_JK = choices
    choice_R, row_JK, rows_E = order
    starts_E, packed_E = starts(rows_E), starts(fitting_E)
    place_JK = row_JK - starts_E[expert_JK]  # of a kept choice, among the rows of its expert
    kept_JK = kept_JK & (place_JK < fitting_E[expert_JK])
    row_JK = jnp.where(kept_JK, packed_E[expert_JK] + place_JK, row_JK)
    rows = jnp.arange(len(choice_R))
    expert_R = jnp.searchsorted(jnp.cumsum(fitting_E), rows, side="right")
    expert_R = jnp.minimum(expert_R, len(rows_E) - 1)
    moved_R = jnp.minimum(rows - packed_E[expert_R] + starts_E[expert_R], len(choice_R) - 1)
    order = Order(choice_R[moved_R], row_JK, fitting_E)
    return UngroupedChoices(expert_JK, gate_JK, kept_JK), order


def starts(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """The start of each run, for consecutive runs."""
    return jnp.cumsum(sizes, axis=axis) - sizes
