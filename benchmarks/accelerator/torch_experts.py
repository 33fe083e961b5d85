"""The same three products by `torch._grouped_mm` on a GPU: only products, and as in transformers.

PyTorch has its own process, in which JAX does not start. Rows are timed in turn with
`torch.matmul`.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks.accelerator.clock import MATMUL, Timed, rate_against
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.shapes import ROUTINGS, SHAPES, TINY, Shape, group_sizes

PLAIN, FUSED = "three products", "gate and inner product in one (transformers)"


def rows(dry: bool) -> list[Row]:
    """The rows; [] if PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return []
    return [
        Row(f"{name}/{routing}/{form}", 4, functools.partial(measure, shape, routing, form, dry),
            first=routing == "even")
        for routing in ROUTINGS
        for name, shape in (TINY if dry else SHAPES).items()
        for form in (FUSED, PLAIN)
    ]  # fmt: skip


def measure(shape: Shape, routing: str, form: str, dry: bool) -> dict[str, Any]:
    """Times one form, forward and backward, alternating with the matmul."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not dry:
        raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU")
    torch.manual_seed(0)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call = experts(shape, routing, form, device)
    call()
    wait()
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0
    size = 128 if dry else MATMUL
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    timed, bar = (Timed(one, lambda _: wait()) for one in (call, lambda: torch.matmul(a, b)))
    found = rate_against(timed, shape.flops(shape.rows), bar, 2.0 * size**3, dry)
    return {**found, "rows": shape.rows, "program_mb": round(peak, 1), "torch": torch.__version__}


def experts(shape: Shape, routing: str, form: str, device: str) -> Callable[[], Any]:
    """Forward and backward of the experts, on random rows and weights."""
    import torch

    def draw(*size: int, stddev: float = 1.0) -> Any:  # weights are [E, out, in], as in PyTorch
        values = torch.randn(*size, device=device, dtype=torch.bfloat16) * stddev
        return values.requires_grad_()

    experts, model, hidden = shape.experts, shape.model_dim, shape.expert_dim
    ends = torch.tensor(group_sizes(shape, routing), device=device).cumsum(0).to(torch.int32)
    x, dy = draw(shape.rows, model), draw(shape.rows, model).detach()
    wo = draw(experts, model, hidden, stddev=0.02)
    if form == FUSED:
        inward = [draw(experts, 2 * hidden, model, stddev=0.02)]
    else:
        inward = [draw(experts, hidden, model, stddev=0.02) for _ in range(2)]
    product = grouped_product()

    def run() -> Any:
        for leaf in (x, wo, *inward):
            leaf.grad = None
        outs = [product(x, weight, ends) for weight in inward]
        gate, inner = outs if len(outs) == 2 else outs[0].chunk(2, dim=-1)
        y = product(torch.nn.functional.silu(gate) * inner, wo, ends)
        y.backward(dy)
        return y

    return run


def grouped_product() -> Callable[..., Any]:
    """The grouped product [R, I] x [E, O, I], under its public name or its older name."""
    import torch

    public = getattr(torch.nn.functional, "grouped_mm", None)
    product = public or torch._grouped_mm
    return lambda x, weight, ends: product(x, weight.transpose(-2, -1), offs=ends)
