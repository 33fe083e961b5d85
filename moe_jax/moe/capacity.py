"""Capacity: slots per expert in a group, and which choices get them (legend: `moe_jax.moe`)."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.moe.capacity_presets import preset_fields
from moe_jax.moe.queues import Queue, TokenMajor
from moe_jax.moe.routing import Options, Routing

ROUNDING: dict[str, Callable[[float], int]] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "nearest": round,
}


class Assignment(NamedTuple):
    """Which (token, choice) pairs reach their expert, and in which slot.

    Attributes:
      expert_index_GSK: int32 in [0, E).
      gate_GSK: the gate of a kept choice; exactly 0 for dropped choices and padding.
      slot_GSK: int32 in [0, C) for a kept choice; no two kept choices share expert, group and slot.
      kept_GSK: bool.
      capacity: C, a Python int.
      num_experts: E, a Python int.
    """

    expert_index_GSK: jax.Array
    gate_GSK: jax.Array
    slot_GSK: jax.Array
    kept_GSK: jax.Array
    capacity: int
    num_experts: int


@dataclasses.dataclass(frozen=True)
class Capacity(Settings):
    """The number of slots per expert in a group, and the order in which choices get them."""

    train_factor: float = setting(1.25, at_least=0)  # slots over mean load in training; 0: dropless
    eval_factor: float = setting(
        2.0, at_least=0
    )  # in capacity-limited evaluation, if tokens choose
    slots: int = setting(0, at_least=0)  # this number instead of a factor's; 0: by the factor
    preset: str = ""  # a system's rule and queue, from `capacity_presets`; "": the fields below
    per: str = setting("assignment", choices=("assignment", "token", "choice"))  # see `num_slots`
    rounding: str = setting("ceil", choices=tuple(ROUNDING))  # of the product; "nearest": to even
    round_mean_up: bool = False  # round the mean load up before the factor is applied (MaxText)
    multiple_of: int = setting(1, at_least=1)  # then round up to a multiple of this
    minimum: int = setting(1, at_least=1)  # fewest slots
    queue: Queue = TokenMajor()  # which choices get slots first

    def check(self) -> None:
        """See `Settings`; fills in a preset."""
        for name, value in preset_fields(self, self.preset).items():
            object.__setattr__(self, name, value)
        require(
            not self.queue.needs_rng or self.eval_factor == 0,
            "a random queue needs a random key, and an evaluation has none",
            f"queue={self.queue}, eval_factor={self.eval_factor}",
            "Set capacity.eval_factor=0: dropless evaluation only",
        )
        ignored = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in ("slots", "queue") and getattr(self, field.name) != field.default
            if field.name != "eval_factor" or self.eval_factor > 0  # dropless evaluation
        ]
        require(
            self.slots == 0 or not ignored,
            "slots replaces the capacity factors and their rounding, which must stay at their "
            "defaults",
            f"slots={self.slots}, {', '.join(ignored)}",
            "Leave these at their defaults, or set slots=0",
        )

    def num_slots(self, tokens: int, num_options: int, num_selected: int, factor: float) -> int:
        """The slots of one expert in a group.

        Args:
          tokens: S, tokens of the group.
          num_options: E, including zero-computation experts.
          num_selected: K.
          factor: capacity factor; 0 means dropless, which S slots guarantee.

        Returns:
          C >= 1: the product of factor and mean load, rounded, unless `slots` is set. The mean load
          counts K * tokens (`per="assignment"`) or tokens ("token"). "choice" rounds the product
          for one choice, and multiplies it by K. C is at most S rounded up to `multiple_of`: more
          could never be filled.
        """
        multiple = self.multiple_of
        enough = -(-tokens // multiple) * multiple
        if factor == 0:
            return enough
        if self.slots:
            return min(self.slots, enough)
        mean_load = tokens * (num_selected if self.per == "assignment" else 1) / num_options
        if self.round_mean_up:
            mean_load = math.ceil(mean_load)
        # The product is rounded to 9 decimals first: 100 * 1.1 is 110, not 110.00000000000001.
        slots = ROUNDING[self.rounding](round(mean_load * factor, 9))
        slots *= num_selected if self.per == "choice" else 1
        slots = -(-slots // multiple) * multiple
        return min(max(slots, self.minimum), enough)


def assign_slots(
    routing: Routing,
    queue: Queue,
    options: Options,
    valid_GS: jax.Array | None = None,
    rng: jax.Array | None = None,
) -> Assignment:
    """Assigns the slots of each expert to the choices of a group, first come, first served.

    Args:
      routing: the choices of experts that compute.
      queue: the order of service.
      options: `slots` is the capacity; if `dropless`, every valid choice is kept.
      valid_GS: bool, False for padding, which takes no slot; None: all tokens are valid.
      rng: key for a random queue.

    Returns:
      The `Assignment`. A dropped choice has gate 0, and the other gates do not change. A choice
      that does not count (`Routing.chosen_GSK`) is treated like padding.
    """
    num_experts = routing.probs_GSE.shape[-1]
    counts_GSK = routing.chosen_GSK
    if valid_GS is not None:
        counts_GSK &= valid_GS[..., None]
    # Index E is no expert: its one-hot row is zero.
    expert_index_GSK = jnp.where(counts_GSK, routing.expert_index_GSK, num_experts)
    queue = TokenMajor() if options.dropless else queue
    slot_GSK = queue.slots(routing, expert_index_GSK, rng)
    kept_GSK = counts_GSK if options.dropless else counts_GSK & (slot_GSK < options.slots)
    gate_GSK = jnp.where(kept_GSK, routing.gate_GSK, 0)
    return Assignment(
        routing.expert_index_GSK, gate_GSK, slot_GSK, kept_GSK, options.slots, num_experts
    )
