"""Experts on a mesh with explicit collectives: one program per device, by `jax.shard_map`.

All slots are exchanged, filled or not; of rows sorted by expert, only the kept choices. Legend:
`moe_jax.moe`; here also Q, devices that experts are split over, and W, rows that a device receives.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.run_experts.buffer import (
    Buffer,
    Combined,
    buffer_rows,
    keep_first,
    most_received_rows,
    rows_that_fit,
    starts,
)
from moe_jax.moe.run_experts.exchange import ByAllToAll
from moe_jax.moe.run_experts.fsdp_weights import in_compute_dtype
from moe_jax.moe.run_experts.gather import RUN_BY_SLOTS, combine, fill, fill_gates
from moe_jax.moe.run_experts.grouped_matmul import says_how_it_varies
from moe_jax.moe.run_experts.plan import Plan
from moe_jax.moe.run_experts.rows import num_experts_of, run_sorted_rows, through_sorted_rows
from moe_jax.moe.run_experts.sorting import UngroupedChoices, sort_by_expert, without_groups
from moe_jax.parallel.collectives import ragged_all_to_all, vary
from moe_jax.parallel.rules import mesh_axes, mesh_in_use, num_shards, partition_spec
from moe_jax.parameters import Axes, weight_axes

TOKEN_AXES = ("group", None, None)


def run_parallel(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    axes: Mapping[str, Axes],
    experts: Experts,
    plan: Plan,
    rng: jax.Array | None = None,
) -> Combined:
    """Runs experts on each device's own tokens, with explicit collectives.

    Tokens are split over every mesh axis except `tensor`, experts over the expert axes. A device
    gathers its experts' matrices over `fsdp`. Under `tensor` it keeps its part of their hidden dim,
    and partial outputs are summed last, by token.

    Arguments and result are those of `run_experts`, with global arrays. Each device has its own
    random key, so expert dropout depends on the mesh. einsum and gather exchange slots by
    `jax.lax.all_to_all`; ragged exchanges rows by `jax.lax.ragged_all_to_all`. The chunks of a plan
    are parts of the slots or, with ragged, of the tokens; each chunk has its own buffer.

    Raises:
      ValueError: the mesh does not split the groups of tokens or the experts evenly.
    """
    mesh = mesh_in_use()
    assert mesh is not None, "with one device there is nothing to exchange"
    check_even("groups of tokens", x_GSM.shape[0], num_shards("group", mesh))
    check_even("experts", assignment.num_experts, num_shards("expert", mesh))
    tokens = partition_spec(TOKEN_AXES, mesh)
    expert_axes = mesh_axes("expert", mesh)
    arrays, names, as_used_here = arrays_of(weights, axes)
    arrays = [in_compute_dtype(array, x_GSM.dtype) for array in arrays]
    tensor = mesh_axes("hidden", mesh)

    def on_device(
        x_GSM: jax.Array,
        choices: tuple[jax.Array, ...],
        arrays: list[jax.Array],
        rng: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None, Buffer | None]:
        index_GSK, gate_GSK, slot_GSK, kept_GSK = (vary(choice, TOKEN_AXES) for choice in choices)
        sizes = (assignment.capacity, assignment.num_experts)
        own = Assignment(index_GSK, gate_GSK, slot_GSK, kept_GSK, *sizes)
        key = None if rng is None else own_key(rng, mesh)
        operands = (vary(x_GSM, TOKEN_AXES), own, as_used_here(arrays), experts, key)
        if plan.rows == "ragged" and expert_axes:
            y_GSM, kept_GSK, buffer = exchange_rows(*operands, expert_axes, plan)
        elif plan.rows == "ragged":
            y_GSM, buffer = run_sorted_rows(*operands, kernel=plan.kernel), None
        else:
            exchange = ByAllToAll(expert_axes, plan.num_chunks)
            y_GSM, buffer = RUN_BY_SLOTS[plan.rows](*operands, exchange), None
        y_GSM = jax.lax.psum(y_GSM, tensor)
        if buffer is None:
            return y_GSM, None, None
        if tensor:  # these are equal along it; a maximum tells JAX so
            kept_GSK, buffer = jax.lax.pmax((kept_GSK.astype(jnp.int8), buffer), tensor)
        return y_GSM, kept_GSK > 0, jax.tree.map(lambda own: own[None], buffer)

    if mesh.shape["fsdp"] > 1:
        on_device = jax.checkpoint(on_device, policy=all_but_gathered)
    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(tokens, (tokens,) * 4, [partition_spec(one, mesh) for one in names], jax.P()),
        out_specs=(tokens, tokens, partition_spec(TOKEN_AXES[:1], mesh)),
        check_vma=says_how_it_varies(plan.kernel),
    )
    y_GSM, kept_GSK, buffer = sharded(x_GSM, tuple(assignment[:4]), arrays, rng)
    if kept_GSK is None or buffer is None:
        return Combined(y_GSM, assignment.kept_GSK)
    return Combined(y_GSM, kept_GSK, buffer.over_all())


def arrays_of(
    weights: Weights, axes: Mapping[str, Axes]
) -> tuple[list[jax.Array], list[Axes], Callable[[list[jax.Array]], Weights]]:
    """The arrays of weights, their axes, and a function that rebuilds weights on one device.

    A weight may consist of several arrays, each with its own axes.
    """
    arrays, tree = jax.tree.flatten(dict(weights))
    names = jax.tree.leaves(
        {name: weight_axes(axes[name], weight) for name, weight in weights.items()},
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    added_last = [
        is_added_last(axes[path[0].key])
        for path, _ in jax.tree_util.tree_leaves_with_path(dict(weights))
    ]

    def as_used_here(arrays: list[jax.Array]) -> Weights:
        used: Weights = jax.tree.unflatten(tree, map(as_used, arrays, names, added_last))
        return used

    return arrays, names, as_used_here


def own_key(rng: jax.Array, mesh: AbstractMesh) -> jax.Array:
    """The random key of this device."""
    split = tuple(axis for axis, size in mesh.shape.items() if size > 1)
    return jax.random.fold_in(rng, jax.lax.axis_index(split))


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass keeps: everything except matrices gathered over fsdp.

    These are gathered again; otherwise every device would keep the matrices of all layers. A
    checkpoint prevents the compiler from fusing across the values it keeps: memory traffic is 3.1
    instead of 2.0 times the minimum in a Switch layer on v5e. So there is no checkpoint if nothing
    is gathered.
    """
    return primitive.name not in ("all_gather", "pvary")


def is_added_last(axes: Axes) -> bool:
    """Whether a weight is a vector per expert that is added after the hidden dim."""
    return len(axes) == 2 and "hidden" not in axes


def as_used(array: jax.Array, axes: Axes, added_last: bool) -> jax.Array:
    """An array of this device's experts as it is used: gathered over fsdp, and marked as varying.

    The gradient is scattered over fsdp and summed over the axes that have the same experts. A
    vector added after the hidden dim counts once, not once per part of that dim.
    """
    if "model" in axes and jax.lax.axis_size("fsdp") > 1:
        array = jax.lax.all_gather(array, "fsdp", axis=axes.index("model"), tiled=True)
    array = vary(array, axes)
    if added_last and jax.lax.axis_size("tensor") > 1:
        array *= (jax.lax.axis_index("tensor") == 0).astype(array.dtype)
    return array


def exchange_rows(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    axes: tuple[str, ...],
    plan: Plan,
) -> Combined:
    """Runs the tokens of one device, in chunks, by `through_ragged_exchange`."""
    groups, tokens, model_dim = x_GSM.shape
    num_chunks = min(plan.num_chunks, groups * tokens)  # generation of one text has few
    rows = (x_GSM.reshape(-1, model_dim), *without_groups(assignment))
    outputs = []
    chunks = zip(*(jnp.array_split(value, num_chunks) for value in rows), strict=True)
    for i, (x_JM, *choices) in enumerate(chunks):
        key = rng if rng is None or i == 0 else jax.random.fold_in(rng, i)
        one = through_ragged_exchange(
            x_JM, UngroupedChoices(*choices), weights, experts, key, axes, plan,
            slots=groups * assignment.capacity,
        )  # fmt: skip
        outputs.append(one)
    y_JM = jnp.concatenate([one.y for one in outputs])
    kept_JK = jnp.concatenate([one.kept for one in outputs])
    buffers = [one.buffer for one in outputs if one.buffer is not None]
    return Combined(
        y_JM.reshape(groups, tokens, model_dim),
        kept_JK.reshape(groups, tokens, -1),
        jax.tree.map(lambda *each: jnp.stack(each), *buffers).over_all() if buffers else None,
    )


def check_even(what: str, count: int, shards: int) -> None:
    """Raises `ValueError` if the mesh does not split something evenly."""
    if count % shards:
        raise ValueError(
            f"The mesh must split {what} evenly: {count} over {shards} devices. Change "
            "the mesh, training.batch_size or num_experts."
        )


def through_ragged_exchange(
    x_JM: jax.Array,
    choices: UngroupedChoices,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    axes: tuple[str, ...],
    plan: Plan,
    slots: int,
) -> Combined:
    """Moves the kept choices to their experts' devices and back, and sums them by token.

    For use inside `jax.shard_map`; arrays are those of one device.

    Args:
      x_JM: tokens of this device.
      choices: of these tokens, among the experts of all devices.
      weights: of this device's experts, by name, leading dim E / Q.
      experts: computes rows; see `run_sorted_rows`.
      rng: key for the experts, or None.
      axes: mesh axes that the experts are split over.
      plan: its `buffer_factor` bounds the rows that a device receives: only `rows_that_fit` are
        sent. If it is 0, there is room for the worst case. Its `kernel` multiplies rows by weights.
      slots: of one expert, in the groups of this device.

    Returns:
      The gated sum over each token's computed choices, in a `Combined`.
    """
    num_devices, num_own = jax.lax.axis_size(axes), num_experts_of(weights)
    num_tokens, num_choices = choices.kept_JK.shape
    most = most_received_rows(
        tokens=num_tokens,
        num_choices=num_choices,
        num_own=num_own,
        num_devices=num_devices,
        slots=slots,
    )
    max_rows = buffer_rows(num_tokens * num_choices, most, plan.buffer_factor)  # W

    order = sort_by_expert(choices, num_own * num_devices)
    # Rows that each device sends to each expert.
    rows_QE = jax.lax.all_gather(order.rows_E, axes, axis=0, tiled=False)
    me, buffer = jax.lax.axis_index(axes), None
    if plan.buffer_factor > 0:
        most_sent = jnp.max(
            jnp.sum(rows_QE.reshape(num_devices, num_devices, num_own), axis=(0, 2))
        )
        rows_QE = rows_that_fit(rows_QE, num_own, max_rows)
        sent_JK = choices.kept_JK
        choices, order = keep_first(choices, order, rows_QE[me])
        overflow = jnp.sum(sent_JK & ~choices.kept_JK, dtype=jnp.int32)
        buffer = Buffer(overflow, most_sent, most_sent.astype(jnp.float32) / sent_JK.size)
    places = order.places(choices.kept_JK)
    there, back = ragged_exchange_arguments(rows_QE, num_own, me)

    def sent(rows: jax.Array) -> jax.Array:
        empty = jnp.zeros_like(rows, shape=(max_rows, rows.shape[1]))
        return ragged_all_to_all(rows, empty, *there, axis_name=axes)

    x_RM: jax.Array = fill(x_JM, places)
    x_WM, gate_W1 = sent(x_RM), sent(fill_gates(choices.gate_JK, places))
    own_QE = jax.lax.dynamic_slice_in_dim(rows_QE, me * num_own, num_own, axis=1)
    expert_W, is_filled_W = expert_of_rows(own_QE, max_rows)
    filled_W1 = is_filled_W[:, None]
    received = UngroupedChoices(expert_W[:, None], jnp.where(filled_W1, gate_W1, 0), filled_W1)
    y_WM = through_sorted_rows(
        x_WM, received, weights, experts, rng, plan.kernel, likely_rows=order.row_JK.size
    )
    y_RM = ragged_all_to_all(y_WM, jnp.zeros_like(x_RM), *back, axis_name=axes)
    return Combined(combine(y_RM, places), choices.kept_JK, buffer)


def ragged_exchange_arguments(
    rows_QE: jax.Array, num_own: int, me: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Arguments of `ragged_all_to_all` that send a device's rows, and that return computed rows.

    Args:
      rows_QE: int32, rows that each device sends to each expert of all devices.
      num_own: experts per device.
      me: int32 scalar, index of the device.

    Returns:
      For the way there and for the way back, each int32 [Q]: the start of the rows for a device,
      the number sent to it, their start there, and the number received from it.
    """
    devices = rows_QE.shape[0]
    # Summed over a device's experts: rows per sender and receiver.
    rows_QQ = jnp.sum(rows_QE.reshape(devices, devices, num_own), axis=-1)
    sent_Q, received_Q = rows_QQ[me], rows_QQ[:, me]
    there = (starts(sent_Q), sent_Q, starts(rows_QQ, axis=0)[me], received_Q)
    back = (starts(received_Q), received_Q, starts(rows_QQ, axis=1)[:, me], sent_Q)
    return there, back


def expert_of_rows(rows_QE: jax.Array, max_rows: int) -> tuple[jax.Array, jax.Array]:
    """The expert of each received row.

    Args:
      rows_QE: int32, rows that each device sent for each expert here; they arrive ordered by
        sender, then by expert.
      max_rows: W.

    Returns:
      int32 [W] in [0, E / Q), and bool [W], True for rows that were received.
    """
    ends = jnp.cumsum(rows_QE.reshape(-1))
    row_W = jnp.arange(max_rows)
    run_W = jnp.searchsorted(ends, row_W, side="right")
    return (run_W % rows_QE.shape[1]).astype(jnp.int32), row_W < ends[-1]
