"""What the figures share: colours, scales, panels, and how a figure becomes a file.

Loads and shares of experts are shown as multiples of an even split, 1/E, on one diverging scale of
powers of two: white is even, blue below, red above. Lines are in the colours of Okabe and Ito,
which the colour-blind can tell apart; layers follow the order of viridis.
"""

import io
from collections.abc import Collection
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from moe_jax.analysis.names import in_figure

BLACK = "#000000"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
GREY = "#8A8A8A"
MAX_PANELS = 6  # layers that one figure shows


class Figure(matplotlib.figure.Figure):
    """A figure that notebooks show without pyplot, whose state is global."""

    def _repr_png_(self) -> bytes:
        """The image that Jupyter shows if the figure is the last value of a cell."""
        return png_bytes(self)


def png_bytes(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as a small PNG file, the same bytes for the same figure."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    stream = io.BytesIO()
    # 256 colours take a third of the space and look the same.
    pixels.quantize(256, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def plain_axes(axis: Axes, title: str, unit: str, x_label: str = "training step") -> None:
    """Titles and labels axes of curves, whose x values are integers."""
    axis.set_title(title, fontweight="bold", fontsize=11, loc="left")
    axis.set_xlabel(x_label)
    axis.set_ylabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A grid of `count` axes, each of a size in inches, filled row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width = max(7.0, size[0] * columns)
    figure = Figure(figsize=(width, size[1] * rows + 1.0), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def label_bottom(axes: list[Axes], columns: int, label: str) -> None:
    """Labels the lowest panel of each column."""
    for axis in axes[-columns:]:
        axis.set_xlabel(label)


def multiple_scale() -> dict[str, Any]:
    """The colours of multiples of an even split."""
    return {"norm": LogNorm(1 / 4, 4), "cmap": _diverging()}


def visible(multiple: np.ndarray) -> np.ndarray:
    """Lifts 0, which has no logarithm, to a value below the scale."""
    return np.maximum(multiple, 1e-6)


def _diverging() -> matplotlib.colors.Colormap:
    return matplotlib.colormaps["RdBu_r"].with_extremes(
        bad="#CCCCCC", under="#03182E", over="#3D0010"
    )


def multiple_bar(figure: Figure, mesh: Any, axes: list[Axes], label: str) -> None:
    """The colour bar of `multiple_scale`."""
    bar = figure.colorbar(mesh, ax=axes, location="bottom", extend="both", aspect=45, shrink=0.6)
    bar.set_label(label)
    bar.ax.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def write_multiples(axis: Axes, values: np.ndarray) -> None:
    """Writes the value into each cell, in a readable colour."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value > 2.4 or value < 1 / 2.4 else BLACK
            axis.text(
                column + 0.5, row + 0.5, f"{value:.1f}",
                ha="center", va="center", fontsize=7, color=color,
            )  # fmt: skip


def reference_line(axis: Axes, value: float, label: str) -> None:
    """A dashed line at the value of a reference, such as even routing."""
    axis.axhline(value, color=GREY, linewidth=1, linestyle="--", label=label)
    axis.legend(frameon=False, fontsize=8)


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def layer_title(layer: str) -> str:
    """The title of a layer, such as "layer 3" for "layer_03"."""
    name, _, number = layer.rpartition("_")
    return f"{name} {int(number)}" if number.isdecimal() else layer


def layer_label(layer: str) -> str:
    """`layer_title` as a figure can show it: it may contain the name of a part."""
    return in_figure(layer_title(layer))


def stamp(figure: Figure, text: str) -> Figure:
    """Writes a note on the whole figure into its corner; nothing if the text is empty."""
    if text:
        figure.text(0.995, 0.995, text, ha="right", va="top", fontsize=8, color=COLORS[1])
    return figure


def shown_of(layers: Collection[str], among: Collection[str]) -> str:
    """The end of a title if layers were left out, such as " (6 of 12 MoE layers)"."""
    return "" if len(layers) == len(among) else f" ({len(layers)} of {len(among)} MoE layers)"


def layer_colors(num_layers: int) -> np.ndarray:
    """A colour for each layer, in the order of viridis, without its palest end."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.88, max(num_layers, 2)))[:num_layers]


def layer_legend(figure: Figure, layers: list[str]) -> None:
    """A legend of the layers' colours below the figure; of many layers, some."""
    colors = layer_colors(len(layers))
    shown = spread(list(range(len(layers))), 6)
    handles = [matplotlib.lines.Line2D([], [], color=colors[index], linewidth=2) for index in shown]
    names = [layer_label(layers[index]) for index in shown]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
