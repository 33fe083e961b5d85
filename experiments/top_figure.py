"""The figure of the top page: held-out loss over active FLOPs, of studies with dense models."""

import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.lines import Line2D

from experiments.budget import cost_of
from experiments.figure import WIDTH
from experiments.results import Results, finite
from experiments.study import Study
from moe_jax.analysis.drawing import BLACK, Figure

NAME = "loss_and_flops.png"
# One per study: ten dark ones, then ten light ones.
COLORS = [colormaps["tab20"](number) for number in (*range(0, 20, 2), *range(1, 20, 2))]


def has_dense(study: Study, size: str) -> bool:
    """Whether an arm of a study has no experts."""
    return any(
        not study.experiment(size, arm.name, 0).model.moe_parts for arm in study.arms_at(size)
    )


def draw_all(studies: list[Study], results: Mapping[str, Mapping[str, Results]]) -> Figure:
    """One point per arm: dense models are circles, MoE triangles, hollow if they saw later tokens.

    Args:
      studies: the studies, in the order of the colours.
      results: results of finished studies by study and size.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axis, handles = figure.subplots(), []
    run = [(study, size, found) for study in studies for size, found in results[study.name].items()]
    run = [one for one in run if has_dense(one[0], one[1])]
    for place, (study, size, found) in enumerate(run):
        color = COLORS[place % len(COLORS)]
        for arm in study.arms_at(size):
            values = finite(found.values(arm.name))
            losses = [values[seed] for seed in found.shared_seeds if seed in values]
            if not losses:
                continue
            has_experts = bool(study.experiment(size, arm.name, 0).model.moe_parts)
            marker: dict[str, Any] = {"marker": "^" if has_experts else "o", "color": color}
            if found.mark(arm.name):
                marker["mfc"] = "none"
            cost, loss = cost_of(study, size, arm.name).active, statistics.fmean(losses)
            axis.plot(cost, loss, ms=7, ls="none", **marker)
        tokens = max(row["tokens"] for row in found.rows)
        label = f"{study.name}, {size}, {tokens / 1e6:.0f} M tokens"
        handles.append(Line2D([], [], color=color, lw=3, label=label))
    markers: dict[str, dict[str, Any]] = {
        "dense": {"marker": "o"}, "MoE": {"marker": "^"},
        "saw or sees later tokens": {"marker": "^", "mfc": "none"},
    }  # fmt: skip
    for name, marker in markers.items():
        handles.append(Line2D([], [], color=BLACK, ls="none", ms=7, label=name, **marker))
    axis.set(xscale="log", xlabel="active FLOPs per token, forward")
    axis.set_ylabel("held-out bits/byte")
    axis.grid(color="#DDDDDD", lw=0.6, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside lower left", fontsize=8, frameon=False)
    return figure
