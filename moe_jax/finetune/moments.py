"""The optimizer state of a model made from another (legend: `moe_jax.moe`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moe_jax.config import ExperimentConfig
from moe_jax.finetune.remodel import Path, Remodel, leaves_with_path, made_of, path_of
from moe_jax.parallel.rules import named_sharding
from moe_jax.training.optimizers import make_optimizer
from moe_jax.training.placement import axes_of_moment
from moe_jax.training.state import abstract_state, trained_params

# Optimizer states that contain parameters, not moments: averages, and Schedule-Free's z.
PARAMETERS = ("average", "z")


class Kept(NamedTuple):
    """An array that an optimizer keeps for a parameter.

    Attributes:
      before: the path in the optimizer's state to its tree of parameters.
      path: of the parameter.
      after: the path from there to the array.
    """

    before: tuple[Any, ...]
    path: Path
    after: tuple[Any, ...]

    @property
    def is_moment(self) -> bool:
        """Whether it is a moment, not a copy of the parameter."""
        return not any(getattr(entry, "name", "") in PARAMETERS for entry in self.before)

    def of(self, path: Path) -> tuple[Any, ...]:
        """The path of the same kind of array for another parameter."""
        return (*self.before, *map(jax.tree_util.DictKey, path), *self.after)


def kept_of(path: tuple[Any, ...], parameters: Any) -> Kept | None:
    """The array at a path in an optimizer's state; None if it belongs to no parameter."""
    is_key = [isinstance(entry, jax.tree_util.DictKey) for entry in path]
    start = is_key.index(True) if any(is_key) else len(path)
    for end in range(len(path), start, -1):
        if all(is_key[start:end]) and path_of(path[start:end]) in parameters:
            return Kept(path[:start], path_of(path[start:end]), path[end:])
    return None


def remodelled_optimizer(
    remodel: Remodel, opt_state: Any, params: Any, key: jax.Array, mesh: Mesh
) -> Any:
    """The optimizer state of the new model: moments are carried and copied as parameters are.

    A newly drawn parameter, such as a router's, has moments of 0. The step count of Adam is
    one for all parameters and is carried, so the correction for its first steps is missing.

    Args:
      remodel: the two models; both configs have the same optimizer.
      opt_state: of the old model, on the mesh.
      params: of the old model; where it has no average of a frozen parameter, the new one starts at
        the new parameter.
      key: the same as for the parameters.
      mesh: of both.

    Raises:
      ValueError: the optimizer's state has arrays that cannot be carried.
    """
    old = dict(leaves_with_path(opt_state))
    old_params = {path_of(path): array for path, array in leaves_with_path(params)}
    specs = {path_of(path): spec for path, spec in leaves_with_path(remodel.new.model.specs())}
    wanted = abstract_state(remodel.new).opt_state
    fresh: dict[tuple[Any, ...], NamedSharding] = {}

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        kept = kept_of(path, specs)
        if kept is None:
            return old[path]
        recipe, spec = remodel.recipes[kept.path], specs[kept.path]
        needed = {name: kept.of(name) for name in recipe.needed}
        sharding = named_sharding(axes_of_moment(spec.axes, spec.shape, leaf.shape), mesh)
        is_carried = set(needed.values()) <= set(old)
        if kept.is_moment and not (needed and is_carried):
            fresh[path] = sharding
            return leaf
        arrays = old_params
        if is_carried:
            arrays = {name: old[where] for name, where in needed.items()}
        shape = None if leaf.shape == spec.shape else leaf.shape[recipe.stacked :]
        return made_of(recipe, arrays, key, sharding, moment=kept.is_moment, shape=shape)

    made = jax.tree_util.tree_map_with_path(make, wanted)
    start = started(remodel.new, fresh)
    return jax.tree_util.tree_map_with_path(lambda path, one: start.get(path, one), made)


def started(
    config: ExperimentConfig, shardings: dict[tuple[Any, ...], NamedSharding]
) -> dict[tuple[Any, ...], jax.Array]:
    """Some moments before the first step, by path; they do not depend on the parameters."""

    def some() -> dict[str, jax.Array]:
        params = jax.tree.map(
            lambda one: jnp.zeros(one.shape, one.dtype), abstract_state(config).params
        )
        trained = trained_params(config, params)
        state = dict(leaves_with_path(make_optimizer(config).init(trained)))
        return {str(place): state[path] for place, path in enumerate(shardings)}

    places = {str(place): sharding for place, sharding in enumerate(shardings.values())}
    made = jax.jit(some, out_shardings=places)() if shardings else {}
    return {path: made[str(place)] for place, path in enumerate(shardings)}
