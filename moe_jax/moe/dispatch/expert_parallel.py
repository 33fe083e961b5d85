"""Dispatch with explicit collectives: one program for each device, under `jax.shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.dispatch.einsum import einsum_dispatch
from moe_jax.moe.dispatch.exchange import ByAllToAll
from moe_jax.moe.dispatch.gather import gather_dispatch
from moe_jax.moe.dispatch.ragged import ragged_dispatch
from moe_jax.moe.dispatch.ragged_exchange import most_received_rows, through_ragged_exchange
from moe_jax.moe.experts import EXPERT_AXES, Experts, Weights
from moe_jax.parallel.collectives import vary
from moe_jax.parallel.rules import mesh_axes, mesh_in_use, num_shards, partition_spec

TOKEN_AXES = ("group", None, None)
SLOT_DISPATCHERS = {"einsum": einsum_dispatch, "gather": gather_dispatch}


def expert_parallel_dispatch(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None = None,
    *,
    name: str,
    num_chunks: int = 1,
) -> jax.Array:
    """Runs a dispatcher on each device's own tokens, with explicit collectives in between.

    Tokens are split over every mesh axis but `tensor`, experts over the expert axes; a device
    gathers its experts' matrices over `fsdp` and keeps its part of their hidden dim under `tensor`,
    whose partial outputs are summed last, by token.

    Args:
      x_GSM: tokens of all devices.
      assignment: the kept choices, their slots and gates.
      weights: of the experts, by name, leading dim E.
      experts: computes rows; see the dispatchers.
      rng: key for the experts, or None. Each device draws from its own, so that what is random in
        the experts depends on the mesh.
      name: "einsum" or "gather", with `jax.lax.all_to_all` of slots; "ragged", with
        `jax.lax.ragged_all_to_all` of rows.
      num_chunks: in how many parts slots (or, for "ragged", tokens) travel.

    Returns:
      [G, S, M] in the dtype of `x_GSM`: the gated sum over a token's kept choices.

    Raises:
      ValueError: the mesh does not divide the groups of tokens, or the experts.
    """
    mesh = mesh_in_use()
    assert mesh is not None, "with one device there is nothing to exchange"
    check_even("groups of tokens", x_GSM.shape[0], num_shards("group", mesh))
    check_even("experts", assignment.num_experts, num_shards("expert", mesh))
    weights = {key: value.astype(x_GSM.dtype) for key, value in weights.items()}
    tokens = partition_spec(TOKEN_AXES, mesh)
    weight_specs = {key: partition_spec(EXPERT_AXES[key], mesh) for key in weights}
    expert_axes = mesh_axes("expert", mesh)

    def on_device(
        x_GSM: jax.Array, choices: tuple[jax.Array, ...], weights: Weights, rng: jax.Array | None
    ) -> jax.Array:
        weights = {key: on_every_device(key, value) for key, value in weights.items()}
        if rng is not None:
            split = tuple(axis for axis, size in mesh.shape.items() if size > 1)
            rng = jax.random.fold_in(rng, jax.lax.axis_index(split))
        x_GSM = vary(x_GSM, TOKEN_AXES)
        index_GSK, gate_GSK, slot_GSK, kept_GSK = (vary(choice, TOKEN_AXES) for choice in choices)
        own = assignment._replace(
            expert_index_GSK=index_GSK, gate_GSK=gate_GSK, slot_GSK=slot_GSK, kept_GSK=kept_GSK
        )
        if name == "ragged" and not expert_axes:
            y_GSM = ragged_dispatch(x_GSM, own, weights, experts, rng)
        elif name == "ragged":
            y_GSM = _ragged(x_GSM, own, weights, experts, rng, expert_axes, num_chunks)
        else:
            exchange = ByAllToAll(expert_axes, num_chunks)
            y_GSM = SLOT_DISPATCHERS[name](x_GSM, own, weights, experts, rng, exchange)
        return jax.lax.psum(y_GSM, mesh_axes("hidden", mesh))

    if mesh.shape["fsdp"] > 1:
        on_device = jax.checkpoint(on_device, policy=all_but_gathered)
    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(tokens, (tokens,) * 4, weight_specs, jax.P()),
        out_specs=tokens,
    )
    return sharded(x_GSM, tuple(assignment[:4]), weights, rng)


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass finds again: everything but matrices gathered over fsdp.

    They are gathered anew, as parameters that the compiler splits would be: kept, those of all
    layers would lie on every device. A checkpoint keeps the compiler from fusing across what it
    keeps (3.1 times the fewest bytes of memory traffic in place of 2.0 in a Switch layer on v5e),
    so that there is none where nothing is gathered.
    """
    return primitive.name not in ("all_gather", "pvary")


def on_every_device(name: str, weight: jax.Array) -> jax.Array:
    """A weight of this device's experts as it is used: gathered over fsdp; marked as varying.

    The gradient is scattered over fsdp and summed over the axes that have the same experts. The
    output's bias counts once, not once for each part of the hidden dim.
    """
    if "model" in EXPERT_AXES[name] and jax.lax.axis_size("fsdp") > 1:
        dim = EXPERT_AXES[name].index("model")
        weight = jax.lax.all_gather(weight, "fsdp", axis=dim, tiled=True)
    weight = vary(weight, EXPERT_AXES[name])
    if name == "bo" and jax.lax.axis_size("tensor") > 1:
        weight *= (jax.lax.axis_index("tensor") == 0).astype(weight.dtype)
    return weight


def _ragged(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    axes: tuple[str, ...],
    num_chunks: int,
) -> jax.Array:
    """The tokens of one device, in chunks, through `through_ragged_exchange`."""
    groups, tokens, model_dim = x_GSM.shape
    num_choices = assignment.kept_GSK.shape[-1]
    num_own = next(iter(weights.values())).shape[0]
    choices = (assignment.expert_index_GSK, assignment.gate_GSK, assignment.kept_GSK)
    rows = [x_GSM.reshape(-1, model_dim), *(value.reshape(-1, num_choices) for value in choices)]
    outputs = []
    chunks = zip(*(jnp.array_split(value, num_chunks) for value in rows), strict=True)
    for i, (x_JM, expert_JK, gate_JK, kept_JK) in enumerate(chunks):
        max_rows = most_received_rows(
            tokens=len(x_JM),
            num_choices=num_choices,
            num_own=num_own,
            num_devices=assignment.num_experts // num_own,
            slots=groups * assignment.capacity,
        )
        key = rng if rng is None or i == 0 else jax.random.fold_in(rng, i)
        y_JM = through_ragged_exchange(
            x_JM, expert_JK, gate_JK, kept_JK, weights, experts, key, axes=axes, max_rows=max_rows
        )
        outputs.append(y_JM)
    return jnp.concatenate(outputs).reshape(groups, tokens, model_dim)


def check_even(what: str, count: int, shards: int) -> None:
    """Raises `ValueError` unless a mesh splits something evenly."""
    if count % shards:
        raise ValueError(
            f"The mesh splits {what} evenly: {count} over {shards} devices. Change config.mesh, "
            "training.batch_size or moe.num_experts."
        )
