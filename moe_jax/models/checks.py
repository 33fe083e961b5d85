"""Checks of a model's stacks and of choices to replay (legend: `moe_jax.moe`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from moe_jax.config.check import require
from moe_jax.models.layer import Layer
from moe_jax.models.stack import Stack, StackLayout
from moe_jax.part import Dims

if TYPE_CHECKING:
    from moe_jax.models.model import LanguageModel


def check_names(model: "LanguageModel") -> None:
    """Checks that the layers name all parts of a model and no others.

    Raises:
      ValueError: with the wrong names.
    """
    parts, layouts = dict(model.parts), model.layouts
    used = {name for layout in layouts.values() for name in layout.names}
    used |= set(model.multi_token.layer) if model.multi_token else set()
    of = " and ".join(layouts)
    named = [*layouts, *(["multi_token.layer"] if model.multi_token else [])]
    require(
        used <= set(parts),
        f"a name in the layers of {' and '.join(named)} must be one of parts",
        f"{sorted(used - set(parts))}, parts {sorted(parts)}",
        "Add the part, or correct the name",
    )
    require(
        set(parts) <= used,
        "every part must be used by a layer",
        f"{sorted(set(parts) - used)} in no layer of {', '.join(map(str, layouts.values()))}",
        "Remove the part, or name it in a layer",
    )
    layers = {layer for layout in layouts.values() for layer in layout.layers}
    bare = sorted(name for name in layers if isinstance(name, str))
    require(
        all(isinstance(parts[name], Layer) for name in bare),
        f"a bare name in {of} must name a part that is a whole layer",
        f"{bare} of {', '.join(map(str, layouts.values()))}",
        "Write the names of a layer's branches as a tuple: ('attention', 'mlp')",
    )
    branches = [branch for stack in model.stacks.values() for branch in stack.named_parts()]
    aside = sorted({name for name, part in branches if not part.adds_to_residual})
    require(
        not aside,
        "a part that does not add to the residual cannot be a branch of a layer",
        f"{aside} in {', '.join(map(str, layouts.values()))}",
        "Name it in stack.shared",
    )
    twice = sorted({name for name, part in branches if part != model.part[name]})
    require(
        not twice,
        "parts of one name must be the same part, in whole layers too",
        f"{twice} differ between layers",
        "Rename a branch",
    )


def check_stack(name: str, layout: StackLayout, stack: Stack, dims: Dims) -> None:
    """Checks the shared and tied parts of a stack, and that a causal stack sees no later token.

    Raises:
      ValueError: with the part.
    """
    keep = [n for n, part in stack.shared if part.routes or part.state_specs(dims)]
    require(
        not keep,
        "a shared part cannot route tokens or have state",
        f"{keep} of {name}.shared={layout.shared}",
        "Put it in the layers",
    )
    in_unit = {branch for layer in stack.unit for branch, _ in layer.named}
    require(
        set(layout.tied) <= in_unit,
        f"{name}.tied must name branches of the unit",
        f"tied={layout.tied}, the unit has {sorted(in_unit)}",
        "Correct the name",
    )
    if not layout.allow_lookahead:
        stack.check_causality()


def check_replay(
    layers_of: Mapping[str, tuple[int, ...]], replay: Mapping[str, Any] | None
) -> None:
    """Checks that replayed choices match the parts and the number of their layers.

    Args:
      layers_of: the layers of the model that use each part.
      replay: choices by part, or None.

    Raises:
      ValueError: with the given shapes and the layers of the model.
    """
    layers = {name: len(found) for name, found in layers_of.items()}
    for name, choices in (replay or {}).items():
        shapes = [leaf.shape for leaf in jax.tree.leaves(choices)]
        require(
            all(len(shape) == 4 and shape[0] == layers.get(name) for shape in shapes),
            "replayed choices of a part must have the shape [layers, batch, length, choices "
            "per token]",
            f"{name!r}: {shapes}, and the model has {layers.get(name, 0)} layers of {name!r}",
            "Record them with the same model",
        )
