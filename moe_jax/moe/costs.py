"""The costs of an MoE block, including unfilled slots (legend: `moe_jax.moe`).

Costs are formulas, since a trace does not know how many choices count, and counts loops over sorted
rows only once.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moe_jax.costs import FLOAT32, Bytes, Cost, Saving, ffn_cost
from moe_jax.moe.routing import Options
from moe_jax.moe.run_experts.buffer import most_received_rows
from moe_jax.moe.run_experts.plan import implementation_of
from moe_jax.parallel.rules import mesh_in_use, num_shards
from moe_jax.part import Dims

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

ROOMY = 1.5  # the buffer factor that `moe_savings` proposes for sorted rows


def moe_costs(moe: "MoE", dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
    """Costs of the router, moving rows, the experts and the shared expert; see `Part`."""
    width, itemsize = dims.model_dim, jnp.dtype(dtype).itemsize
    stages = [router_cost(moe, dims), moving_cost(moe, width, length, itemsize)]
    stages.append(experts_cost(moe, dims, length, itemsize))
    if moe.shared_expert_dim > 0:
        gated = moe.activation.gated
        stages.append(ffn_cost(width, moe.shared_expert_dim, gated=gated, itemsize=itemsize))
    return tuple(stages)


def router_cost(moe: "MoE", dims: Dims) -> Cost:
    """The products of the router in float32; these and the probabilities are saved.

    There is one probability per option. Routers that mix tokens have two per slot.
    """
    flops, outputs = router_products(moe, dims)
    probabilities = moe.num_options if outputs else 0
    if moe.router.mixes:
        probabilities = 2 * outputs
    return Cost(
        "routing",
        flops=flops,
        saved=Bytes(FLOAT32 * (outputs + probabilities)),
        saved_dots=Bytes(FLOAT32 * outputs),
    )


def router_products(moe: "MoE", dims: Dims) -> tuple[float, int]:
    """FLOPs per token in the router, and the number of outputs per token.

    Every matrix of the router multiplies a token, including those of noise, a projection and a
    predictor. In Soft MoE it has one column per slot.
    """
    specs = jax.tree.leaves(moe.specs(dims).get("router", {}))
    shapes = [spec.shape for spec in specs if len(spec.shape) == 2]
    return sum(2.0 * inward * outward for inward, outward in shapes), sum(o for _, o in shapes)


def moving_cost(moe: "MoE", width: int, length: int, itemsize: int) -> Cost:
    """The cost of moving rows to their experts and back.

    For routers that mix tokens in slots, the contractions are not dispatch but part of the model.
    Slots are written and read, twice; by index, outputs are read choice by choice. With gates on
    the input every choice is a token, and one-hot tensors have entries for each.
    """
    options, rows = training_options(moe, length), expert_rows(moe, length)
    choices = moe.router.num_choices(options)
    entries = moe.num_experts * options.slots
    copies = choices if moe.gate_on_input else 1
    contractions = 2 * 2 * entries * width
    by_contraction = is_by_contraction(moe)
    traffic = width + router_products(moe, Dims(width))[1] + 4 * rows * width
    if by_contraction:
        traffic += 2 * entries * copies + 2 * width
    else:
        traffic += max(choices - rows, 0) * width
    buffers = 2 * entries * copies * by_contraction + copies * width * moe.gate_on_input
    # Sorted rows have one place per choice before the exchange, and those of the buffer after it.
    slots = memory_rows(moe, length)
    slots = (choices + slots) / 2 if is_sorted(moe) else slots
    return Cost(
        "routing",
        flops=contractions if moe.router.mixes else 0,
        dispatch=contractions * copies if by_contraction and not moe.router.mixes else 0,
        batched=True,
        traffic=Bytes(traffic * itemsize),
        exchanged=rows * width * itemsize,
        returned_again=reads_outputs(moe),
        slots=slots * width * itemsize,
        buffers=buffers * itemsize,
    )


def experts_cost(moe: "MoE", dims: Dims, length: int, itemsize: int) -> Cost:
    """The routed experts. Saved: rows in, outputs if needed, and what is between the matrices."""
    width, specs = dims.model_dim, moe.expert_specs(dims)
    rows, used, in_memory = (f(moe, length) for f in (expert_rows, mean_experts, memory_rows))
    matrices = [spec for spec in specs.values() if len(spec.shape) == 3]
    flops = sum(2.0 * inward * outward for _, inward, outward in (m.shape for m in matrices))
    sides = [side for m in matrices for side in zip(m.axes[1:], m.shape[1:], strict=True)]
    inner = [(axis, size) for axis, size in sides if axis != "model"]
    return Cost(
        "experts",
        flops=used * flops,
        padding=(rows - used) * flops,
        batched=True,
        saved=features([*inner, ("model", (1 + reads_outputs(moe)) * width)]).times(
            in_memory * itemsize
        ),
        largest=features([max(inner, key=lambda side: side[1], default=("model", width))]).times(
            in_memory * itemsize
        ),
        traffic=features(sides).times(rows * itemsize),
        sums=rows * width * itemsize,
        inactive=sum(spec.size for spec in specs.values()) * (1 - used / moe.num_experts),
    )


def features(sides: list[tuple[str | None, int]]) -> Bytes:
    """Features per row at sides of matrices; those of the hidden dim are split over `tensor`."""
    split = sum(size for axis, size in sides if axis == "hidden")
    return Bytes(sum(size for _, size in sides) - split, split)


def training_options(moe: "MoE", length: int) -> Options:
    """The options of the router in training."""
    return moe.options(moe.group_size or length, training=True)


def slots_of_a_token(moe: "MoE", length: int) -> float:
    """Slots of all experts per token in training: E C / S."""
    slots = moe.num_experts * training_options(moe, length).slots
    return slots / (moe.group_size or length)


def expert_rows(moe: "MoE", length: int) -> float:
    """Rows per token that experts compute in training.

    These are all slots, filled or not. With sorted rows ("ragged") they are the kept choices, at
    most as many as the slots.
    """
    slots = slots_of_a_token(moe, length)
    return min(slots, mean_experts(moe, length)) if is_sorted(moe) else slots


def reads_outputs(moe: "MoE") -> bool:
    """Whether the gradient of the gates needs the outputs of experts."""
    return is_by_contraction(moe) or moe.experts.gates_outputs


def is_by_contraction(moe: "MoE") -> bool:
    """Whether rows are moved by contractions with [G, S, E, C] tensors."""
    return implementation_of(moe) == "einsum" or moe.router.mixes


def is_sorted(moe: "MoE") -> bool:
    """Whether experts compute sorted rows; a router that mixes tokens always has slots."""
    return implementation_of(moe) == "ragged" and not moe.router.mixes


def memory_rows(moe: "MoE", length: int) -> float:
    """Rows per token that take memory; with sorted rows, one per choice.

    On a mesh that splits the experts these are the rows of a device's receive buffer.
    """
    if not is_sorted(moe):
        return expert_rows(moe, length)
    choices, mesh = moe.router.num_choices(training_options(moe, length)), mesh_in_use()
    shards = num_shards("expert", mesh) if mesh is not None else 1
    if shards == 1:
        return choices
    worst = most_rows(moe, length, shards)
    return min(worst, moe.buffer_factor * choices) if moe.buffer_factor else worst


def most_rows(moe: "MoE", length: int, shards: int) -> float:
    """`most_received_rows` per token, with experts split over `shards` devices."""
    options, tokens = training_options(moe, length), moe.group_size or length
    choices = moe.router.num_choices(options)
    # With gates on the input every choice is a token of its own.
    copies, choices = (choices, 1) if moe.gate_on_input else (1, choices)
    own = moe.num_experts // shards
    return most_received_rows(tokens * copies, choices, own, shards, options.slots) / tokens


def mean_experts(moe: "MoE", length: int) -> float:
    """Mean number of experts that compute a token in training, excluding padding.

    Zero and copy experts take their share of the choices of `Router.mean_experts`, assuming even
    loads. They take none where experts fill their slots.
    """
    options = training_options(moe, length)
    choices = moe.router.mean_experts(options, moe.group_size or length)
    if moe.router.fills_slots(training=True):
        return choices
    return choices * moe.num_experts / moe.num_options


def moe_savings(moe: "MoE") -> Iterator[Saving]:
    """Fewer slots, no one-hot tensors, and a smaller buffer of rows; see `Part.savings`."""
    if moe.capacity.train_factor > 1:
        yield Saving({"capacity.train_factor": 1.0}, "drops more tokens", False)
    if moe.run_experts == "einsum":
        yield Saving({"run_experts": "gather"}, "reads and writes rows by index", True)
    if moe.run_experts == "ragged" and moe.buffer_factor == 0:
        bounded = {"buffer_factor": ROOMY, "stop_at_overflow": True}
        costs = f"stops where a device gets more than {ROOMY} times the mean of rows"
        yield Saving(bounded, costs, True)
