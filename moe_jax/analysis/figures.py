"""The figures of a report: each function turns arrays into a matplotlib figure.

Loads and shares of experts are shown as multiples of an even split, 1/E, on one diverging scale of
powers of two: white is even, blue below, red above. Lines are in the colours of Okabe and Ito,
which the colour-blind can tell apart; layers, which have an order, are in the order of viridis.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

BLACK = "#000000"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
GREY = "#8A8A8A"
MAX_PANELS = 6  # layers that one figure shows
MAX_CELLS = 10_000  # of one heat map
MAX_COLUMNS = 160  # points along the steps; more are averaged
Curve = tuple[np.ndarray, np.ndarray]  # steps and values, both [points]


def loss_figure(
    train: Curve, heldout: Mapping[str, Curve], bits_per_byte: Mapping[str, Curve]
) -> Figure:
    """The loss over the steps: nats/token on the left, held-out bits/byte on the right.

    Args:
      train: loss on the training batches, nats/token.
      heldout: loss on held-out text by the way of evaluation, nats/token.
      bits_per_byte: of held-out text, by domain; the name "all" is the whole text.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plain_axes(left, "Loss", "nats/token")
    left.plot(*train, color=COLORS[0], alpha=0.25, linewidth=0.8)
    left.plot(train[0], _smooth(train[1]), color=COLORS[0], linewidth=1.6, label="train")
    for (name, curve), color, style in zip(
        heldout.items(), (COLORS[1], BLACK), ("o-", "x--"), strict=False
    ):
        left.plot(
            *curve, style, color=color, markersize=4.5, linewidth=1.2, label=f"held-out, {name}"
        )
    _cut_the_start(left, [train, *heldout.values()])
    left.legend(frameon=False)

    _plain_axes(right, "Held-out text, dropless", "bits/byte")
    styles = ("-", "--", ":")
    names = [name for name in bits_per_byte if name != "all"]
    for index, name in enumerate(names):
        color, style = COLORS[index % len(COLORS)], styles[index // len(COLORS) % len(styles)]
        right.plot(*bits_per_byte[name], style, color=color, marker=".", linewidth=1.2, label=name)
    if "all" in bits_per_byte:
        right.plot(*bits_per_byte["all"], "o-", color=BLACK, linewidth=2.2, label="all")
    if bits_per_byte:
        _cut_the_start(right, list(bits_per_byte.values()))
        right.legend(frameon=False, fontsize=8, ncols=1 + len(bits_per_byte) // 8)
    else:
        right.text(0.5, 0.5, "not evaluated", ha="center", transform=right.transAxes, color=GREY)
    return figure


def load_figure(steps: np.ndarray, load_by_layer: Mapping[str, np.ndarray]) -> Figure:
    """How evenly each layer uses its experts, over the steps: one heat map a layer.

    Args:
      steps: [T], increasing.
      load_by_layer: [T, E] by layer, share of the assignments before drops; rows sum to 1. Of many
        layers, `MAX_PANELS` evenly spaced ones are shown.
    """
    layers = _spread(list(load_by_layer), MAX_PANELS)
    figure, axes = _panels(len(layers), columns=2, size=(5, 1.9))
    for axis, layer in zip(axes, layers, strict=True):
        binned_steps, load = _average(steps, load_by_layer[layer])
        num_experts = load.shape[1]
        mesh = axis.pcolormesh(
            _edges(binned_steps),
            np.arange(num_experts + 1) - 0.5,
            _visible(load.T * num_experts),
            **_scale(),
        )
        axis.set_title(_layer_title(layer), fontsize=10)
        axis.set_ylabel("expert")
        axis.set_yticks(np.arange(0, num_experts, max(1, num_experts // 4)))
        axis.invert_yaxis()
    _label_bottom(axes, 2, "training step")
    _color_bar(figure, mesh, axes, "load, multiple of an even split")
    figure.suptitle(f"Expert load{_shown(layers, load_by_layer)}", fontweight="bold", fontsize=11)
    return figure


def domain_figure(share_by_layer: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Which experts the tokens of each domain go to: one heat map a layer.

    Args:
      share_by_layer: by layer and domain, [E]: the share of the domain's choices that each expert
        gets. Of many layers, `MAX_PANELS` evenly spaced ones are shown.
    """
    layers = _spread(list(share_by_layer), MAX_PANELS)
    domains = list(dict.fromkeys(name for layer in layers for name in share_by_layer[layer]))
    num_experts = len(next(iter(share_by_layer[layers[0]].values())))
    figure, axes = _panels(len(layers), columns=2, size=(5, 0.8 + 0.26 * len(domains)))
    for axis, layer in zip(axes, layers, strict=True):
        rows = share_by_layer[layer]
        share = np.array([rows.get(name, [np.nan] * num_experts) for name in domains])
        mesh = axis.pcolormesh(_visible(share * num_experts), **_scale())
        axis.set_title(_layer_title(layer), fontsize=10)
        axis.set_yticks(np.arange(len(domains)) + 0.5, domains)
        axis.tick_params(length=0)
        axis.invert_yaxis()
        ticks = np.arange(0, num_experts, 1 if num_experts <= 16 else num_experts // 8)
        axis.set_xticks(ticks + 0.5, [str(tick) for tick in ticks])
        if num_experts <= 16:
            _write_cells(axis, share * num_experts)
    _label_bottom(axes, 2, "expert")
    _color_bar(figure, mesh, axes, "share of assignments, multiple of an even split")
    figure.suptitle(
        f"Experts of each domain, held-out text{_shown(layers, share_by_layer)}",
        fontweight="bold",
        fontsize=11,
    )
    return figure


def router_figure(
    dropped: Mapping[str, Curve],
    entropy: Mapping[str, Curve],
    largest: Mapping[str, Curve],
    num_experts: int,
) -> Figure:
    """The health of the routers over the steps, a line a layer.

    Args:
      dropped: share of the assignments that found no slot, by layer.
      entropy: mean entropy of a token's router distribution, nats, by layer.
      largest: load of the fullest expert, as a multiple of an even split, by layer.
      num_experts: E, for the entropy of an even distribution.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        (dropped, "Dropped assignments", "share of assignments"),
        (entropy, "Router entropy", "nats"),
        (largest, "Fullest expert", "multiple of an even split"),
    )
    layers = list(dropped)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, max(len(layers), 2)))
    for axis, (curves, title, unit) in zip(axes, panels, strict=True):
        _plain_axes(axis, title, unit)
        for color, layer in zip(colors, layers, strict=False):
            if layer in curves:
                axis.plot(*_thin(curves[layer]), color=color, linewidth=1.2)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes[0].set_ylim(0, max(0.01, axes[0].get_ylim()[1]))
    _reference(axes[1], float(np.log(num_experts)), f"ln {num_experts}, even")
    _reference(axes[2], 1.0, "even")
    shown = _spread(list(range(len(layers))), 6)
    handles = [matplotlib.lines.Line2D([], [], color=colors[index], linewidth=2) for index in shown]
    names = [_layer_title(layers[index]) for index in shown]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _plain_axes(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontweight="bold", fontsize=11, loc="left")
    axis.set_xlabel("training step")
    axis.set_ylabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A grid of `count` axes of a size in inches, filled row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width = max(7.0, size[0] * columns)
    figure = Figure(figsize=(width, size[1] * rows + 1.0), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _label_bottom(axes: list[Axes], columns: int, label: str) -> None:
    """Labels the lowest panel of each column."""
    for axis in axes[-columns:]:
        axis.set_xlabel(label)


def _scale() -> dict[str, Any]:
    """The colours of multiples of an even split."""
    return {"norm": LogNorm(1 / 4, 4), "cmap": _diverging()}


def _visible(multiple: np.ndarray) -> np.ndarray:
    """Lifts 0, of which there is no logarithm, to a value below the scale."""
    return np.maximum(multiple, 1e-6)


def _diverging() -> matplotlib.colors.Colormap:
    return matplotlib.colormaps["RdBu_r"].with_extremes(
        bad="#CCCCCC", under="#03182E", over="#3D0010"
    )


def _color_bar(figure: Figure, mesh: Any, axes: list[Axes], label: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, location="bottom", extend="both", aspect=45, shrink=0.6)
    bar.set_label(label)
    bar.ax.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def _write_cells(axis: Axes, values: np.ndarray) -> None:
    """Writes the value into each cell, in a colour that can be read on it."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value > 2.4 or value < 1 / 2.4 else BLACK
            axis.text(
                column + 0.5, row + 0.5, f"{value:.1f}",
                ha="center", va="center", fontsize=7, color=color,
            )  # fmt: skip


def _reference(axis: Axes, value: float, label: str) -> None:
    """A dashed line of what even routing would give."""
    axis.axhline(value, color=GREY, linewidth=1, linestyle="--", label=label)
    axis.legend(frameon=False, fontsize=8)


def _cut_the_start(axis: Axes, curves: list[Curve]) -> None:
    """Leaves the steep fall of the first steps out of the picture, for the sake of the rest."""
    tops, bottoms = [], []
    for _, values in curves:
        values = values[np.isfinite(values)]
        if len(values):
            tops.append(values[min(len(values) - 1, len(values) // 50)])
            bottoms.append(values.min())
    if tops and max(tops) > min(bottoms):
        margin = 0.06 * (max(tops) - min(bottoms))
        axis.set_ylim(min(bottoms) - margin, max(tops) + margin)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over a fiftieth of the points."""
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _average(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages runs of neighbouring points so that few enough are left to be seen apart."""
    num_experts = values.shape[1] if values.ndim > 1 else 1
    groups = min(len(steps), MAX_COLUMNS, max(40, MAX_CELLS // num_experts))
    return (
        np.array([part.mean() for part in np.array_split(steps, groups)]),
        np.array([part.mean(axis=0) for part in np.array_split(values, groups)]),
    )


def _thin(curve: Curve) -> Curve:
    return _average(*curve)


def _edges(centres: np.ndarray) -> np.ndarray:
    """The edges of cells around increasing centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middles[0], *middles, 2 * centres[-1] - middles[-1]])


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _layer_title(layer: str) -> str:
    """Such as "layer 3" for "layer_03"."""
    name, _, number = layer.rpartition("_")
    return f"{name} {int(number)}" if number.isdecimal() else layer


def _shown(layers: list[str], among: Mapping[str, Any]) -> str:
    return "" if len(layers) == len(among) else f" ({len(layers)} of {len(among)} MoE layers)"
