"""Choices of experts that a block records or replays (legend: `moe_jax.moe`)."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.moe.routing import Choices, Options, Routing
from moe_jax.parallel.rules import constrain

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


def record_choices(
    routing: Routing, kept_GSK: jax.Array, valid_GS: jax.Array, batch_shape: tuple[int, int]
) -> Choices:
    """The choices of a block for every token: arrays [B, L, K]."""
    chosen_GSK = routing.chosen_GSK & valid_GS[..., None]
    gate_GSK = jnp.where(chosen_GSK, jax.lax.stop_gradient(routing.gate_GSK), 0)
    fields = (routing.expert_index_GSK, chosen_GSK, gate_GSK.astype(jnp.float32), kept_GSK)
    return Choices(*(field.reshape(*batch_shape, -1) for field in fields))


def replay_in_groups(
    choices: Choices | None,
    batch_shape: tuple[int, int],
    group_shape: tuple[int, ...],
    moe: "MoE",
    options: Options,
) -> Choices | None:
    """Reshapes choices [B, L, K] to [G, S, K] for a router; None stays None.

    Raises:
      ValueError: the router cannot replay, or the choices do not fit the batch.
    """
    if choices is None:
        return None
    require(
        moe.router.replays,
        "this router cannot replay choices",
        f"router={moe.router}",
        "Drop the replay",
    )
    expected = (*batch_shape, moe.router.num_choices(options))
    index, chosen = choices.expert_index, choices.chosen
    require(
        index.shape == expected == chosen.shape,
        "replayed choices must have the shape [batch, length, choices per token] in each MoE layer",
        f"expert_index {index.shape}, chosen {chosen.shape}, but the batch needs {expected}",
        "Record them with the same batch and model, and the same number of choices per token: "
        "num_selected_experts in training, in evaluation eval_num_selected_experts if it is set",
    )
    require(
        jnp.issubdtype(index.dtype, jnp.integer),
        "replayed choices must be integer indices of experts",
        f"expert_index is {index.dtype}",
        "Pass int32",
    )

    def in_groups(values: jax.Array) -> jax.Array:
        return constrain(values.reshape(*group_shape, -1), "group", None, None)

    return Choices(in_groups(index.astype(jnp.int32)), in_groups(chosen.astype(jnp.bool_)))
