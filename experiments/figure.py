"""The figure of a study: held-out loss by step, and final loss by arm and seed."""

import matplotlib
import numpy as np

from experiments.results import LOSS, Results, finite
from experiments.study import Study
from moe_jax.analysis.drawing import Figure
from moe_jax.analysis.names import in_figure

WIDTH = 4.6  # inches: fits a phone, with letters nearly as large as body text
DPI = 150


def draw(study: Study, results: Results) -> Figure:
    """Draws curves, as means over the seeds that all arms have, and a final dot per seed.

    Diverged runs are left out. There are no curves if `Study.outcome` is not the loss.
    """
    seeds = results.shared_seeds
    measure, words = study.outcome
    losses_of = {
        arm.name: {s: v for s, v in finite(results.values(arm.name, measure)).items() if s in seeds}
        for arm in study.arms
    }
    arms = [arm for arm in study.arms if losses_of[arm.name]]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(arms), 1)))
    marks = {arm.name: results.mark(arm.name) for arm in arms}
    ends = 1.0 + 0.42 * len(arms)
    heights = (3.2, ends) if measure == LOSS else (ends,)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    *tops, bottom = np.atleast_1d(figure.subplots(len(heights), 1, height_ratios=heights))
    for place, (arm, color) in enumerate(zip(arms, colors, strict=True)):
        values = losses_of[arm.name]
        for top in tops:
            curves = [results.curve(arm.name, seed) for seed in values]
            losses = np.mean([losses for _, losses in curves], axis=0)
            top.plot(curves[0][0], losses, color=color, lw=1.4, ls="--" if marks[arm.name] else "-")
        bottom.plot(list(values.values()), [place] * len(values), "o", color=color, ms=5)
        bottom.plot(np.mean(list(values.values())), place, "|", color=color, ms=16)
        # The name of an arm is above its dots, in the colour of its curve.
        name = in_figure(arm.label, 60) + (marks[arm.name] and f" ({marks[arm.name]})")
        bottom.text(0.01, place - 0.28, name, color=color * np.array([0.8, 0.8, 0.8, 1]),
                    fontsize=7, va="bottom", transform=bottom.get_yaxis_transform(),
                    in_layout=False)  # fmt: skip
    dashed = "step (dashed: saw or sees later tokens)"
    for top in tops:
        top.set(xlabel=dashed if any(marks.values()) else "step")
        top.set_ylabel(f"held-out {words} (sample)")
    bottom.set(xlabel=f"held-out {words} after the last step", yticks=[])
    bottom.set_ylim(len(arms) - 0.5, -0.8)
    bottom.margins(x=0.08)
    for axis in (*tops, bottom):
        axis.grid(color="#DDDDDD", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
