"""The kernels that the library offers, read from its settings: new ones are measured too."""

import dataclasses
from typing import Any

from benchmarks.accelerator.child import message_of
from moe_jax.layers.attention import Attention
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts.plan import plan_experts
from moe_jax.moe.run_experts.rows import SortedRows

GROUPED = "grouped_matmul"  # the setting of `MoE` that names a kernel
DENSE = "dense"  # asked for by name only: every row by every expert
WHOLE = ("loop",)  # computes whole experts, one after another


def choices(settings: type, field: str) -> list[str]:
    """The values that a setting may have, without "auto"; none if there is no such setting."""
    for one in dataclasses.fields(settings):
        if one.name == field:
            return [name for name in one.metadata["bounds"].choices if name != "auto"]
    return []


def grouped_kernels() -> dict[str, str]:
    """The kernels of `ragged`, and why one cannot run here; "" if it can.

    The name "" stands for the only one of a library without a choice.
    """
    return {name: refusal(name) for name in choices(MoE, GROUPED) or [""]}


def refusal(kernel: str) -> str:
    """Why a kernel cannot run here, as the library or JAX says it; "" if it can."""
    try:
        plan_experts(with_kernel(MoE(run_experts="ragged"), kernel))
    except Exception as error:
        return message_of(error)
    return ""


def usable_kernels(of_products: bool = False, dense: bool = True) -> list[str]:
    """Those that can run here.

    Args:
      of_products: without those that compute whole experts, which have no product of their own.
      dense: with the one that multiplies every row with every expert.
    """
    left_out = (WHOLE if of_products else ()) + (() if dense else (DENSE,))
    return [name for name, why in grouped_kernels().items() if not why and name not in left_out]


def attention_kernels() -> list[str]:
    """Names of the kernels of attention; "xla" is the only one of a library without a choice."""
    return choices(Attention, "kernel") or ["xla"]


def with_kernel(moe: MoE, kernel: str) -> MoE:
    """The block with a kernel for its sorted rows."""
    changes: dict[str, Any] = {GROUPED: kernel} if kernel else {}
    return dataclasses.replace(moe, **changes)


def ragged(kernel: str) -> str:
    """How a row calls the way ragged with a kernel."""
    return f"ragged {kernel}".strip()


def sorted_rows(kernel: str, rows_E: Any, num_rows: int) -> SortedRows:
    """The layout of rows sorted by expert, with a kernel."""
    return SortedRows(None, rows_E, num_rows, *filter(None, [kernel]))
