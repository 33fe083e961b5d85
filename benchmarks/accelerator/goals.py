"""What was wanted before anything ran, and whether a card reaches it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.accelerator.record import MEASURED

Rows = Mapping[tuple[str, str], dict[str, Any]]
EXPERTS_GOALS = {"mixtral_E8": 0.60, "fine_E64": 0.45}
MFU_GOAL = 0.40
DENSE = "ragged dense"  # asked for by name only: no kernel


class Goal(NamedTuple):
    """A goal.

    Attributes:
      text: what is wanted.
      reached: from the rows of a card to a number in words and whether that is enough; None where
        the rows for it are missing.
    """

    text: str
    reached: Callable[[Rows], tuple[str, bool] | None]

    def verdict(self, rows: Rows) -> str:
        """In a word or two, pass or fail with the number, or that it was not measured."""
        found = self.reached(rows)
        if found is None:
            return "not measured"
        words, is_enough = found
        return f"{'pass' if is_enough else '**fail**'}: {words}"


def of_group(rows: Rows, group: str, prefix: str) -> dict[str, dict[str, Any]]:
    """The measured rows of a group whose names begin so, without that."""
    return {
        name.removeprefix(prefix): line
        for (own, name), line in rows.items()
        if own == group and name.startswith(prefix) and line["state"] == MEASURED
    }


def best_ragged(rows: Rows, shape: str) -> tuple[str, dict[str, Any]] | None:
    """The fastest kernel for sorted rows on a shape with even loads, and its row."""
    forms = of_group(rows, "experts", f"{shape}/even/")
    kernels = {
        name: line for name, line in forms.items() if name.startswith("ragged") and name != DENSE
    }
    return min(kernels.items(), key=lambda item: item[1]["ms"]) if kernels else None


def share_of(shape: str, wanted: float) -> Callable[[Rows], tuple[str, bool] | None]:
    """Whether the experts of a shape reach a share of the matmul rate."""

    def reached(rows: Rows) -> tuple[str, bool] | None:
        best = best_ragged(rows, shape)
        if best is None:
            return None
        name, line = best
        return f"{line['share']:.0%} by {name}", line["share"] >= wanted

    return reached


def ahead_of_torch(shape: str) -> Callable[[Rows], tuple[str, bool] | None]:
    """Whether the experts of a shape are faster than the faster form of PyTorch."""

    def reached(rows: Rows) -> tuple[str, bool] | None:
        best, theirs = best_ragged(rows, shape), of_group(rows, "torch_experts", f"{shape}/even/")
        if best is None or not theirs:
            return None
        own, other = best[1]["ms"], min(line["ms"] for line in theirs.values())
        return f"{own:.3g} ms, PyTorch {other:.3g} ms", own < other

    return reached


def trains_at(wanted: float) -> Callable[[Rows], tuple[str, bool] | None]:
    """Whether any training step reaches a model FLOPs utilisation."""

    def reached(rows: Rows) -> tuple[str, bool] | None:
        steps = {name: line["mfu_causal"] for name, line in of_group(rows, "step", "").items()
                 if line.get("mfu_causal") is not None}  # fmt: skip
        if not steps:
            return None
        best = max(steps, key=lambda name: steps[name])
        return f"{steps[best]:.0%}, {best}", steps[best] >= wanted

    return reached


def agrees(rows: Rows) -> tuple[str, bool] | None:
    """Whether every row of parity that was reached is within tolerance."""
    found = of_group(rows, "parity", "")
    if not found:
        return None
    count = sum(bool(line["passed"]) for line in found.values())
    return f"{count} of {len(found)}", count == len(found)


GOALS = (
    Goal("every way and router within its tolerance of float64", agrees),
    *(
        Goal(f"experts of {shape}, forward and backward: {wanted:.0%} of the matmul rate",
             share_of(shape, wanted))
        for shape, wanted in EXPERTS_GOALS.items()
    ),
    *(Goal(f"{shape}: ahead of PyTorch's grouped_mm", ahead_of_torch(shape))
      for shape in EXPERTS_GOALS),
    Goal(f"a training step at {MFU_GOAL:.0%} MFU, half of the square of attention counted",
         trains_at(MFU_GOAL)),
)  # fmt: skip
