"""Specs of parameters, and the five functions through which code uses a weight.

A `ParameterSpec` contains all that the library needs to know about an array. Nothing is guessed
from a name. Trees of specs are nested dicts, and `jax.tree.map` turns them into parameters,
shardings and masks.

Code uses a weight through one of five functions: `linear(x, w)` for one matrix, `grouped(x, w,
layout)` for the matrices of experts, `rows(w, ids)` for a table, `columns(w, choose)` for some
outputs of a matrix, `dense(w)` for the array itself. Each accepts an array or a `Weight`: several
arrays that act as one, such as LoRA or quantised weights. Legend: `moe_jax.moe`.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """The description of a parameter before it exists; a leaf of `jax.tree`.

    Attributes:
      shape: of the array.
      axes: the name of each dim in `parallel.rules`; None for a dim that is never split.
      init: `(key, shape, dtype) -> array`.
      component: its group in parameter counts, such as "attention" or "experts". Muon leaves
        "embedding", "head" and "router" to AdamW.
      decays: whether weight decay applies: to matrices, not to norms, biases or embeddings.
      num_stacked: number of leading dims that stack separate parameters, such as layers of a scan
        or experts. An optimizer that works on whole parameters treats each separately.
      dtype: of the array.
      trains: whether it may be trained: not quantised weights, nor weights with an adapter.
    """

    shape: tuple[int, ...]
    axes: Axes
    init: Initializer
    component: str
    decays: bool = True
    num_stacked: int = 0
    dtype: Any = jnp.float32
    trains: bool = True

    def stack(self, count: int) -> "ParameterSpec":
        """The spec of `count` such arrays stacked along a leading dim, each drawn separately."""

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.vmap(lambda one: self.init(one, shape[1:], dtype))(
                jax.random.split(key, count)
            )

        return dataclasses.replace(
            self,
            shape=(count, *self.shape),
            axes=(None, *self.axes),
            init=init,
            num_stacked=self.num_stacked + 1,
        )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# Arrays of a `Weight` that are drawn with the key of the weight.
SAME_KEY = tuple(map(jax.tree_util.GetAttrKey, ("base", "values", "scales")))


def init_parameters(key: jax.Array, specs: Any) -> Any:
    """Draws every parameter of a tree of specs, each with its own key.

    The key depends only on the path of a parameter in the tree, by CRC-32, so it is the same in
    every process. The `base` of a `Weight` starts with the values of the unwrapped parameter, and
    `values` and `scales` of a quantised weight represent these values.

    Args:
      key: random key.
      specs: a tree of `ParameterSpec`, such as `MoE.specs` returns.

    Returns:
      Arrays in the same tree.
    """

    def draw(path: tuple[Any, ...], spec: ParameterSpec) -> jax.Array:
        name = jax.tree_util.keystr(tuple(entry for entry in path if entry not in SAME_KEY))
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return spec.init(own, spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(draw, specs)


def scaled_init(scale: float, fan_in: int, *, identical: bool = False) -> Initializer:
    """Truncated normal with variance scale / fan_in.

    Args:
      scale: of the variance, not of the standard deviation (Switch, sec. 2.4: 0.1).
      fan_in: the input dim of one matrix.
      identical: give every expert (first dim of three) the same values.
    """
    # A normal cut at two standard deviations has 0.8796 of its own standard deviation.
    stddev = (scale / fan_in) ** 0.5 / 0.87962566103423978

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        drawn = (1, *shape[1:]) if identical else shape
        values = stddev * jax.random.truncated_normal(key, -2.0, 2.0, drawn, dtype)
        return jnp.broadcast_to(values, shape)

    return init


def truncated_normal_init(stddev: float) -> Initializer:
    """Normal of this standard deviation, truncated at two standard deviations."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return stddev * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init


def normal_init(stddev: float) -> Initializer:
    """Normal of this standard deviation."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return stddev * jax.random.normal(key, shape, dtype)

    return init


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The initializer of biases."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The initializer of scales."""
    del key
    return jnp.ones(shape, dtype)


class Layout(Protocol):
    """How rows `x[..., I]` are multiplied by the weights of their experts.

    Attributes:
      rng: random key for these rows, or None.
    """

    rng: jax.Array | None

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """`x[..., I] @ weight[I, O]`, with the weight of each row's own expert."""

    def expand(self, bias: jax.Array) -> jax.Array:
        """`bias[O]` of each row's own expert, in a shape that adds to the rows."""


class SameWeights:
    """The layout in which all rows use the same weights [I, O]."""

    rng: jax.Array | None = None

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[..., I] @ [I, O] -> [..., O]."""
        return matrix_product(x, weight)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[O], which broadcasts."""
        return bias


SAME_WEIGHTS = SameWeights()


@dataclasses.dataclass(frozen=True)
class ToLogits(SameWeights):
    """The layout of an output head: float32 for any dtype of the rows.

    Attributes:
      tied: whether the weights are those of the input embedding, [O, I].
    """

    tied: bool

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[..., I] @ [I, O] -> [..., O], or with [O, I]; accumulated in float32."""
        weight = weight.T if self.tied else weight
        return matrix_product(x, weight, jnp.float32)


def matrix_product(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """[..., I] @ [I, O] -> [..., O], in `dtype` if given, as a product of two matrices.

    With more dims, XLA on a CPU would transpose the gradient of the output before the product.
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), weight, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], weight.shape[-1])


class Weight:
    """Several arrays that act as one weight; register subclasses as pytrees of these arrays."""

    def product(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Equals `layout.matmul(x, dense(self))`, with the weight in the dtype of `x`."""
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """The weight as one array."""
        raise NotImplementedError

    def rows(self, ids: jax.Array) -> jax.Array:
        """Equals `dense(self)[ids]`."""
        return self.dense()[ids]

    def columns(self, choose: Callable[[jax.Array], jax.Array]) -> "Weight":
        """A `Weight` equal to `choose(dense(self))`; `choose` selects outputs of the last dim."""
        chosen: Weight = jax.tree.map(choose, self)
        return chosen

    def axes_of(self, axes: Axes) -> "Weight":
        """The axes of each of its arrays, in a tree like this one, from the axes of the weight."""
        raise NotImplementedError

    def of_experts(self, num_experts: int) -> "Weight":
        """The same for E experts, with a leading dim of experts in every array."""
        del num_experts
        return self

    def learns(self) -> "Weight":
        """Whether each of its arrays has a gradient, in a tree like this one."""
        return jax.tree.map(lambda _: True, self)


def linear(x: jax.Array, weight: jax.Array | Weight) -> jax.Array:
    """[..., I] @ [I, O] -> [..., O], in the dtype of `x`."""
    return grouped(x, weight, SAME_WEIGHTS)


def grouped(x: jax.Array, weight: jax.Array | Weight, layout: Layout) -> jax.Array:
    """Rows times the weights of their own experts, in the dtype of `x`."""
    if isinstance(weight, Weight):
        return weight.product(x, layout)
    return layout.matmul(x, weight.astype(x.dtype))


def rows(table: jax.Array | Weight, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, M] by integers [...]: [..., M] in the dtype of the table."""
    return table.rows(ids) if isinstance(table, Weight) else jnp.asarray(table)[ids]


def dense(weight: jax.Array | Weight) -> jax.Array:
    """The weight as one array."""
    return weight.dense() if isinstance(weight, Weight) else weight


def columns(weight: jax.Array | Weight, choose: Callable[[jax.Array], jax.Array]) -> Any:
    """Selects outputs of a matrix [..., I, O]: an array or a `Weight`, as given."""
    return weight.columns(choose) if isinstance(weight, Weight) else choose(weight)


def weight_axes(axes: Axes, weight: jax.Array | Weight) -> Any:
    """The axes of the arrays of a weight: a tuple, or a `Weight` of tuples."""
    return weight.axes_of(axes) if isinstance(weight, Weight) else axes


def of_experts(weights: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """The weights of E experts by name, with a leading dim of experts in every array."""
    return {
        name: weight.of_experts(num_experts) if isinstance(weight, Weight) else weight
        for name, weight in weights.items()
    }


def learning(weights: Any) -> Any:
    """Which arrays of a tree of weights have a gradient: bools in the same tree.

    Integers have none. `Weight.learns` decides for the arrays of a `Weight`.
    """

    def of_one(weight: Any) -> Any:
        learns = weight.learns() if isinstance(weight, Weight) else True
        return jax.tree.map(
            lambda array, own: own and jnp.issubdtype(array.dtype, jnp.inexact), weight, learns
        )

    return jax.tree.map(of_one, weights, is_leaf=lambda leaf: isinstance(leaf, Weight))


def ffn_specs(
    model_dim: int,
    hidden_dim: int,
    component: str,
    *,
    gated: bool,
    use_bias: bool,
    init_scale: float,
    num_experts: int | None = None,
    identical_init: bool = False,
) -> dict[str, ParameterSpec]:
    """The weights of a feed-forward network (`num_experts=None`), or of E experts.

    Returns:
      `wi` and, if gated, `wg` [M, H], `wo` [H, M]; with biases also `bi`, `bg` [H] and `bo` [M].
      Weights of experts have a leading dim E.
    """
    experts = () if num_experts is None else (num_experts,)
    names: Axes = () if num_experts is None else ("expert",)

    def spec(shape: tuple[int, ...], axes: Axes, init: Initializer, decays: bool) -> ParameterSpec:
        return ParameterSpec(
            (*experts, *shape), (*names, *axes), init, component, decays, len(experts)
        )

    identical = identical_init and num_experts is not None
    inward = spec(
        (model_dim, hidden_dim), ("model", "hidden"),
        scaled_init(init_scale, model_dim, identical=identical), True,
    )  # fmt: skip
    outward = spec(
        (hidden_dim, model_dim), ("hidden", "model"),
        scaled_init(init_scale, hidden_dim, identical=identical), True,
    )  # fmt: skip
    specs = {"wi": inward, "wo": outward} | ({"wg": inward} if gated else {})
    if use_bias:
        hidden_bias = spec((hidden_dim,), ("hidden",), zeros, False)
        specs |= {"bi": hidden_bias} | ({"bg": hidden_bias} if gated else {})
        specs |= {"bo": spec((model_dim,), ("model",), zeros, False)}
    return specs
