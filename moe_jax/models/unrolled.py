"""Models without repeated layers: the same layers, each with its own arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moe_jax.models.layout import StackLayout
from moe_jax.models.model import LanguageModel


def unrolled(model: LanguageModel) -> LanguageModel:
    """The model without repeated layers; a stack with tied parts does not change.

    `adapters` is None, since its names may refer to repeated layers. Adapted weights stay adapted
    in the parameters.
    """

    def apart(layout: StackLayout) -> StackLayout:
        if not is_unrolled(layout):
            return layout
        first = layout.first + layout.unit * layout.repeats
        return dataclasses.replace(layout, first=first, unit=(), repeats=0)

    layouts = {name: apart(layout) for name, layout in model.layouts.items()}
    return dataclasses.replace(model, adapters=None, **dict[str, Any](layouts))


def unrolled_params(
    model: LanguageModel, params: Any, cut: Callable[[Any, int], Any]
) -> dict[str, Any]:
    """The parameters of `unrolled`.

    Args:
      model: the model with repeated layers.
      params: its parameters.
      cut: function of an array with a leading dim of repeats, and an index; returns the entry.
    """
    stacks = {
        name: layers_of(layout, params[name], cut)
        for name, layout in model.layouts.items()
        if is_unrolled(layout)
    }
    return {**params, **stacks}


def is_unrolled(layout: StackLayout) -> bool:
    """Whether `unrolled` changes a stack."""
    return layout.repeats > 0 and not layout.tied


def layers_of(layout: StackLayout, tree: Any, cut: Callable[[Any, int], Any]) -> dict[str, Any]:
    """A tree by position with the repeated layers moved to the end of `first`."""
    first = dict(tree["first"])
    for repeat in range(layout.repeats):
        for i in range(len(layout.unit)):
            first[str(len(first))] = jax.tree.map(
                lambda array, at=repeat: cut(array, at), tree["unit"][str(i)]
            )
    return {**tree, "first": first, "unit": {}}
