"""The kernels of the library, read from its settings, so that new kernels are measured too."""

import dataclasses

from benchmarks.accelerator.child import message_of
from moe_jax.layers.attention import Attention
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts.plan import plan_experts

DENSE = "dense"  # used only if named: every row by every expert
WHOLE = ("loop",)  # kernels that compute whole experts, one after another


def choices(settings: type, field: str) -> list[str]:
    """The allowed values of a setting, except "auto"."""
    [setting] = [one for one in dataclasses.fields(settings) if one.name == field]
    return [name for name in setting.metadata["bounds"].choices if name != "auto"]


def grouped_kernels() -> dict[str, str]:
    """The kernels of `ragged`, each with the reason that it cannot run here; "" if it can."""
    return {name: refusal(name) for name in choices(MoE, "grouped_matmul")}


def refusal(kernel: str) -> str:
    """The error of the library or JAX if a kernel cannot run here; "" if it can."""
    try:
        plan_experts(with_kernel(MoE(run_experts="ragged"), kernel))
    except Exception as error:
        return message_of(error)
    return ""


def usable_kernels(of_products: bool = False, dense: bool = True) -> list[str]:
    """The kernels that can run here.

    Args:
      of_products: whether to leave out kernels that compute whole experts.
      dense: whether to include the kernel that multiplies every row with every expert.
    """
    left_out = (WHOLE if of_products else ()) + (() if dense else (DENSE,))
    return [name for name, why in grouped_kernels().items() if not why and name not in left_out]


def attention_kernels() -> list[str]:
    """Names of the kernels of attention."""
    return choices(Attention, "kernel")


def with_kernel(moe: MoE, kernel: str) -> MoE:
    """The block with a kernel for sorted rows; "" for a way that does not sort rows."""
    return dataclasses.replace(moe, grouped_matmul=kernel or "auto")


def ragged(kernel: str) -> str:
    """The name in rows of the way ragged with a kernel."""
    return f"ragged {kernel}"
