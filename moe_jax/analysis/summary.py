"""An analysis as tables: a row per layer, each measure next to its value by chance."""

from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.analysis.drawing import layer_title
from moe_jax.training.loss_labels import SAW, SEES

Layer = Mapping[str, Any]

NOTE = (
    "In brackets: the same routing shuffled over the tokens, and for saturation unrelated routing. "
    "Domain and token: mutual information with one of the experts of a token, in bits. Repeated: "
    "consecutive tokens of a document with the same first choice, and with one of their first two "
    "choices in common."
)
FLIPS_NOTE = (
    "Tokens whose first choice is another, and in brackets whose choices are not the same experts, "
    "when something else changes: noise on the embeddings, the precision, the checkpoint."
)


SIGHT = {
    SEES: "The model sees later tokens: so do the choices of experts that are shown here.",
    SAW: "The model saw later tokens in training; the choices that are shown here do not.",
    "": "",
}


def summary_table(layers: Mapping[str, Layer]) -> list[list[str]]:
    """The header and a row for each layer, as text.

    Args:
      layers: the result of `measures.measure_layers`.
    """
    columns: dict[str, Callable[[Layer], str]] = {
        "load of fullest": lambda measures: f"{measures['load']['fullest']:.2f}x",
        "experts in use": lambda measures: f"{measures['load']['effective_experts']:.1f}",
        "domain": lambda measures: _bits(measures["domains"]["information"]),
        "token": lambda measures: _bits(measures["tokens"]["information"]),
        "repeated first": lambda measures: _repeated(measures, "same_first"),
    }
    if has_several_choices(layers):
        columns["in common"] = lambda measures: _repeated(measures, "any_shared")
    steps = [
        measures["saturation"] and measures["saturation"]["step"][0] for measures in layers.values()
    ]
    if steps and steps[0] is not None:
        columns[f"settled at step {steps[0]:,}"] = _settled
    rows = [
        [layer_title(layer), *(show(measures) for show in columns.values())]
        for layer, measures in layers.items()
    ]
    return [["", *columns], *rows]


def flips_table(layers: Mapping[str, Layer]) -> list[list[str]]:
    """The header and a row for each layer: which share of the tokens has other experts, and when.

    Args:
      layers: the result of `measures.measure_layers`.
    """
    names = list(next(iter(layers.values()))["flips"])
    rows = [
        [layer_title(layer), *(_flipped(measures["flips"][name]) for name in names)]
        for layer, measures in layers.items()
    ]
    return [["", *names], *rows]


def has_several_choices(layers: Mapping[str, Layer]) -> bool:
    """Whether some token chose two experts of a layer."""
    return any(measures["coactivation"]["random"] for measures in layers.values())


def text_table(table: list[list[str]]) -> str:
    """A table for a terminal, columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in table]
    return "\n".join("  ".join(line) for line in lines)


def _bits(information: Layer) -> str:
    return f"{information['bits']:.3f} ({information['shuffled']:.3f})"


def _repeated(measures: Layer, kind: str) -> str:
    found, shuffled = measures["repetition"][kind], measures["repetition"]["shuffled"][kind]
    return "-" if found is None else f"{found:.1%} ({shuffled:.1%})"


def _settled(measures: Layer) -> str:
    found = measures["saturation"]
    return f"{found['all'][0]:.0%} ({found['random']['all']:.0%})"


def _flipped(found: Layer) -> str:
    return f"{found['first']:.1%} ({found['set']:.1%})"
