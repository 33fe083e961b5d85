"""Models whose repeated layers lie apart: the same layers, each with arrays of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moe_jax.models.layout import StackLayout
from moe_jax.models.model import LanguageModel


def unrolled(model: LanguageModel) -> LanguageModel:
    """The model with nothing repeated; a stack with tied parts stays as it is.

    It has no setting of adapters, whose names may be of the repeated layers; a weight with an
    adapter is one in the parameters.
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
      model: with repeated layers.
      params: of it.
      cut: the entry at a place of an array that has a leading dim of repeats.
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
    """A tree by position whose repeated layers stand behind the first ones."""
    first = dict(tree["first"])
    for repeat in range(layout.repeats):
        for i in range(len(layout.unit)):
            first[str(len(first))] = jax.tree.map(
                lambda array, at=repeat: cut(array, at), tree["unit"][str(i)]
            )
    return {**tree, "first": first, "unit": {}}
