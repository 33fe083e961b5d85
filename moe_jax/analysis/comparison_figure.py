"""The figure of a comparison: held-out and training loss of every run, against four measures."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from moe_jax.analysis.comparison import Comparison
from moe_jax.analysis.comparison_seeds import is_final, shared_name
from moe_jax.analysis.drawing import COLORS, GREY, Figure, plain_axes, png_bytes
from moe_jax.analysis.figures import Curve, cut_the_start, smooth
from moe_jax.analysis.names import in_figure
from moe_jax.analysis.runs import Entry
from moe_jax.training.metrics import SECONDS_PER_STEP, elapsed

HELDOUT, TRAIN = "heldout/dropless/bits_per_byte", "train/loss"
MAX_NAMES = 24  # in the legend
Style = dict[str, Any]
# Every colour is used with solid lines and dots first, then with the next dashes and marks.
STYLES: tuple[Style, ...] = tuple(
    {"color": color, "linestyle": line, "marker": mark}
    for line, mark in (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
    for color in COLORS
)


def comparison_figure(comparison: Comparison) -> Figure:
    """Curves in rows (held-out, training) and columns (steps, tokens, FLOPs, time).

    Runs that differ only in their seeds look alike. A held-out curve is of one text: if the
    evaluations during a run are of a sample of the split, the final score is a larger mark.
    """
    entries = comparison.entries
    styles, firsts = styles_of(comparison)
    names = [legend_name(entries[place], comparison, place) for place in firsts[:MAX_NAMES]]
    figure = Figure(figsize=(15, 7 + 0.16 * len(names)), layout="constrained")
    axes = figure.subplots(2, 4, sharey="row")
    several = len(comparison.tokenizers) > 1
    labels = dict.fromkeys(in_figure(entry.label("dropless")) for entry in entries)
    marks = " (lines: a sample of it; large marks: all)" * any(map(is_sampled, entries))
    rows: tuple[tuple[str, str], ...] = (
        (f"Held-out text, {' or '.join(labels)}{marks}", "bits/byte"),
        ("Training" + ", tokenizers differ" * several, "nats/token"),
    )
    for row, (title, unit) in enumerate(rows):
        for axis, (x_label, measure) in zip(axes[row], MEASURES.items(), strict=True):
            plain_axes(axis, title if axis is axes[row][0] else "", unit, x_label)
            axis.xaxis.set_major_formatter(EngFormatter())
            axis.label_outer(remove_inner_ticks=False)
            axis.tick_params(labelbottom=True)  # each row has its own limits
            axis.set_xlabel(x_label)
            draw = draw_heldout if row == 0 else draw_training
            curves = [draw(axis, e, measure, s) for e, s in zip(entries, styles, strict=True)]
            cut_the_start(axis, [curve for curve in curves if len(curve[0])])
            if not axis.lines:
                axis.text(0.5, 0.5, "not recorded", ha="center", transform=axis.transAxes,
                          color=GREY)  # fmt: skip
    handles = [Line2D([], [], **styles[place], markersize=4) for place in firsts[:MAX_NAMES]]
    left_out = len(firsts) - len(names)
    figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8,
                  title=f"and {left_out} more" if left_out else None)  # fmt: skip
    return figure


def steps_of(entry: Entry, steps: np.ndarray) -> np.ndarray | None:
    """The steps themselves."""
    del entry
    return steps.astype(np.float64)


def tokens_of(entry: Entry, steps: np.ndarray) -> np.ndarray | None:
    """Tokens trained on after the given steps."""
    tokens = entry.tokens_per_step
    return None if tokens is None else steps * float(tokens)


def flops_of(entry: Entry, steps: np.ndarray) -> np.ndarray | None:
    """Model FLOPs of training after the given steps."""
    tokens, flops = tokens_of(entry, steps), entry.flops_per_token
    return None if tokens is None or flops is None else tokens * flops


def seconds_of(entry: Entry, steps: np.ndarray) -> np.ndarray | None:
    """Seconds of training after the given steps, without evaluation and checkpoints."""
    logged, seconds = entry.run.curve(SECONDS_PER_STEP)
    if not len(logged):
        return None
    return np.interp(steps, np.append(0, logged), np.append(0, elapsed(logged, seconds)))


Measure = Callable[[Entry, np.ndarray], np.ndarray | None]
MEASURES: dict[str, Measure] = {
    "training step": steps_of,
    "tokens": tokens_of,
    "model FLOPs": flops_of,
    "seconds of training steps": seconds_of,
}


def is_sampled(entry: Entry) -> bool:
    """Whether evaluations during the run are of a sample of the held-out split."""
    return bool(entry.settings.get("training", {}).get("evaluation_batches"))


def draw_heldout(axis: Axes, entry: Entry, measure: Measure, style: Style) -> Curve:
    """A curve on one text, and the final score as a larger mark if it is on another."""
    steps, losses = entry.run.curve(HELDOUT)
    final = entry.score.loss("dropless", "bits_per_byte") if is_final(entry) else None
    if final is not None:
        last = np.array([entry.score.step])
        if is_sampled(entry):
            during = steps < entry.score.step
            steps, losses = steps[during], losses[during]
            x = measure(entry, last)
            if x is not None:
                axis.plot(x, [final], **style | {"linestyle": ""}, markersize=6)
        elif not len(steps):
            steps, losses = last, np.array([final])
    x = measure(entry, steps)
    if x is None or not len(steps):
        return np.array([]), np.array([])
    axis.plot(x, losses, **style, linewidth=1.2, markersize=3)
    return x, np.append(losses, [] if final is None else [final])


def draw_training(axis: Axes, entry: Entry, measure: Measure, style: Style) -> Curve:
    """The loss of the training batches, smoothed."""
    steps, losses = entry.run.curve(TRAIN)
    x = measure(entry, steps)
    if x is None or not len(steps):
        return np.array([]), np.array([])
    axis.plot(x, smooth(losses), **style | {"marker": ""}, linewidth=1.2)
    return x, losses


def styles_of(comparison: Comparison) -> tuple[list[Style], list[int]]:
    """The colour, dashes and mark of every run, and the place of the first run of each style."""
    group_of = {place: group[0] for group in comparison.groups for place in group}
    places = range(len(comparison.entries))
    firsts = [place for place in places if group_of.get(place, place) == place]
    by_first = dict(zip(firsts, itertools.cycle(STYLES), strict=False))
    return [by_first[group_of.get(place, place)] for place in places], firsts


def legend_name(entry: Entry, comparison: Comparison, place: int) -> str:
    """The name of a run, its state, and how many runs have its style."""
    group = next((group for group in comparison.groups if place in group), [place])
    several = f" ({len(group)} seeds)" if len(group) > 1 else ""
    name = shared_name([comparison.entries[one].name for one in group])
    state = "" if is_final(entry) else f" ({entry.state})"
    star = "*" * bool(entry.mark("dropless"))
    return in_figure(name, 80) + star + several + state


def comparison_png(comparison: Comparison) -> bytes:
    """The figure as a PNG file; characters that the font lacks are boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return png_bytes(comparison_figure(comparison), dpi=100)
