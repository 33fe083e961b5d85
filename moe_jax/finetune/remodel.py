"""Makes a model from another with the same number of layers: replaces parts, carries the rest.

An `Origin` computes one array of one layer of a new part from arrays of the old part: dense to
sparse, sparse to dense, or fewer experts. This module finds arrays in both trees and orders the
work so that memory never contains a large model twice. Legend: `moe_jax.moe`.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig
from moe_jax.interchange.leaves import Leaf, leaf_at, leaves_of
from moe_jax.models.layout import LayerNames, StackLayout
from moe_jax.models.model import LanguageModel
from moe_jax.models.selection import ALL, marked
from moe_jax.models.trained import state_by_stack, training_marks, training_specs
from moe_jax.models.wrapping import dense_params, plain_model
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import ParameterSpec, init_parameters
from moe_jax.part import Dims, Part

Path = tuple[str, ...]
NORMS = ("_norm", "_post_norm")  # of a branch, beside it in its layer


class Origin:
    """How the parameters of a new part are made from those of the old part.

    Attributes:
      spec_of: the `ParameterSpec` of every parameter of one layer of the new part, by its path.
      per_layer: an array per layer, by its number across all stacks; or None.
    """

    spec_of: Mapping[Path, ParameterSpec]
    per_layer: Mapping[int, np.ndarray] | None = None

    def needs(self, path: Path) -> tuple[Path, ...]:
        """The old parameters from which a new one is made; () if it is drawn."""
        raise NotImplementedError

    def make(
        self,
        path: Path,
        old: Sequence[jax.Array],
        key: jax.Array,
        own: jax.Array | None,
        moment: bool,
    ) -> jax.Array:
        """A parameter of one layer of the new part; a pure function.

        Args:
          path: in the part, such as ("experts", "wi").
          old: the parameters that it needs, of one layer.
          key: random key of the layer.
          own: the entry of `per_layer` for the layer.
          moment: whether the arrays are optimizer moments in place of parameters.
        """
        raise NotImplementedError

    def state(self, start: Any, old: Any, layers: Sequence[int]) -> Any:
        """The state of the new part outside the optimizer, such as a selection bias.

        Args:
          start: the state in a new model, with a leading dim of layers.
          old: the state of the old part of the same name, or None.
          layers: numbers of the layers.
        """
        del old, layers
        return start

    def make_other(
        self, path: Path, old: jax.Array, own: jax.Array | None, shape: tuple[int, ...]
    ) -> jax.Array:
        """Converts an optimizer array whose shape differs from that of its parameter.

        Args:
          path: of the new parameter.
          old: the array for the first parameter in `needs`, of one layer.
          own: the entry of `per_layer` for the layer.
          shape: of the optimizer's array for the new parameter.

        Raises:
          ValueError: the array has no meaning for the new parameter.
        """
        del own
        if old.shape != shape[-old.ndim :] and old.ndim:
            raise ValueError(
                f"what an optimizer keeps for {'/'.join(path)} must have its shape, or be the same "
                f"for each expert: {old.shape} of the old model, {shape} of the new. Leave out the "
                "optimizer state."
            )
        return jnp.broadcast_to(old, shape)


class Place(NamedTuple):
    """Where the array of one layer is: its path in the tree, and its row if it is stacked."""

    path: Path
    row: int | None


class Row(NamedTuple):
    """How an array of one layer of the new tree is made.

    Attributes:
      origin: of its part; None: the array is carried.
      path: of the parameter within its part.
      old: places of the old arrays that it needs.
      layer: number of the layer across all stacks.
    """

    origin: Origin | None
    path: Path
    old: tuple[Place, ...]
    layer: int


class Recipe(NamedTuple):
    """How an array of the new tree is made.

    Attributes:
      rows: one per layer; a single row for an array outside the layers.
      stacked: whether the array has a leading dim of layers.
      unmoved: path of the old array if the new one is identical; None if there is none.
    """

    rows: tuple[Row, ...]
    stacked: bool
    unmoved: Path | None

    @property
    def needed(self) -> collections.Counter[Path]:
        """The old arrays that it needs, and how often."""
        return collections.Counter(one.path for row in self.rows for one in row.old)


@dataclasses.dataclass(frozen=True)
class Remodel:
    """Two models with equal numbers of layers and branches, and the origins of replaced parts.

    Attributes:
      old: the config of the old model.
      new: the config of the new model.
      origins: by (name of the old part, name of the new part in its place).
    """

    old: ExperimentConfig
    new: ExperimentConfig
    origins: Mapping[tuple[str, str], Origin]

    @functools.cached_property
    def recipes(self) -> dict[Path, Recipe]:
        """How every parameter of the new model is made, by its path."""
        old, new = self.old.model, self.new.model
        places = places_of(old)
        start: dict[str, int] = {}
        for name, stack in new.stacks.items():
            start[name] = sum(new.stacks[other].num_layers for other in start)
            assert stack.num_layers == old.stacks[name].num_layers, name
        found = jax.tree_util.tree_leaves_with_path(new.specs())
        leaves = (leaf_at(new, tuple(entry.key for entry in path), spec) for path, spec in found)
        return {leaf.path: self.recipe(leaf, places, start) for leaf in leaves}

    def recipe(
        self, leaf: Leaf, places: Mapping[Path, Mapping[int, Place]], start: Mapping[str, int]
    ) -> Recipe:
        """How one parameter is made."""
        stack = leaf.path[0]
        if stack not in start or not leaf.layers:
            row = Row(None, (), (Place(leaf.path, None),), 0)
            return Recipe((row,), False, leaf.path)
        segment, key, branch, *inner = leaf.path[1:]
        layer = getattr(self.new.model.stacks[stack], segment)[int(key)]
        rows = []
        for number in leaf.layers:
            before, origin = self.old_branch(stack, number, layer, branch)
            needed = (tuple(inner),) if origin is None else origin.needs(tuple(inner))
            old = tuple(places[stack, before, *one][number] for one in needed)
            rows.append(Row(origin, tuple(inner), old, start[stack] + number))
        return Recipe(tuple(rows), leaf.stacked, unmoved(rows, leaf.stacked, places))

    def old_branch(
        self, stack: str, number: int, layer: Any, key: str
    ) -> tuple[str, Origin | None]:
        """The old key of a branch or norm of a new layer, and the origin of a branch.

        Args:
          stack: name of the stack.
          number: of the layer in the stack.
          layer: the new layer.
          key: of the branch or norm in the new layer.
        """
        of = self.old.model.stacks[stack]
        old = (of.first + of.unit * of.repeats + of.last)[number]
        branches = zip(old.named, old.branches, layer.named, layer.branches, strict=True)
        for (before, _), (old_part, _), (after, _), (new_part, _) in branches:
            if key == after:
                return before, self.origins.get((old_part, new_part))
            if key in (after + norm for norm in NORMS):
                return before + key.removeprefix(after), None
        return key, None


def unmoved(
    rows: Sequence[Row], stacked: bool, places: Mapping[Path, Mapping[int, Place]]
) -> Path | None:
    """See `Recipe`: the path of the old array with exactly these rows, in this order."""
    if any(row.origin is not None for row in rows):
        return None
    first = rows[0].old[0]
    of_first = [one for own in places.values() for one in own.values() if one.path == first.path]
    same = [row.old[0] for row in rows] == of_first and stacked == (first.row is not None)
    return first.path if same else None


def with_parts(
    model: LanguageModel, parts: Mapping[str, Part], layouts: Mapping[str, StackLayout]
) -> LanguageModel:
    """A model with other stacks, and with only the parts that a layer names."""
    used = {name for layout in layouts.values() for name in layout.names}
    used |= set(model.multi_token.layer) if model.multi_token else set()
    kept = {name: part for name, part in parts.items() if name in used}
    return dataclasses.replace(model, parts=kept, **dict[str, Any](layouts))


def with_model(config: ExperimentConfig, model: LanguageModel) -> ExperimentConfig:
    """The config with another model, and with the trained names that choose parameters of it.

    A dense model has no router to freeze, for example. If nothing is left to train, all trains.
    """
    specs, old = model.specs(), config.optimizer

    def chosen(names: Sequence[str], tree: Any) -> tuple[str, ...]:
        return tuple(name for name in names if any(jax.tree.leaves(marked(tree, (name,)))))

    every = {**specs, **state_by_stack(model)}
    optimizer = dataclasses.replace(
        old,
        trainable=chosen(old.trainable, every) or (ALL,),
        frozen=chosen(old.frozen, every),
        learning_rates=(),
    )
    if not any(jax.tree.leaves(training_marks(optimizer, specs))):
        optimizer = dataclasses.replace(optimizer, trainable=(ALL,), frozen=())
    names = chosen([name for name, _ in old.learning_rates], training_specs(optimizer, specs))
    rates = tuple(pair for pair in old.learning_rates if pair[0] in names)
    optimizer = dataclasses.replace(optimizer, learning_rates=rates)
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def dense_model(config: ExperimentConfig, params: Any) -> tuple[ExperimentConfig, Any]:
    """The config and float32 parameters without quantised weights and adapters."""
    if config.model.quantisation is None and config.model.adapters is None:
        return config, params
    return with_model(config, plain_model(config.model)), dense_params(params)


def with_layers(layout: StackLayout, layers: Sequence[LayerNames]) -> StackLayout:
    """A layout with other layers."""
    names = ("shared", "tied", "causal", "allow_lookahead")
    return StackLayout.of(layers, **{name: getattr(layout, name) for name in names})


def places_of(model: LanguageModel) -> dict[Path, dict[int, Place]]:
    """Where each layer's parameters are, by stack and path in the layer, then by layer."""
    found: dict[Path, dict[int, Place]] = collections.defaultdict(dict)
    for leaf in leaves_of(model):
        if leaf.path[0] in model.stacks and leaf.layers:
            for row, layer in enumerate(leaf.layers):
                place = Place(leaf.path, row if leaf.stacked else None)
                found[leaf.path[0], *leaf.path[3:]][layer] = place
    return found


def remodelled(
    remodel: Remodel, params: Any, key: jax.Array, mesh: Mesh, *, donate: bool = False
) -> Any:
    """The parameters of the new model, made one after another in their places on the mesh.

    Args:
      remodel: the two models.
      params: of the old model, on the mesh.
      key: random key for new parameters.
      mesh: of both models.
      donate: delete an array of the old model after its last use, so that both models are never in
        memory at once.
    """
    specs = {path_of(path): spec for path, spec in leaves_with_path(remodel.new.model.specs())}
    arrays = {path_of(path): array for path, array in leaves_with_path(params)}
    made = make_arrays(remodel, arrays, specs, key, mesh, donate=donate)
    return unflatten(remodel.new.model.specs(), made)


def make_arrays(
    remodel: Remodel,
    arrays: Mapping[Path, jax.Array],
    specs: Mapping[Path, ParameterSpec],
    key: jax.Array,
    mesh: Mesh,
    *,
    donate: bool,
) -> dict[Path, jax.Array]:
    """New arrays by path, from old arrays by path; see `remodelled`."""
    recipes = {path: remodel.recipes[path] for path in specs}
    left = sum((recipe.needed for recipe in recipes.values()), collections.Counter[Path]())
    kept = {recipe.unmoved for recipe in recipes.values()}
    made: dict[Path, jax.Array] = {}
    for path, recipe in recipes.items():
        if recipe.unmoved is not None:
            made[path] = arrays[recipe.unmoved]
            continue
        made[path] = made_of(recipe, arrays, key, named_sharding(specs[path].axes, mesh))
        left -= recipe.needed
        for name in recipe.needed:
            if donate and not left[name] and name not in kept:
                jax.block_until_ready(made[path])
                arrays[name].delete()
    return made


def made_of(
    recipe: Recipe,
    arrays: Mapping[Path, jax.Array],
    key: jax.Array,
    sharding: Any,
    *,
    moment: bool = False,
    shape: tuple[int, ...] | None = None,
) -> jax.Array:
    """One array of the new tree, computed by one program.

    Args:
      recipe: how it is made.
      arrays: of the old tree, by path.
      key: random key for new parameters.
      sharding: of the new array.
      moment: see `Origin.make`.
      shape: of one layer, if it differs from the parameter's; see `Origin.make_other`.
    """
    names = sorted(recipe.needed)

    def program(key: jax.Array, *given: jax.Array) -> jax.Array:
        by_name = dict(zip(names, given, strict=True))
        pieces = [
            rows_of(list(rows), by_name, key, moment, shape)
            for _, rows in itertools.groupby(recipe.rows, lambda row: id(row.origin))
        ]
        made_X = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
        return made_X if recipe.stacked else made_X[0]

    with jax.set_mesh(sharding.mesh):
        return jax.jit(program, out_shardings=sharding)(key, *(arrays[name] for name in names))


def rows_of(
    rows: Sequence[Row],
    arrays: Mapping[Path, jax.Array],
    key: jax.Array,
    moment: bool,
    shape: tuple[int, ...] | None,
) -> jax.Array:
    """The arrays of some layers with one origin, with a leading dim; see `made_of`."""
    gathered = [gather(places, arrays) for places in zip(*(row.old for row in rows), strict=True)]
    origin, path = rows[0].origin, rows[0].path
    if origin is None:
        return gathered[0]
    layers = [row.layer for row in rows]
    own_X = None
    if origin.per_layer is not None:
        own_X = jnp.stack([jnp.asarray(origin.per_layer[layer]) for layer in layers])

    def one(key: jax.Array, own: jax.Array | None, *old: jax.Array) -> jax.Array:
        if shape is not None:
            return origin.make_other(path, old[0], own, shape)
        return origin.make(path, old, key, own, moment)

    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(layers))
    return jax.vmap(one)(keys, own_X, *gathered)


def gather(places: Sequence[Place], arrays: Mapping[Path, jax.Array]) -> jax.Array:
    """The arrays at some places, stacked."""
    rows = [one.row for one in places]
    if len({one.path for one in places}) == 1 and None not in rows:
        return arrays[places[0].path][np.asarray(rows)]
    return jnp.stack([row_of(arrays[one.path], one.row) for one in places])


def row_of(array: jax.Array, row: int | None) -> jax.Array:
    """A row of a stacked array; None: all of it."""
    return array if row is None else array[row]


def specs_by_path(part: Part, dims: Dims) -> dict[Path, ParameterSpec]:
    """The specs of a part's parameters, by path in the part."""
    return {path_of(path): spec for path, spec in leaves_with_path(part.specs(dims))}


def path_of(path: tuple[Any, ...]) -> Path:
    """The keys of a path through dicts."""
    return tuple(entry.key for entry in path)


def leaves_with_path(tree: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree with their paths."""
    return jax.tree_util.tree_leaves_with_path(tree)


def unflatten(like: Any, made: Mapping[Path, jax.Array]) -> Any:
    """A tree with the structure of `like`, from arrays by path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: made[path_of(path)], like)


def remodelled_state(remodel: Remodel, state: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """The state of the new model's parts outside the optimizer, by part; see `Origin.state`."""
    origins = {new: origin for (_, new), origin in remodel.origins.items()}
    start = init_parameters(key, remodel.new.model.state_specs())
    return {
        part: state[part]
        if part not in origins
        else origins[part].state(own, state.get(part), remodel.new.model.layers_of[part])
        for part, own in start.items()
    }
