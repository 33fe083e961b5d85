"""Goals that were set before anything ran, and whether a card reaches them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.accelerator.record import DONE, MEASURED, START

Rows = Mapping[tuple[str, str], dict[str, Any]]
Reached = Callable[[Rows], tuple[str, bool | None] | None]
EXPERTS_GOALS = {"mixtral_E8": 0.60, "fine_E64": 0.45}
MFU_GOAL = 0.40
VERDICTS = {True: "pass", False: "**fail**", None: "open"}
LARGEST_ERROR = 2e-2  # largest error of bfloat16 experts, over the largest entry
UNKNOWN_PEAK = "this card's peak is not in planning/hardware.py"
DENSE = "ragged dense"  # used only if named: not a kernel


class Goal(NamedTuple):
    """A goal.

    Attributes:
      text: the goal in words.
      reached: maps the rows of a card to a number in words and whether it is enough (None if that
        is open); returns None if the rows are missing.
    """

    text: str
    reached: "Reached"

    def verdict(self, rows: Rows) -> str:
        """Pass, fail or open, with the number; or "not measured"."""
        found = self.reached(rows)
        if found is None:
            return "not measured"
        words, is_enough = found
        return f"{VERDICTS[is_enough]}: {words}"


def of_group(rows: Rows, group: str, prefix: str) -> dict[str, dict[str, Any]]:
    """The measured rows of a group whose names begin with `prefix`, by name without it."""
    return {
        name.removeprefix(prefix): line
        for (own, name), line in rows.items()
        if own == group and name.startswith(prefix) and line["state"] == MEASURED
    }


def is_right(line: Mapping[str, Any]) -> bool:
    """Whether a row of experts is within tolerance. In JSON, null is nan or infinity."""
    error = line.get("error")
    return error is not None and error <= LARGEST_ERROR and line.get("empty_expert") == 0


def best_ragged(rows: Rows, shape: str) -> tuple[str, dict[str, Any]] | None:
    """The fastest kernel for sorted rows on a shape with even loads, and its row.

    A kernel outside the tolerance is returned only if none is within.
    """
    forms = of_group(rows, "experts", f"{shape}/even/")
    kernels = [name for name in forms if name.startswith("ragged") and name != DENSE]
    if not kernels:
        return None
    best = min(kernels, key=lambda name: (not is_right(forms[name]), forms[name]["ms"]))
    return best, forms[best]


def share_of(shape: str, wanted: float) -> Reached:
    """The goal that the experts of a shape reach a fraction of the matmul rate."""

    def reached(rows: Rows) -> tuple[str, bool] | None:
        best = best_ragged(rows, shape)
        if best is None:
            return None
        name, line = best
        words = f"{line['share']:.0%} by {name}" + ("" if is_right(line) else ", which is wrong")
        return words, is_right(line) and line["share"] >= wanted

    return reached


def ahead_of_torch(shape: str) -> Reached:
    """The goal that the experts of a shape are faster than PyTorch's fastest form."""

    def reached(rows: Rows) -> tuple[str, bool] | None:
        best, theirs = best_ragged(rows, shape), of_group(rows, "torch_experts", f"{shape}/even/")
        if best is None or not theirs:
            return None
        own, other = best[1]["ms"], min(line["ms"] for line in theirs.values())
        words = f"{own:.3g} ms, PyTorch {other:.3g} ms"
        return words, is_right(best[1]) and own < other

    return reached


def trains_at(wanted: float) -> Reached:
    """The goal that a training step with a falling loss reaches a model FLOPs utilisation."""

    def reached(rows: Rows) -> tuple[str, bool | None] | None:
        falling = {name: line.get("mfu_causal") for name, line in of_group(rows, "step", "").items()
                   if line["finite"] and line["falls"]}  # fmt: skip
        steps = {name: mfu for name, mfu in falling.items() if mfu is not None}
        if not steps:
            return (UNKNOWN_PEAK, None) if falling else None
        best = max(steps, key=lambda name: steps[name])
        return f"{steps[best]:.0%}, {best}", steps[best] >= wanted

    return reached


def agrees(rows: Rows) -> tuple[str, bool | None] | None:
    """Whether every parity row is within tolerance; open while rows are missing."""
    own = [line for (group, name), line in rows.items() if group == "parity" and name != START]
    reached = [line for line in own if line["state"] in DONE]
    if not reached:
        return None
    count, left = sum(bool(line.get("passed")) for line in reached), len(own) - len(reached)
    words = f"{count} of {len(reached)}" + (f", {left} not reached" if left else "")
    return words, None if left and count == len(reached) else count == len(reached)


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
