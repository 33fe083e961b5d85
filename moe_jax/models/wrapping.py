"""Which parameters of a model are replaced by weights of several arrays."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.models.selection import select
from moe_jax.parameters import ParameterSpec, Weight, dense
from moe_jax.weights.quantised import Quantisation, axis_of

if TYPE_CHECKING:
    from moe_jax.models.model import LanguageModel

# Components whose weights do not change unless a name contains the component.
NAMED_ALONE = ("embedding", "head", "router")


class Wrapping(Protocol):
    """A setting that replaces some matrices by a `Weight`.

    Attributes:
      names: of the parameters, as for `selection.select`.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """See the class."""

    def wrap(self, name: str, spec: ParameterSpec, inner: Any) -> Any:
        """The specs of the arrays that replace a matrix; `inner`: those that it has so far."""


def wrapped(specs: Any, wrappings: Sequence[Wrapping | None]) -> Any:
    """The tree of a model whose matrices are wrapped by one setting after another.

    Args:
      specs: of the plain parameters.
      wrappings: the settings; None changes nothing.

    Raises:
      ValueError: a name chooses no matrix, or a matrix cannot be wrapped.
    """
    tree = specs
    for wrapping in wrappings:
        if wrapping is None:
            continue

        def wrap(path: Any, mark: bool, spec: Any, inner: Any, wrapping: Any = wrapping) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return wrapping.wrap(name, spec, inner) if mark else inner

        tree = jax.tree_util.tree_map_with_path(wrap, chosen_by(wrapping, specs), specs, tree)
    return tree


def chosen_by(wrapping: Wrapping, specs: Any) -> Any:
    """Whether each plain parameter is wrapped: bools in their tree.

    Raises:
      ValueError: a name chooses no parameter, or no name chooses a matrix.
    """
    words = {word for name in wrapping.names for word in name.split("/")}

    def is_meant(mark: bool, spec: ParameterSpec) -> bool:
        named = spec.component not in NAMED_ALONE or spec.component in words
        return mark and named and can_be_wrapped(spec)

    marks = jax.tree.map(is_meant, select(specs, wrapping.names), specs)
    require(
        any(jax.tree.leaves(marks)),
        "names must choose at least one matrix",
        f"names={wrapping.names} of {type(wrapping).__name__}",
        "Name a component that has one, such as 'experts' or 'attention'",
    )
    return marks


def can_be_wrapped(spec: ParameterSpec) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices, that a `Weight` can replace."""
    dims = spec.shape[spec.num_stacked :]
    is_weight = spec.decays or spec.component == "embedding"
    return is_weight and len(dims) == 2 and min(dims) > 1


def dense_params(params: Any) -> Any:
    """The parameters as plain float32 arrays: dequantised, with adapters added."""
    return jax.tree.map(
        lambda leaf: dense(leaf).astype(jnp.float32),
        params,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


def describe_dense(model: "LanguageModel") -> str:
    """What `dense_params` does to a model, as lines to print; "" for a plain one."""
    how, adapters = model.quantisation, model.adapters
    lines = []
    if how is not None:
        lines.append(f"weights of {how.bits} bits ({', '.join(how.names)}) are written as floats\n")
    if adapters is not None:
        lines.append(f"adapters ({', '.join(adapters.names)}) are merged into their matrices\n")
    return "".join(lines)


def plain_model(model: "LanguageModel") -> "LanguageModel":
    """The model with plain parameters, as from `dense_params`."""
    return dataclasses.replace(model, quantisation=None, adapters=None)


def require_plain(model: "LanguageModel") -> None:
    """Refuses a model with adapters or quantised weights, whose arrays have other paths.

    Raises:
      ValueError: with the command that makes its weights plain.
    """
    require(
        model.adapters is None,
        "the model must have plain weights",
        f"it has adapters of {', '.join(model.adapters.names)}" if model.adapters else "",
        "Run merge_adapters first",
    )
    require(
        model.quantisation is None,
        "the model must have plain weights",
        f"it has weights of {model.quantisation.bits} bits" if model.quantisation else "",
        "Use the run that was quantised",
    )


def quantised_params(params: Any, specs: Any, quantisation: Quantisation) -> Any:
    """Quantises the parameters that the setting chooses.

    Works matrix by matrix: memory holds the result and one more matrix. The original arrays of
    quantised parameters are deleted.

    Args:
      params: of the plain model; quantised leaves are deleted.
      specs: of the plain model.
      quantisation: chooses the parameters and the format.
    """

    def matrices(weight: jax.Array, stacked: int, axis: int) -> Any:
        if stacked == 0:
            return quantisation.apply(weight, axis)
        return jax.lax.map(lambda one: matrices(one, stacked - 1, axis), weight)

    compiled = jax.jit(matrices, static_argnums=(1, 2))

    def one(mark: bool, spec: ParameterSpec, weight: jax.Array) -> Any:
        if not mark:
            return weight
        found = jax.block_until_ready(compiled(weight, spec.num_stacked, axis_of(spec)))
        weight.delete()
        return found

    return jax.tree.map(one, chosen_by(quantisation, specs), specs, params)
