"""The figures of a run's report: each function turns arrays into a matplotlib figure."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from moe_jax.analysis.drawing import (
    BLACK,
    COLORS,
    GREY,
    MAX_PANELS,
    Figure,
    label_bottom,
    layer_colors,
    layer_label,
    layer_legend,
    multiple_bar,
    multiple_scale,
    panels,
    plain_axes,
    reference_line,
    shown_of,
    spread,
    visible,
    write_multiples,
)
from moe_jax.analysis.names import in_figure

MAX_CELLS = 10_000  # of one heat map
MAX_COLUMNS = 160  # points along the steps; more are averaged
Curve = tuple[np.ndarray, np.ndarray]  # steps and values, both [points]


def loss_figure(
    train: Curve,
    heldout: Mapping[str, Curve],
    bits_per_byte: Mapping[str, Curve],
    *,
    train_label: str = "train",
    bits_label: str = "dropless",
) -> Figure:
    """The loss over the steps: nats/token on the left, held-out bits/byte on the right.

    Args:
      train: loss on the training batches, nats/token.
      heldout: loss on held-out text, by evaluation, nats/token.
      bits_per_byte: loss on held-out text, by domain; "all" is the whole text.
      train_label: the name of the loss on training batches (see `training.loss_labels`).
      bits_label: the name of the evaluation of `bits_per_byte`.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plain_axes(left, "Loss", "nats/token")
    left.plot(*train, color=COLORS[0], alpha=0.25, linewidth=0.8)
    left.plot(train[0], smooth(train[1]), color=COLORS[0], linewidth=1.6, label=train_label)
    for (name, curve), color, style in zip(
        heldout.items(), (COLORS[1], BLACK), ("o-", "x--"), strict=False
    ):
        left.plot(
            *curve, style, color=color, markersize=4.5, linewidth=1.2, label=f"held-out, {name}"
        )
    cut_the_start(left, [train, *heldout.values()])
    left.legend(frameon=False)

    plain_axes(right, f"Held-out text, {bits_label}", "bits/byte")
    styles = ("-", "--", ":")
    names = [name for name in bits_per_byte if name != "all"]
    for index, name in enumerate(names):
        color, style = COLORS[index % len(COLORS)], styles[index // len(COLORS) % len(styles)]
        label = in_figure(name)
        right.plot(*bits_per_byte[name], style, color=color, marker=".", linewidth=1.2, label=label)
    if "all" in bits_per_byte:
        right.plot(*bits_per_byte["all"], "o-", color=BLACK, linewidth=2.2, label="all")
    if bits_per_byte:
        cut_the_start(right, list(bits_per_byte.values()))
        right.legend(frameon=False, fontsize=8, ncols=1 + len(bits_per_byte) // 8)
    else:
        right.text(0.5, 0.5, "not evaluated", ha="center", transform=right.transAxes, color=GREY)
    return figure


def load_figure(steps: np.ndarray, load_by_layer: Mapping[str, np.ndarray]) -> Figure:
    """How evenly each layer uses its experts, over the steps: one heat map per layer.

    Args:
      steps: [T], increasing.
      load_by_layer: [T, E] by layer, share of the assignments before drops; rows sum to 1. Of many
        layers, `MAX_PANELS` evenly spaced ones are shown.
    """
    layers = spread(list(load_by_layer), MAX_PANELS)
    figure, axes = panels(len(layers), columns=2, size=(5, 1.9))
    for axis, layer in zip(axes, layers, strict=True):
        binned_steps, load = _average(steps, load_by_layer[layer])
        num_experts = load.shape[1]
        mesh = axis.pcolormesh(
            _edges(binned_steps),
            np.arange(num_experts + 1) - 0.5,
            visible(load.T * num_experts),
            **multiple_scale(),
        )
        axis.set_title(layer_label(layer), fontsize=10)
        axis.set_ylabel("expert")
        axis.set_yticks(np.arange(0, num_experts, max(1, num_experts // 4)))
        axis.invert_yaxis()
    label_bottom(axes, 2, "training step")
    multiple_bar(figure, mesh, axes, "load, multiple of an even split")
    figure.suptitle(f"Expert load{shown_of(layers, load_by_layer)}", fontweight="bold", fontsize=11)
    return figure


def domain_figure(
    share_by_layer: Mapping[str, Mapping[str, Sequence[float]]], text: str = "held-out text"
) -> Figure:
    """Which experts the tokens of each domain go to: one heat map per layer.

    Args:
      share_by_layer: by layer and domain, [E]: the share of the domain's choices that each expert
        gets. Of many layers, `MAX_PANELS` evenly spaced ones are shown.
      text: the name of the routed text, for the title.
    """
    layers = spread(list(share_by_layer), MAX_PANELS)
    domains = list(dict.fromkeys(name for layer in layers for name in share_by_layer[layer]))
    figure, axes = panels(len(layers), columns=2, size=(5, 0.8 + 0.26 * len(domains)))
    for axis, layer in zip(axes, layers, strict=True):
        rows = share_by_layer[layer]
        num_experts = len(next(iter(rows.values())))
        share = np.array([rows.get(name, [np.nan] * num_experts) for name in domains])
        mesh = axis.pcolormesh(visible(share * num_experts), **multiple_scale())
        axis.set_title(layer_label(layer), fontsize=10)
        axis.set_yticks(np.arange(len(domains)) + 0.5, [in_figure(name) for name in domains])
        axis.tick_params(length=0)
        axis.invert_yaxis()
        ticks = np.arange(0, num_experts, 1 if num_experts <= 16 else num_experts // 8)
        axis.set_xticks(ticks + 0.5, [str(tick) for tick in ticks])
        if num_experts <= 16:
            write_multiples(axis, share * num_experts)
    label_bottom(axes, 2, "expert")
    multiple_bar(figure, mesh, axes, "share of assignments, multiple of an even split")
    figure.suptitle(
        f"Experts of each domain, {in_figure(text)}{shown_of(layers, share_by_layer)}",
        fontweight="bold",
        fontsize=11,
    )
    return figure


def router_figure(
    dropped: Mapping[str, Curve],
    entropy: Mapping[str, Curve],
    largest: Mapping[str, Curve],
    num_experts: Mapping[str, int],
) -> Figure:
    """The health of the routers over the steps, one line per layer.

    Args:
      dropped: share of the assignments that found no slot, by layer.
      entropy: mean entropy of a token's router distribution, nats, by layer.
      largest: load of the fullest expert, as a multiple of an even split, by layer.
      num_experts: E by layer, for the entropy of an even distribution.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    kinds = (
        (dropped, "Dropped assignments", "share of assignments"),
        (entropy, "Router entropy", "nats"),
        (largest, "Fullest expert", "multiple of an even split"),
    )
    layers = list(dropped)
    for axis, (curves, title, unit) in zip(axes, kinds, strict=True):
        plain_axes(axis, title, unit)
        for color, layer in zip(layer_colors(len(layers)), layers, strict=True):
            if layer in curves:
                axis.plot(*_thin(curves[layer]), color=color, linewidth=1.2)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes[0].set_ylim(0, max(0.01, axes[0].get_ylim()[1]))
    for size in sorted(set(num_experts.values())):
        reference_line(axes[1], float(np.log(size)), f"ln {size}, even")
    reference_line(axes[2], 1.0, "even")
    layer_legend(figure, layers)
    return figure


def cut_the_start(axis: Axes, curves: list[Curve]) -> None:
    """Crops the steep fall of the first steps, so that the rest can be seen."""
    tops, bottoms = [], []
    for _, values in curves:
        values = values[np.isfinite(values)]
        if len(values):
            tops.append(values[min(len(values) - 1, len(values) // 50)])
            bottoms.append(values.min())
    if tops and max(tops) > min(bottoms):
        margin = 0.06 * (max(tops) - min(bottoms))
        axis.set_ylim(min(bottoms) - margin, max(tops) + margin)


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over a fiftieth of the points, if there are any."""
    if not len(values):
        return values
    width = max(1, len(values) // 50)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _average(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points, so that few enough are left to be distinguished."""
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
