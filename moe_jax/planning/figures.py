"""The figures of a plan: what takes the memory, and what takes the time."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping

from matplotlib.figure import Figure

from moe_jax.planning.memory import Memory
from moe_jax.planning.report import Plan
from moe_jax.planning.roofline import Roofline, estimate_by_kind

# Of Okabe and Ito, which the colour-blind can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#8A8A8A")
GREYS = ("#333333", "#777777", "#AAAAAA", "#DDDDDD")  # for the compiler's numbers
GIB = 1024**3
VISIBLE = 1e-3  # share of a bar; smaller parts are left white
RESOURCES = {
    "compute": "FLOPs", "memory": "HBM bytes", "interconnect": "interconnect bytes",
    "network": "network bytes",
}  # fmt: skip


def write_figures(plan: Plan, directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes `memory.png` and, if a machine is named, `roofline.png`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    name = plan.work.config.name.replace("$", r"\$")  # $...$ is mathematics in matplotlib
    title = name + (f" on {plan.topology.name}" if plan.topology else "")
    bars = {"estimate": memory_parts(plan.memory)}
    if plan.step is not None and plan.step.memory is not None:
        memory = plan.step.memory
        bars["compiled"] = {
            "arguments": memory.arguments,
            "outputs not aliased": memory.outputs - memory.aliased,
            "temporaries": memory.temporaries,
            "generated code": memory.generated_code,
        }
    available = plan.available if plan.topology else None
    figures = {"memory": memory_figure(bars, available, title)}
    if plan.topology is not None:
        figures["roofline"] = roofline_figure(estimate_by_kind(plan.work, plan.topology), title)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def memory_parts(memory: Memory) -> dict[str, float]:
    """Bytes of the components that are in memory together at the peak."""
    parts = {name.replace("_", " "): size for name, size in dataclasses.asdict(memory).items()}
    in_layers = memory.layer + memory.dispatch >= memory.logits
    for name in ("logits",) if in_layers else ("layer", "dispatch"):
        del parts[name]
    return parts


def memory_figure(
    bars: Mapping[str, Mapping[str, float]], available: float | None, title: str
) -> Figure:
    """Memory of one device by component: a stacked bar per source, the usable memory as a line.

    Args:
      bars: bytes by component, by source ("estimate", "compiled").
      available: bytes that a program may use, or None.
      title: of the figure.
    """
    figure = Figure(figsize=(8, 1.9 + 0.9 * len(bars)), layout="constrained")
    axis = figure.subplots()
    for row, parts in enumerate(bars.values()):
        start, colors = 0.0, itertools.cycle(GREYS if row else COLORS)
        for name, size in parts.items():
            if size < VISIBLE * sum(parts.values()):
                start += size / GIB
                continue
            label = f"{name} {size / GIB:,.2f}"
            axis.barh(row, size / GIB, left=start, color=next(colors), label=label, height=0.6)
            start += size / GIB
        axis.text(start, row, f" {start:,.1f} GiB", va="center", fontsize=9)
    if available is not None:
        axis.axvline(available / GIB, color="black", linestyle="--", linewidth=1.2)
        axis.text(
            available / GIB,
            1.0,
            f"usable {available / GIB:,.1f}",
            transform=axis.get_xaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=9,
        )
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set_xlabel("GiB of one device")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"Memory, {title}", fontweight="bold", fontsize=11, loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def roofline_figure(times_by_kind: Mapping[str, Roofline], title: str) -> Figure:
    """Milliseconds per step by kind of layer, a bar per resource; the longest bar bounds.

    Args:
      times_by_kind: the roofline of each kind.
      title: of the figure.
    """
    times_by_kind = {kind: times for kind, times in times_by_kind.items() if times.seconds > 0}
    shown = {name: label for name, label in RESOURCES.items() if _any(times_by_kind, name)}
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(shown)
    for i, (name, label) in enumerate(shown.items()):
        places = [row + (i - (len(shown) - 1) / 2) * width for row in range(len(times_by_kind))]
        values = [1e3 * getattr(times, name) for times in times_by_kind.values()]
        bars = axis.bar(places, values, width=0.94 * width, color=COLORS[i], label=label)
        axis.bar_label(bars, fmt=_short, fontsize=7, padding=2)
    kinds = [kind.replace("_", " ") for kind in times_by_kind]
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_ylabel("ms a step, estimated")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    title = f"Roofline by kind of layer (arithmetic), {title}"
    axis.set_title(title, fontweight="bold", fontsize=11, loc="left")
    return figure


def _short(milliseconds: float) -> str:
    if milliseconds == 0:
        return ""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _any(times_by_kind: Mapping[str, Roofline], name: str) -> bool:
    return any(getattr(times, name) > 0 for times in times_by_kind.values())
