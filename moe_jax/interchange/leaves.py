"""The parameters of a model one by one, each with its layers."""

from typing import Any, NamedTuple

import jax

from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import NAME
from moe_jax.parameters import ParameterSpec

STATE = "state"  # key in a tree of parameters for arrays updated outside the optimizer


class Leaf(NamedTuple):
    """A parameter of a model, or an array of its state.

    Attributes:
      path: in the tree of `all_specs`, such as ("stack", "unit", "0", "moe", "experts", "wi").
      key: as in a rule: the same in every layer, such as "moe/experts/wi".
      layers: numbers of its layers in their stack; () outside the layers.
      stacked: whether it has a leading layer dim.
      spec: of the array.
    """

    path: tuple[str, ...]
    key: str
    layers: tuple[int, ...]
    stacked: bool
    spec: ParameterSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in one layer."""
        return self.spec.shape[1:] if self.stacked else self.spec.shape


def all_specs(model: LanguageModel) -> dict[str, Any]:
    """Specs of the parameters, plus the state under "state" if the model has any."""
    state = model.state_specs()
    return {**model.specs(), **({STATE: state} if state else {})}


def leaves_of(model: LanguageModel) -> list[Leaf]:
    """Every parameter and every array of the state."""
    found = jax.tree_util.tree_leaves_with_path(all_specs(model))
    return [leaf_at(model, tuple(entry.key for entry in path), spec) for path, spec in found]


def leaf_at(model: LanguageModel, path: tuple[str, ...], spec: ParameterSpec) -> Leaf:
    """The parameter at a path."""
    if path[0] == STATE:
        _, part, *rest = path
        key = "/".join((part.removeprefix(f"{NAME}_"), *rest))
        return Leaf(path, key, model.layers_of[part], True, spec)
    if path[0] == NAME:  # a module counts as a layer after the others
        inner = path[4:] if path[1] == "stack" else path
        return Leaf(path, "/".join(inner), model.layers_of[NAME], True, spec)
    if path[0] not in model.layouts:
        return Leaf(path, "/".join(path), (), False, spec)
    _, segment, place, *rest = path
    layout, prefix = model.layouts[path[0]], () if path[0] == "stack" else path[:1]
    if segment not in ("first", "unit", "last"):
        return Leaf(path, "/".join((*prefix, *path[1:])), (), False, spec)
    start = {"first": 0, "unit": len(layout.first)}
    start["last"] = start["unit"] + len(layout.unit) * layout.repeats
    rounds = range(layout.repeats if segment == "unit" else 1)
    layers = tuple(start[segment] + int(place) + r * len(layout.unit) for r in rounds)
    return Leaf(path, "/".join((*prefix, *rest)), layers, segment == "unit", spec)
