"""Running experts: rows are moved to them, computed, and combined by token (legend: `moe_jax.moe`).

A `Plan` says how. Its ways agree in value and in every gradient:

  einsum  one-hot tensors of shape GSEC, contracted; the reference. Costs 4 * G*S * S*K*factor * M
          FLOPs on top of the experts: it grows with the group.
  gather  indices into E x C slots; no GSEC tensor.
  ragged  rows sorted by expert; computes kept choices only, without padding.

On a mesh, rows travel between devices by one of two exchanges:

  compiler  arrays are those of all devices, constraints say where they lie, and the
            compiler inserts the all-to-all. einsum and gather.
  explicit  one program for each device, with the collectives written out. All.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.routing import Mixing
from moe_jax.moe.run_experts.exchange import ByConstraint
from moe_jax.moe.run_experts.gathered import Gathered
from moe_jax.moe.run_experts.grouped_matmul import (
    KERNELS,
    best_kernel,
    choose_kernel,
    target_in_use,
)
from moe_jax.moe.run_experts.parallel import SLOT_WAYS, Combined, run_parallel
from moe_jax.moe.run_experts.rows import run_sorted_rows
from moe_jax.moe.run_experts.slots import mix_slots
from moe_jax.parallel.rules import mesh_in_use, num_shards
from moe_jax.parameters import Axes

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

WAYS = ("auto", "einsum", "gather", "ragged")
EXCHANGES = ("auto", "compiler", "explicit")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the experts of a block run.

    >>> print(Plan("gather", "explicit", num_chunks=2))
    gather rows, exchanged by explicit collectives in 2 chunks

    Attributes:
      rows: "einsum", "gather" or "ragged".
      exchange: "none" on one device, "compiler" or "explicit" on a mesh.
      num_chunks: in how many parts rows travel.
      gate_on_input: whether gates multiply what experts get.
      buffer_factor: room for received rows over their mean; 0: for the worst case.
      kernel: of `grouped_matmul`, for ragged rows; else "".
    """

    rows: str
    exchange: str = "none"
    num_chunks: int = 1
    gate_on_input: bool = False
    buffer_factor: float = 0.0
    kernel: str = ""

    @property
    def by_constraint(self) -> ByConstraint:
        """How slots travel where the compiler exchanges them; on one device, nowhere."""
        return ByConstraint(1 if self.exchange == "none" else self.num_chunks)

    def __str__(self) -> str:
        """One line."""
        by = {"none": "", "compiler": ", exchanged by the compiler",
              "explicit": ", exchanged by explicit collectives"}[self.exchange]  # fmt: skip
        chunks = f" in {self.num_chunks} chunks" if self.num_chunks > 1 and by else ""
        gates = ", gates on the input" if self.gate_on_input else ""
        buffer = f", buffer of {self.buffer_factor:g} times the mean" if self.buffer_factor else ""
        kernel = f" by {self.kernel}" if self.kernel else ""
        return f"{self.rows} rows{kernel}{by}{chunks}{gates}{buffer}"


def way_of(moe: "MoE", training: bool = True, dropless: bool | None = None) -> tuple[str, str]:
    """`Plan.rows` and `Plan.exchange` of a block for the mesh and the platform in use.

    "auto" is the fastest way on one CPU, where ragged is a loop. Elsewhere it is the way of fewest
    FLOPs and bytes (docs/parallelism.md): gather with a capacity, and ragged without, since slots
    that drop nothing are E / K times the rows. The compiler's exchange overlaps more. If experts
    span slices, though, it sends whole slots between slices, and not slice by slice.

    Args:
      moe: the settings.
      training: whether this is a training pass.
      dropless: whether every choice is kept; None: as the settings say.
    """
    mesh, rows, exchange = mesh_in_use(), moe.run_experts, moe.exchange
    if rows == "auto":
        if dropless is None:
            dropless = moe.capacity_factor(training) == 0
        rows = "ragged" if prefers_sorted_rows(moe, dropless) else "gather"
    if mesh is None:
        exchange = "none"
    elif rows == "ragged":
        exchange = "explicit"
    elif exchange == "auto":
        spans_slices = mesh.shape.get("expert_slice", 1) > 1
        exchange = "explicit" if spans_slices else "compiler"
    return rows, exchange


def plan_experts(moe: "MoE", training: bool = True, dropless: bool | None = None) -> Plan:
    """The plan of a block for the mesh and the platform in use; arguments as in `way_of`.

    Raises:
      ValueError: there is no kernel for sorted rows on the platform (`choose_kernel`).
    """
    rows, exchange = way_of(moe, training, dropless)
    factor = moe.buffer_factor if training else moe.eval_buffer_factor
    has_buffer = rows == "ragged" and exchange == "explicit"
    return Plan(
        rows,
        exchange,
        moe.exchange_chunks,
        moe.gate_on_input,
        buffer_factor=factor if has_buffer else 0.0,
        kernel=choose_kernel(moe.grouped_matmul, target_in_use()) if rows == "ragged" else "",
    )


def prefers_sorted_rows(moe: "MoE", dropless: bool) -> bool:
    """Whether "auto" is ragged rather than gather: see `way_of`."""
    target = target_in_use()
    if target.platform == "cpu":
        return mesh_in_use() is None
    has_kernel = moe.grouped_matmul != "auto" or best_kernel(target) is not None
    return dropless and has_kernel and moe.exchange != "compiler"


def run_experts(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    axes: Mapping[str, Axes],
    experts: Experts,
    plan: Plan,
    rng: jax.Array | None = None,
) -> Combined:
    """Carries every kept choice to its expert and back, and adds up the outputs by token.

    All ways below have these arguments, and return [G, S, M] in the dtype of `x_GSM`: the gated sum
    over a token's kept choices. Their docstrings say what differs.

    Args:
      x_GSM: tokens, in the compute dtype.
      assignment: the kept choices, their slots and gates.
      weights: of the experts, by name, leading dim E; inside `jax.shard_map` those of this device.
      axes: names of the dims of each weight in `parallel.rules`, by name.
      experts: computes each row by itself, with the weights that the layout gives it.
      plan: how experts run.
      rng: random key of the experts, which the layout carries, or None.

    Returns:
      That sum, and which choices are in it.
    """
    if plan.gate_on_input:
        return gated_input(x_GSM, assignment, weights, axes, experts, plan, rng)
    if plan.exchange == "explicit":
        return run_parallel(
            x_GSM, assignment, weights, axes, experts, rng,
            rows=plan.rows, kernel=plan.kernel, num_chunks=plan.num_chunks,
            buffer_factor=plan.buffer_factor,
        )  # fmt: skip
    if plan.exchange == "compiler":
        weights = gathered_for(assignment.capacity, weights, axes, x_GSM)
    if plan.rows == "ragged":
        y_GSM = run_sorted_rows(x_GSM, assignment, weights, experts, rng, kernel=plan.kernel)
    else:
        way = SLOT_WAYS[plan.rows]
        y_GSM = way(x_GSM, assignment, weights, experts, rng, plan.by_constraint)
    return Combined(y_GSM, assignment.kept_GSK)


def mix_experts(
    x_GSM: jax.Array,
    mixing: Mixing,
    weights: Weights,
    axes: Mapping[str, Axes],
    experts: Experts,
    plan: Plan,
    rng: jax.Array | None = None,
) -> jax.Array:
    """`run_experts` where every token is in every slot, by its weight in `mixing`: [G, S, M]."""
    weights = gathered_for(mixing.dispatch_GSEC.shape[-1], weights, axes, x_GSM)
    return mix_slots(x_GSM, mixing, weights, experts, rng, plan.by_constraint)


def gathered_for(
    slots: int, weights: Weights, axes: Mapping[str, Axes], x_GSM: jax.Array
) -> Weights:
    """Marks weights to be all-gathered over fsdp, except where moving the few slots is cheaper.

    A matrix is about as many bytes as model_dim slots with their hidden units. Training and prompts
    have more slots than that among the devices that share a matrix, single steps of generation
    fewer: then a compiler may carry slots to the parts of matrices.

    Args:
      slots: C, of an expert in a group.
      weights: as in `run_experts`.
      axes: likewise.
      x_GSM: tokens.
    """
    mesh = mesh_in_use()
    if mesh is None or (num_parts := num_shards("model", mesh)) == 1:
        return weights
    groups, _, model_dim = x_GSM.shape
    if groups * num_parts // num_shards("expert_group", mesh) * slots < model_dim:
        return weights
    return {name: Gathered(weight, axes[name]) for name, weight in weights.items()}


def gated_input(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    axes: Mapping[str, Axes],
    experts: Experts,
    plan: Plan,
    rng: jax.Array | None,
) -> Combined:
    """`run_experts` with gates on the experts' input: each choice travels as a token of its own.

    Experts are not linear, so a gate on the input differs from one on the output. A group then has
    S * K tokens with one choice and gate 1. By einsum that costs K times the contractions.

    Source: Llama 4, as `Llama4TextMoe` of transformers has it: the sigmoid of the best logit times
      the token, through its expert, to which the shared expert's output is added.
    """
    groups, tokens, num_choices = assignment.gate_GSK.shape
    x_GSKM = (x_GSM[:, :, None] * assignment.gate_GSK[..., None]).astype(x_GSM.dtype)
    index_GA1, slot_GA1, kept_GA1 = (
        values_GSK.reshape(groups, tokens * num_choices, 1)
        for values_GSK in (assignment.expert_index_GSK, assignment.slot_GSK, assignment.kept_GSK)
    )
    one_by_one = assignment._replace(
        expert_index_GSK=index_GA1,
        gate_GSK=kept_GA1.astype(jnp.float32),
        slot_GSK=slot_GA1,
        kept_GSK=kept_GA1,
    )
    x_GAM = x_GSKM.reshape(groups, tokens * num_choices, -1)
    plan = dataclasses.replace(plan, gate_on_input=False)
    y_GAM, kept_GA1, buffer = run_experts(x_GAM, one_by_one, weights, axes, experts, plan, rng)
    y_GSM = jnp.sum(y_GAM.reshape(x_GSKM.shape), axis=2, dtype=jnp.float32).astype(x_GSM.dtype)
    return Combined(y_GSM, kept_GA1.reshape(assignment.kept_GSK.shape), buffer)


__all__ = [
    "EXCHANGES",
    "KERNELS",
    "WAYS",
    "Plan",
    "gathered_for",
    "mix_experts",
    "plan_experts",
    "run_experts",
    "way_of",
]
