"""Which parameters train, at which rate, and the tree of trained parameters.

The trained parameters are a tree like the parameters, with None for frozen parameters. `jax.tree`
skips None, so gradients and optimizer state exist only for trained parameters. If everything
trains, it is the tree of the parameters.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.config import OptimizerConfig
from moe_jax.config.check import require
from moe_jax.models.multi_token import NAME, joined
from moe_jax.models.selection import check_names, marked, matches, words_of
from moe_jax.parameters import ParameterSpec
from moe_jax.weights.low_rank import ADAPTERS

if TYPE_CHECKING:
    from moe_jax.models.model import LanguageModel


def training_marks(settings: OptimizerConfig, specs: Any) -> Any:
    """Which parameters train: in `trainable`, not in `frozen`, and able to train.

    Args:
      settings: of the optimizer.
      specs: the tree of `ParameterSpec` of a model or of its state.

    Returns:
      bools in the same tree.
    """
    chosen, frozen = marked(specs, settings.trainable), marked(specs, settings.frozen)
    return jax.tree.map(
        lambda spec, yes, no: yes and not no and can_train(spec), specs, chosen, frozen
    )


def can_train(spec: ParameterSpec) -> bool:
    """Whether an array may be trained and small steps can change it (not integers, for example)."""
    return spec.trains and jnp.dtype(spec.dtype) in (jnp.float32, jnp.bfloat16)


def filter_tree(tree: Any, marks: Any) -> Any:
    """The tree with None for leaves that are not marked."""
    return jax.tree.map(lambda mark, leaf: leaf if mark else None, marks, tree)


def combine(trained: Any, params: Any) -> Any:
    """The parameters with the leaves of `trained` where it has one, and not None."""
    return jax.tree.map(
        lambda own, leaf: leaf if own is None else own,
        trained,
        params,
        is_leaf=lambda own: own is None,
    )


def filter_like(trained: Any, tree: Any) -> Any:
    """The tree with None where `trained` is None."""
    return jax.tree.map(
        lambda own, leaf: None if own is None else leaf,
        trained,
        tree,
        is_leaf=lambda own: own is None,
    )


def training_specs(settings: OptimizerConfig, specs: Any) -> Any:
    """The specs of the parameters that train; None elsewhere."""
    return filter_tree(specs, training_marks(settings, specs))


def moving_state(settings: OptimizerConfig, model: "LanguageModel") -> dict[str, Any]:
    """Which arrays of the state of parts are updated, by part: bools in the tree of `state_specs`.

    A selection bias has the component "router" and is updated if the trained names choose it. With
    frozen="router" or trainable="experts", routers and biases stay fixed.
    """
    return over_state(model, lambda specs: training_marks(settings, specs))


def over_state(model: "LanguageModel", mark: Callable[[Any], Any]) -> dict[str, Any]:
    """Applies `mark` to the specs of the state of parts; returns its result by part.

    `mark` gets the specs by stack, under "state", and returns a tree like that.
    """
    marks: dict[str, Any] = {}
    for stack, own in mark(state_by_stack(model))["state"].items():
        marks |= joined(own) if stack == NAME else own
    return marks


def state_by_stack(model: "LanguageModel") -> dict[str, Any]:
    """The specs of the state of parts, by stack, under "state"."""
    specs = {name: stack.state_specs(model.dims) for name, stack in model.stacks.items()}
    if model.modules is not None:
        specs[NAME] = model.modules.stack.state_specs(model.dims)
    return {"state": specs}


def rate_factors(settings: OptimizerConfig, specs: Any) -> Any:
    """The learning-rate factor of each parameter, in the tree of `specs`."""

    def factor(path: tuple[Any, ...], spec: ParameterSpec) -> float:
        words = words_of(path, spec)
        return next((f for name, f in settings.learning_rates if matches(name, words)), 1.0)

    return jax.tree_util.tree_map_with_path(factor, specs)


def check_trained(settings: OptimizerConfig, model: "LanguageModel") -> None:
    """Checks the optimizer's names of parameters against a model.

    Raises:
      ValueError: a name chooses nothing, nothing trains, or a parameter is in two groups.
    """
    require(
        model.adapters is None or "all" not in settings.trainable,
        "a model with adapters must name what trains",
        f"optimizer.trainable={settings.trainable}",
        f"Set optimizer.trainable={ADAPTERS}, or name more beside them",
    )
    if settings.chosen == ("all",):
        return
    specs = model.specs()
    check_names({**specs, **state_by_stack(model)}, (*settings.trainable, *settings.frozen))
    require(
        any(jax.tree.leaves(training_marks(settings, specs))),
        "some parameter must train",
        f"optimizer.trainable={settings.trainable}, optimizer.frozen={settings.frozen}",
        "Freeze less",
    )
    trained = training_specs(settings, specs)
    names = [name for name, _ in settings.learning_rates]
    check_names(trained, names)
    for path, spec in jax.tree_util.tree_leaves_with_path(trained):
        groups = [name for name in names if matches(name, words_of(path, spec))]
        require(
            len(groups) < 2,
            "each parameter must be in only one group of optimizer.learning_rates",
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} is in {groups}",
            "Join names by '/' to choose less",
        )


def count_trained(settings: OptimizerConfig, specs: Any) -> dict[str, dict[str, int]]:
    """Parameters by component, as in `run.json`: {"experts": {"trained": 8, "total": 8}, ...}.

    Args:
      settings: of the optimizer.
      specs: of the parameters of a model.
    """
    counts: dict[str, dict[str, int]] = {}
    marks = jax.tree.leaves(training_marks(settings, specs))
    for spec, mark in zip(jax.tree.leaves(specs), marks, strict=True):
        count = counts.setdefault(spec.component, {"trained": 0, "total": 0})
        count["total"] += spec.size
        count["trained"] += spec.size if mark else 0
    return counts


def describe_trained(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The result of `count_trained` as one line.

    >>> describe_trained({"router": {"trained": 0, "total": 8}, "experts": {"trained": 64,
    ...                   "total": 64}})
    'trains 64 of 72 parameters: router 0 of 8, experts 64 of 64'
    """
    trained, total = (sum(count[key] for count in counts.values()) for key in ("trained", "total"))
    if trained == total:
        return f"trains all {total:,} parameters"
    groups = (f"{name} {one['trained']:,} of {one['total']:,}" for name, one in counts.items())
    return f"trains {trained:,} of {total:,} parameters: {', '.join(groups)}"
