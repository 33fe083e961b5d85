"""The kernels that the library offers, read from its settings: new ones are measured too."""

import dataclasses

from benchmarks.accelerator.child import message_of
from moe_jax.layers.attention import Attention
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts.plan import plan_experts

DENSE = "dense"  # asked for by name only: every row by every expert
WHOLE = ("loop",)  # computes whole experts, one after another


def choices(settings: type, field: str) -> list[str]:
    """The values that a setting may have, without "auto"."""
    [setting] = [one for one in dataclasses.fields(settings) if one.name == field]
    return [name for name in setting.metadata["bounds"].choices if name != "auto"]


def grouped_kernels() -> dict[str, str]:
    """The kernels of `ragged`, and why one cannot run here; "" if it can."""
    return {name: refusal(name) for name in choices(MoE, "grouped_matmul")}


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
    """Names of the kernels of attention."""
    return choices(Attention, "kernel")


def with_kernel(moe: MoE, kernel: str) -> MoE:
    """The block with a kernel for its sorted rows; "" for a way that sorts none."""
    return dataclasses.replace(moe, grouped_matmul=kernel or "auto")


def ragged(kernel: str) -> str:
    """How a row calls the way ragged with a kernel."""
    return f"ragged {kernel}"
