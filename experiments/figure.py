"""The figure of a study: held-out loss by step, and at the end by arm and seed."""

import matplotlib
import numpy as np

from experiments.results import Results, finite
from experiments.study import Study
from moe_jax.analysis.drawing import Figure
from moe_jax.analysis.names import in_figure


def draw(study: Study, results: Results) -> Figure:
    """Curves are means over seeds; at the end a dot is a seed and a bar the mean.

    Runs that diverged are left out.
    """
    losses_of = {arm.name: finite(results.values(arm.name)) for arm in study.arms}
    arms = [arm for arm in study.arms if losses_of[arm.name]]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(arms)))
    marks = {arm.name: results.mark(arm.name) for arm in arms}
    labels = {
        arm.name: in_figure(arm.label, 60) + (marks[arm.name] and f"\n({marks[arm.name]})")
        for arm in arms
    }
    height = 2.2 + 0.22 * len(arms) + 0.12 * sum(map(bool, marks.values()))
    figure = Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    for place, (arm, color) in enumerate(zip(arms, colors, strict=True)):
        values = losses_of[arm.name]
        curves = [results.curve(arm.name, seed) for seed in values]
        losses = np.mean([losses for _, losses in curves], axis=0)
        left.plot(curves[0][0], losses, color=color, lw=1.2, label=labels[arm.name])
        right.plot(list(values.values()), [place] * len(values), "o", color=color, ms=4)
        right.plot(np.mean(list(values.values())), place, "|", color=color, ms=16)
    left.set(xlabel="step", ylabel="held-out bits/byte (sample)")
    left.legend(frameon=False, fontsize=7)
    right.set(xlabel="held-out bits/byte after the last step")
    right.set_yticks(range(len(arms)), [labels[arm.name] for arm in arms])
    right.set_ylim(len(arms) - 0.5, -0.5)
    for axis in (left, right):
        axis.grid(color="#DDDDDD", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
