"""The cost of a study's arms: active FLOPs per token, and a check that they match."""

import dataclasses
import functools

from experiments.study import Study
from moe_jax.config.check import require
from moe_jax.models.model import LanguageModel
from moe_jax.planning.arithmetic import count_flops, count_parameters


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one arm.

    Attributes:
      active: forward FLOPs per token that the mathematics needs, router included.
      computed: forward FLOPs per token with padded slots and dispatch contractions; matched in a
        budget.
      slots: expert slots per token of an MoE layer in training, the largest of all parts; 0 for a
        dense arm, None without a limit.
      total_parameters: number of all parameters.
      active_parameters: number of parameters that a token uses.
    """

    active: float
    computed: float
    slots: float | None
    total_parameters: int
    active_parameters: int


@functools.cache
def cost_of(study: Study, size: str, arm: str) -> Cost:
    """Counts the cost of an arm from its config."""
    config = study.experiment(size, arm, 0)
    model, length = config.model, config.data.sequence_length
    flops, parameters = count_flops(model, length), count_parameters(model, length)
    return Cost(
        active=flops.model,
        computed=flops.computed,
        slots=slots_of_a_token(model, length),
        total_parameters=parameters.total,
        active_parameters=parameters.active,
    )


def slots_of_a_token(model: LanguageModel, length: int) -> float | None:
    """Training slots of all experts per token that shares them, E C / S; see `Cost`."""
    slots = [0.0]
    for moe in model.moe_parts.values():
        if moe.capacity_factor(training=True) == 0:
            return None
        group = moe.group_size or length
        slots.append(moe.num_experts * moe.options(group, training=True).slots / group)
    return max(slots)


def check_budget(study: Study, size: str) -> None:
    """Refuses to compare arms of unequal cost.

    Raises:
      ValueError: the computed FLOPs of two arms of one budget differ by more than the tolerance.
    """
    for budget in dict.fromkeys(arm.budget for arm in study.arms_at(size)):
        costs = {
            arm.name: cost_of(study, size, arm.name).computed
            for arm in study.arms_at(size)
            if arm.budget == budget
        }
        least, most = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
        apart = costs[most] / costs[least] - 1
        require(
            apart <= study.tolerance,
            f"arms of one budget have equal active FLOPs per token within {study.tolerance:.1%}, "
            "padding and dispatch included",
            f"{study.name} ({size}), budget {budget!r}: {most} {costs[most]:,.0f}, "
            f"{least} {costs[least]:,.0f}, {apart:.1%} more",
            "Change the widths of the arms, or give one a budget of its own",
        )
