"""The figures of an analysis of routing, from the results of `measures`.

Of many layers, heat maps show some, evenly spaced; curves and tables show all.
"""

from collections.abc import Mapping
from typing import Any

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
from moe_jax.analysis.figures import domain_figure
from moe_jax.analysis.names import in_figure
from moe_jax.analysis.summary import has_several_choices

Layers = Mapping[str, Mapping[str, Any]]


def routing_figures(layers: Layers, text: str) -> dict[str, tuple[Figure, str]]:
    """Every figure that the measures give, by name, with a sentence on how to read it.

    Args:
      layers: the result of `measures.measure_layers`.
      text: the name of the routed text, for titles.
    """
    found = {
        "load": (
            load_map(layers),
            "Share of all choices that each expert gets, over an even split: 1 everywhere is "
            "perfect balance.",
        ),
        "domains": (
            domain_figure(
                {name: measures["domains"]["share"] for name, measures in layers.items()}, text
            ),
            "Which experts the tokens of each domain choose, over an even split. Rows that look "
            "alike mean that the domain does not matter.",
        ),
        "information": (
            information_figure(layers),
            "What a token's domain, and its id, say about one of its experts. Only what rises "
            "above the black mark, the same routing shuffled over the tokens, means something; "
            "the most there can be is log2(experts / choices of a token).",
        ),
        "repetition": (
            repetition_figure(layers),
            "Consecutive tokens of a document with the same first choice, and with one of their "
            "first two in common. Dashed: routing at random; grey: this routing, shuffled.",
        ),
    }
    if any(measures["saturation"] for measures in layers.values()):
        found["saturation"] = (
            saturation_figure(layers),
            "Share of a token's experts at a checkpoint that it still has at the last one: how "
            "early the router has settled. Dashed: unrelated routing.",
        )
    if has_several_choices(layers):
        found["coactivation"] = (
            coactivation_figure(layers),
            "Of the tokens of the expert of a row, the share that also chose that of a column, "
            "over what routing at random gives.",
        )
    for name, title in (("experts", "matrices of experts"), ("router", "columns of the router")):
        if all(measures["similarity"][name] for measures in layers.values()):
            matrices = {layer: measures["similarity"][name] for layer, measures in layers.items()}
            found[f"similarity_{name}"] = (
                similarity_figure(matrices, f"Cosine of the {title}"),
                f"How alike the {title} are: 0 for independent ones, 1 for copies.",
            )
    return found


def load_map(layers: Layers) -> Figure:
    """Experts across, layers down: the share of choices, as multiples of an even split."""
    shares = [np.array(measures["load"]["share"]) for measures in layers.values()]
    num_layers, num_experts = len(shares), max(map(len, shares))
    multiple_XE = np.full((num_layers, num_experts), np.nan)  # layers may have fewer experts
    for row_E, share_E in zip(multiple_XE, shares, strict=True):
        row_E[: len(share_E)] = share_E * len(share_E)
    figure, (axis,) = panels(1, columns=1, size=(8, 0.8 + 0.28 * num_layers))
    mesh = axis.pcolormesh(visible(multiple_XE), **multiple_scale())
    _expert_ticks(axis, num_experts)
    step = 1 + (num_layers - 1) // 16
    names = [layer_label(layer) for layer in layers]
    axis.set_yticks(np.arange(0, num_layers, step) + 0.5, names[::step])
    axis.invert_yaxis()
    axis.set_xlabel("expert")
    if num_experts <= 16:
        write_multiples(axis, multiple_XE)
    multiple_bar(figure, mesh, [axis], "load, multiple of an even split")
    figure.suptitle("Expert load", fontweight="bold", fontsize=11)
    return figure


def information_figure(layers: Layers) -> Figure:
    """Mutual information of domain and expert, and of token id and expert, by layer."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    kinds = {"domains": "Domain and expert", "tokens": "Token id and expert"}
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        found = [measures[kind]["information"] for measures in layers.values()]
        place = np.arange(len(found))
        _layer_axes(axis, layers, title, "mutual information, bits")
        axis.bar(place, [s["bits"] for s in found], width=0.6, color=COLORS[0], label="measured")
        axis.hlines(
            [s["shuffled"] for s in found], place - 0.4, place + 0.4, color=BLACK, linewidth=2,
            label="shuffled over the tokens",
        )  # fmt: skip
        axis.set_axisbelow(True)
        axis.set_ylim(bottom=0)
    _legend_below(figure, axes[0])
    return figure


def repetition_figure(layers: Layers) -> Figure:
    """How often consecutive tokens share experts, by layer and domain (Mixtral, table 5)."""
    kinds = {"same_first": "Same first choice", "any_shared": "First or second in common"}
    if not has_several_choices(layers):
        del kinds["any_shared"]
    figure = Figure(figsize=(5 + 5 * (len(kinds) - 1), 3.8), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    found = [measures["repetition"] for measures in layers.values()]
    place = np.arange(len(found))
    domains = list(dict.fromkeys(name for measures in found for name in measures["domains"]))
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        _layer_axes(axis, layers, title, "share of consecutive tokens")
        axis.plot(
            place, [measures["random"][kind] for measures in found], "_--", color=BLACK, lw=1,
            label="random",
        )  # fmt: skip
        axis.plot(
            place, [measures["shuffled"][kind] for measures in found], "s-", color=GREY,
            markersize=4, label="shuffled",
        )  # fmt: skip
        for index, name in enumerate(domains if len(domains) > 1 else ()):
            values = [measures["domains"].get(name, {}).get(kind) for measures in found]
            axis.plot(
                place, np.array(values, float), "o:", color=COLORS[index % len(COLORS)],
                markersize=4, lw=1, label=in_figure(name),
            )  # fmt: skip
        axis.plot(place, [s[kind] for s in found], "o-", color=BLACK, markersize=6, label="all")
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axis.set_ylim(bottom=0)
    _legend_below(figure, axes[0], columns=3 * len(kinds) + 1)
    return figure


def saturation_figure(layers: Layers) -> Figure:
    """How much of the last checkpoint's routing earlier ones had, one line per layer."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    kinds = {"first": "First choice", "all": "All choices"}
    for axis, (kind, title) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        plain_axes(axis, title, "share as at the last checkpoint")
        for color, measures in zip(layer_colors(len(layers)), layers.values(), strict=True):
            found = measures["saturation"]
            axis.plot(found["step"], found[kind], "o-", color=color, markersize=4, linewidth=1.4)
        for label, chance in _unrelated(layers, kind).items():
            reference_line(axis, chance, label)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_ylim(0, 1)
    layer_legend(figure, list(layers))
    return figure


def _unrelated(layers: Layers, kind: str) -> dict[str, float]:
    """The `saturation` of unrelated routing, by label: one line per number of experts."""
    chance = {
        len(measures["load"]["share"]): measures["saturation"]["random"][kind]
        for measures in layers.values()
    }
    if len(chance) == 1:
        return {"unrelated routing": next(iter(chance.values()))}
    return {f"unrelated, {size} experts": value for size, value in sorted(chance.items())}


def coactivation_figure(layers: Layers) -> Figure:
    """Experts that are chosen together, as multiples of random routing."""
    matrices = {}
    for layer, measures in layers.items():
        found = measures["coactivation"]
        share_EE = np.array(found["share"], float)
        np.fill_diagonal(share_EE, np.nan)
        matrices[layer] = share_EE / found["random"] if found["random"] else share_EE * np.nan
    figure, axes = _square_panels(matrices)
    for axis, layer in axes.items():
        mesh = axis.pcolormesh(visible(matrices[layer]), **multiple_scale())
        axis.set_ylabel("given expert")
        if len(matrices[layer]) <= 16:
            write_multiples(axis, matrices[layer])
    multiple_bar(figure, mesh, list(axes), "chosen together, multiple of random routing")
    title = f"Co-activation of experts{shown_of(list(axes.values()), layers)}"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    return figure


def similarity_figure(matrices: Mapping[str, list[list[float]]], title: str) -> Figure:
    """Cosines between experts, on one diverging scale around 0."""
    arrays = {layer: np.array(matrix, float) for layer, matrix in matrices.items()}
    off_diagonal = [np.abs(a[~np.eye(len(a), dtype=bool)]) for a in arrays.values()]
    largest = max((float(np.nanmax(a)) for a in off_diagonal if np.isfinite(a).any()), default=1)
    limit = next(limit for limit in (0.05, 0.1, 0.2, 0.5, 1) if largest <= limit or limit == 1)
    figure, axes = _square_panels(arrays)
    for axis, layer in axes.items():
        values_EE = arrays[layer].copy()
        np.fill_diagonal(values_EE, np.nan)
        mesh = axis.pcolormesh(values_EE, cmap="PuOr_r", vmin=-limit, vmax=limit)
        axis.set_ylabel("expert")
        if len(values_EE) <= 8:
            _write_cosines(axis, values_EE, limit)
    bar = figure.colorbar(mesh, ax=list(axes), location="bottom", aspect=45, shrink=0.6)
    bar.set_label("cosine (the diagonal, 1, is left out)")
    bar.set_ticks([-limit, -limit / 2, 0, limit / 2, limit])
    full_title = f"{title}{shown_of(list(axes.values()), arrays)}"
    figure.suptitle(full_title, fontweight="bold", fontsize=11)
    return figure


def _square_panels(matrices: Mapping[str, Any]) -> tuple[Figure, dict[Axes, str]]:
    """A square panel, experts by experts, for each shown layer."""
    layers = spread(list(matrices), MAX_PANELS)
    columns = min(3, len(layers))
    figure, axes = panels(len(layers), columns=columns, size=(3.5, 3.3))
    for axis, layer in zip(axes, layers, strict=True):
        axis.set_title(layer_label(layer), fontsize=10)
        axis.set_aspect("equal")
        axis.set_facecolor("#EEEEEE")
        _expert_ticks(axis, len(matrices[layer]))
        ticks = axis.get_xticks()
        axis.set_yticks(ticks, [f"{tick - 0.5:.0f}" for tick in ticks])
        axis.invert_yaxis()
    label_bottom(axes, columns, "expert")
    return figure, dict(zip(axes, layers, strict=True))


def _write_cosines(axis: Axes, values_EE: np.ndarray, limit: float) -> None:
    for (row, column), value in np.ndenumerate(values_EE):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.7 * limit else BLACK
            axis.text(
                column + 0.5, row + 0.5, f"{value:.2f}",
                ha="center", va="center", fontsize=7, color=color,
            )  # fmt: skip


def _expert_ticks(axis: Axes, num_experts: int) -> None:
    ticks = np.arange(0, num_experts, 1 if num_experts <= 16 else num_experts // 8)
    axis.set_xticks(ticks + 0.5, [str(tick) for tick in ticks])
    axis.tick_params(length=0)


def _legend_below(figure: Figure, axis: Axes, columns: int = 7) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), columns), frameon=False,
        fontsize=8,
    )  # fmt: skip


def _layer_axes(axis: Axes, layers: Layers, title: str, unit: str) -> None:
    """Axes with the MoE layers across."""
    plain_axes(axis, title, unit, x_label="layer of the model")
    numbers = [layer_label(layer).split()[-1] for layer in layers]
    step = 1 + (len(layers) - 1) // 12
    axis.set_xticks(range(0, len(layers), step), numbers[::step])
    axis.set_xlim(-0.6, len(layers) - 0.4)
