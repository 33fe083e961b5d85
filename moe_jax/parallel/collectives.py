"""Collectives inside `jax.shard_map` that some platforms lack."""

import jax
import jax.numpy as jnp

from moe_jax.parallel.rules import mesh_axes, mesh_in_use, platform


def vary(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Marks an array as varying along every mesh axis, inside `jax.shard_map`.

    It can then be combined with arrays that vary. Its gradient is summed over the axes along which
    it is the same: those that its dims, named as in `rules.RULES`, are not split over.
    """
    mesh = mesh_in_use()
    assert mesh is not None
    split = {axis for name in names for axis in mesh_axes(name, mesh)}
    same = tuple(axis for axis, size in mesh.shape.items() if size > 1 and axis not in split)
    return jax.lax.pcast(x, same, to="varying") if same else x


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: tuple[str, ...],
) -> jax.Array:
    """Sends runs of rows to other devices, with sizes known only at run time.

    It calls `jax.lax.ragged_all_to_all`, except on a CPU, where XLA lacks it: there it calls
    `emulated_ragged_all_to_all`.

    Args:
      operand: rows to send.
      output: where received rows are written; other rows keep their values.
      input_offsets: int32, first row of `operand` for each device along the axes.
      send_sizes: int32, number of rows for each device.
      output_offsets: int32, first row of each device's `output` that they are written to.
      recv_sizes: int32, number of rows from each device.
      axis_name: mesh axes; devices are counted with the last axis fastest.

    Returns:
      The output with the received rows.
    """
    exchange = emulated_ragged_all_to_all if platform() == "cpu" else jax.lax.ragged_all_to_all
    return exchange(
        operand,
        output,
        input_offsets,
        send_sizes,
        output_offsets,
        recv_sizes,
        axis_name=axis_name,
    )


def emulated_ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: tuple[str, ...],
) -> jax.Array:
    """`ragged_all_to_all` by an all-gather of everything: for small tests, not for speed."""
    del recv_sizes  # the sizes of the senders suffice
    me = jax.lax.axis_index(axis_name)
    gathered = jax.lax.all_gather(operand, axis_name, axis=0, tiled=False)
    # [senders], each sender's entry for this device
    starts, sizes, offsets = (
        jax.lax.all_gather(x, axis_name, axis=0, tiled=False)[:, me]
        for x in (input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0])
    is_from = (row[:, None] >= offsets) & (row[:, None] < offsets + sizes)  # [rows, senders]
    sender = jnp.argmax(is_from, axis=1)
    source = jnp.clip(starts[sender] + row - offsets[sender], 0, operand.shape[0] - 1)
    received = jnp.any(is_from, axis=1).reshape(-1, *(1,) * (output.ndim - 1))
    return jnp.where(received, gathered[sender, source], output)
