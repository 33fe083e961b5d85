"""How the experts of a block run: chosen for the mesh and the platform in use."""

import dataclasses
from typing import TYPE_CHECKING

from moe_jax.moe.run_experts.exchange import ByConstraint
from moe_jax.moe.run_experts.grouped_matmul import best_kernel, choose_kernel, target_in_use
from moe_jax.parallel.rules import mesh_in_use

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

IMPLEMENTATIONS = ("auto", "einsum", "gather", "ragged")
EXCHANGES = ("auto", "compiler", "explicit")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the experts of a block run.

    >>> print(Plan("gather", "explicit", num_chunks=2))
    gather rows, exchanged by explicit collectives in 2 chunks

    Attributes:
      rows: "einsum", "gather" or "ragged".
      exchange: "none" on one device, "compiler" or "explicit" on a mesh.
      num_chunks: chunks in which rows are exchanged.
      gate_on_input: whether gates multiply the experts' inputs.
      buffer_factor: room for received rows over their mean; 0: room for the worst case.
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
        """The exchange of slots by the compiler; on one device it does nothing."""
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


def implementation_of(moe: "MoE", training: bool = True, dropless: bool | None = None) -> str:
    """`Plan.rows` of a block for the mesh and the platform in use.

    On one CPU, "auto" is ragged, which is a loop there and the fastest. Elsewhere it is what has
    the fewest FLOPs and bytes (docs/parallelism.md): gather with a capacity, and ragged without,
    since dropless slots are E / K times the rows.

    Args:
      moe: the settings.
      training: whether this is a training pass.
      dropless: whether every choice is kept; None: by the settings.
    """
    if moe.run_experts != "auto":
        return moe.run_experts
    if dropless is None:
        dropless = moe.capacity_factor(training) == 0
    return "ragged" if prefers_sorted_rows(moe, dropless) else "gather"


def exchange_of(moe: "MoE", rows: str) -> str:
    """`Plan.exchange` of a block for the mesh in use.

    The compiler's exchange overlaps more. But if experts span slices, it sends whole slots between
    slices, not slice by slice; then "auto" is explicit. Sorted rows have no other.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return "none"
    if rows == "ragged":
        return "explicit"
    if moe.exchange != "auto":
        return moe.exchange
    return "explicit" if mesh.shape.get("expert_slice", 1) > 1 else "compiler"


def plan_experts(moe: "MoE", training: bool = True, dropless: bool | None = None) -> Plan:
    """The plan of a block for the mesh and platform in use; arguments as in `implementation_of`.

    Raises:
      ValueError: there is no kernel for sorted rows on the platform (`choose_kernel`).
    """
    rows = implementation_of(moe, training, dropless)
    exchange = exchange_of(moe, rows)
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
    """Whether "auto" means ragged rather than gather; see `implementation_of`."""
    target = target_in_use()
    if target.platform == "cpu":
        return mesh_in_use() is None
    has_kernel = moe.grouped_matmul != "auto" or best_kernel(target) is not None
    return dropless and has_kernel and moe.exchange != "compiler"
