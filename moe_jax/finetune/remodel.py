"""A model out of another of as many layers: some parts replaced, all else carried.

Dense to sparse, sparse to dense, fewer experts: each says how one array of one layer of a new part
comes out of those of the old part (`Origin`). Where arrays lie in both trees, and in what order
they are made so that a large model is never there twice, is here. Legend: `moe_jax.moe`.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig
from moe_jax.interchange.leaves import Leaf, leaf_at, leaves_of
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import ParameterSpec, init_parameters

Path = tuple[str, ...]
NORMS = ("_norm", "_post_norm")  # of a branch, beside it in its layer


class Origin:
    """How the parameters of a part of the new model come out of those of the old one.

    Attributes:
      spec_of: the `ParameterSpec` of every parameter of one layer of the new part, by its path.
      per_layer: an array for each layer, by its number through all stacks, or nothing.
    """

    spec_of: Mapping[Path, ParameterSpec]
    per_layer: Mapping[int, np.ndarray] | None = None

    def needs(self, path: Path) -> tuple[Path, ...]:
        """The parameters of the old part that a new one is made of; () of one that is drawn."""
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
          old: what it needs, of one layer.
          key: random key of the layer.
          own: what `per_layer` has for it.
          moment: whether these are an optimizer's moments in place of the parameters.
        """
        raise NotImplementedError

    def state(self, start: Any, old: Any, layers: Sequence[int]) -> Any:
        """What the new part keeps outside the optimizer, such as a selection bias.

        Args:
          start: as a new model has it, with a leading dim of layers.
          old: of the old part of the same name, or None.
          layers: their numbers.
        """
        del old, layers
        return start

    def make_other(
        self, path: Path, old: jax.Array, own: jax.Array | None, shape: tuple[int, ...]
    ) -> jax.Array:
        """What an optimizer keeps for the first parameter in `needs` in another shape than its own.

        Args:
          path: of the new parameter.
          old: of one layer.
          own: what `per_layer` has for the layer.
          shape: that the optimizer keeps for the new parameter.

        Raises:
          ValueError: it has no meaning for the new parameter.
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
    """Where the array of one layer is: the path in the tree, and the row of a stacked one."""

    path: Path
    row: int | None


class Recipe(NamedTuple):
    """How an array of the new tree is made.

    Attributes:
      path: of the parameter within its part; of one that is carried not used.
      origin: of its part; None: it is carried.
      old: for each layer, the places of what it needs.
      layers: their numbers through all stacks; () outside the layers.
      stacked: whether the array has a leading dim of layers.
      unmoved: the path of the old array that the new one is, as it is; None if there is none.
    """

    path: Path
    origin: Origin | None
    old: tuple[tuple[Place, ...], ...]
    layers: tuple[int, ...]
    stacked: bool
    unmoved: Path | None


@dataclasses.dataclass(frozen=True)
class Remodel:
    """Two models of as many layers with as many branches, and the origins of what is replaced.

    Attributes:
      old: the config of the old model.
      new: of the new one.
      origins: by the name of a part of the new model that takes the place of another.
    """

    old: ExperimentConfig
    new: ExperimentConfig
    origins: Mapping[str, Origin]

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
        """How one of them is made."""
        stack = leaf.path[0]
        if stack not in start or not leaf.layers:
            return Recipe((), None, ((Place(leaf.path, None),),), (), False, leaf.path)
        segment, key, rest = *leaf.path[1:3], leaf.path[3:]
        branch, *inner = rest
        names = self.old_names(stack, segment, int(key), leaf.layers[0])
        before, part = names.get(branch, (branch, ""))
        origin, path = self.origins.get(part), tuple(inner)
        needed = ((),) if origin is None else origin.needs(path)
        wanted = [(before, *(path if origin is None else one)) for one in needed]
        old = tuple(
            tuple(places[stack, *one][layer] for one in wanted) for layer in leaf.layers
        )  # fmt: skip
        numbers = tuple(start[stack] + layer for layer in leaf.layers)
        unmoved = None
        if origin is None:
            first = old[0][0]
            of_first = [one for one in places[stack, *wanted[0]].values() if one.path == first.path]
            same = [one for (one,) in old] == of_first and leaf.stacked == (first.row is not None)
            unmoved = first.path if same else None
        return Recipe(path, origin, old, numbers, leaf.stacked, unmoved)

    def old_names(
        self, stack: str, segment: str, place: int, layer: int
    ) -> dict[str, tuple[str, str]]:
        """By the keys of a new layer: the key in the old layer, and the part if it is a branch's.

        Args:
          stack: its name.
          segment: of the new stack.
          place: of the layer in the segment.
          layer: its number in the stack.
        """
        new = getattr(self.new.model.stacks[stack], segment)[place]
        old = layer_of(self.old.model, stack, layer)
        names: dict[str, tuple[str, str]] = {}
        for (after, _), (before, _), (part, _) in zip(
            new.named, old.named, new.branches, strict=True
        ):
            names |= {after + norm: (before + norm, "") for norm in NORMS}
            names[after] = (before, part)
        return names


def layer_of(model: LanguageModel, stack: str, layer: int) -> Any:
    """The layer of this number in a stack."""
    of = model.stacks[stack]
    return (of.first + of.unit * of.repeats + of.last)[layer]


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
    """The parameters of the new model, made one after another where each lies on the mesh.

    Args:
      remodel: the two models.
      params: of the old one, on the mesh.
      key: of what is drawn.
      mesh: of both.
      donate: delete an array of the old model when nothing more is made of it, so that both
        models are never there at once.
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
    """New arrays by path, of old ones by path; see `remodelled`."""
    left = collections.Counter(
        one.path for path in specs for layer in remodel.recipes[path].old for one in layer
    )
    made: dict[Path, jax.Array] = {}
    kept = {remodel.recipes[path].unmoved for path in specs}
    for path, spec in specs.items():
        recipe = remodel.recipes[path]
        if recipe.unmoved is not None:
            made[path] = arrays[recipe.unmoved]
            continue
        sharding = named_sharding(spec.axes, mesh)
        made[path] = made_of(recipe, arrays, key, sharding)
        used = collections.Counter(one.path for layer in recipe.old for one in layer)
        left -= used
        for name in used:
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
    """One array of the new tree, as one program.

    Args:
      recipe: how it is made.
      arrays: of the old tree, by path.
      key: of what is drawn.
      sharding: of the new array.
      moment: see `Origin.make`.
      shape: of one layer, if it is not that of the parameter; see `Origin.make_other`.
    """
    names = sorted({one.path for layer in recipe.old for one in layer})

    def program(key: jax.Array, *given: jax.Array) -> jax.Array:
        gathered = gather(recipe, dict(zip(names, given, strict=True)))
        origin, path = recipe.origin, recipe.path
        if origin is None:
            return gathered[0]

        def one(key: jax.Array, own: jax.Array | None, *old: jax.Array) -> jax.Array:
            if shape is not None:
                return origin.make_other(path, old[0], own, shape)
            return origin.make(path, old, key, own, moment)

        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(recipe.layers))
        own = None
        if origin.per_layer is not None:
            own = jnp.stack([jnp.asarray(origin.per_layer[layer]) for layer in recipe.layers])
        if recipe.stacked:
            return jax.vmap(one)(keys, own, *gathered)
        return one(keys[0], None if own is None else own[0], *gathered)

    with jax.set_mesh(sharding.mesh):
        return jax.jit(program, out_shardings=sharding)(key, *(arrays[name] for name in names))


def gather(recipe: Recipe, arrays: Mapping[Path, jax.Array]) -> list[jax.Array]:
    """What the layers of a recipe need, each with their dim in front if it is stacked."""
    if not recipe.stacked:
        (places,) = recipe.old
        return [row_of(arrays[one.path], one.row) for one in places]
    gathered = []
    for places in zip(*recipe.old, strict=True):
        rows = [one.row for one in places]
        if len({one.path for one in places}) == 1 and None not in rows:
            gathered.append(arrays[places[0].path][np.asarray(rows)])
        else:
            gathered.append(jnp.stack([row_of(arrays[one.path], one.row) for one in places]))
    return gathered


def row_of(array: jax.Array, row: int | None) -> jax.Array:
    """A row of a stacked array; None: all of it."""
    return array if row is None else array[row]


def path_of(path: tuple[Any, ...]) -> Path:
    """The keys of a path through dicts."""
    return tuple(entry.key for entry in path)


def leaves_with_path(tree: Any) -> list[tuple[Any, Any]]:
    """The leaves of a tree with their paths."""
    return jax.tree_util.tree_leaves_with_path(tree)


def unflatten(like: Any, made: Mapping[Path, jax.Array]) -> Any:
    """A tree like another, of arrays by path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: made[path_of(path)], like)


def remodelled_state(remodel: Remodel, state: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """What parts of the new model keep outside the optimizer, by part; see `Origin.state`."""
    start = init_parameters(key, remodel.new.model.state_specs())
    return {
        part: state[part]
        if part not in remodel.origins
        else remodel.origins[part].state(own, state.get(part), remodel.new.model.layers_of[part])
        for part, own in start.items()
    }
