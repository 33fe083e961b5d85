"""Quantised weights: integers of 8 or 4 bits, with one scale per group.

A weight w in a group with scale s is stored as the integer q nearest to w / s. A group is G
consecutive weights of one output channel, along the dim that a product contracts.

  bits  q in        s                                         stored in
  8     -127..127   largest magnitude / 127                   int8
  4     -8..7       the weight of largest magnitude / -8      uint8, two q + 8 per byte

The scale is float16, and q is computed with the stored scale. With 4 bits, the weight of largest
magnitude is always -8 steps, so the scale has the opposite sign. All 16 integers are in use, and a
step is 1/8 of that weight; symmetric integers -7..7 would give 1/7. Weights beyond 7.5 steps on the
other side are clipped to 7.

With G = 32 these are the blocks Q8_0 and Q4_0 of GGUF (llama.cpp, ggml-quants.c): every such block
is a group here, with the same numbers. Only the order of 4-bit numbers differs. Byte i of a group
holds weights 2 i (low half) and 2 i + 1; Q4_0 pairs i and i + 16.

JAX also has int4, but on a CPU it takes one byte per number (jax 0.10.2), so two are packed here.
Google's qwix quantises the same way (`QArray`, symmetric at 4 bits). It works by replacing
`jax.lax.dot_general` and `ragged_dot`. Experts here also run slot by slot, block by block and over
a mesh, each with its own products, so only one division of qwix would be used. Legend:
`moe_jax.moe`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.parameters import Axes, Layout, ParameterSpec, Weight

BITS = (16, 8, 4)
SCALE = jnp.float16
MATRIX, TABLE = -2, -1  # the dim along which groups run, in a matrix [I, O] and a table [V, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised(Weight):
    """A matrix [..., I, O], or a table [..., V, M] whose rows are read, as small integers.

    Attributes:
      values: int8 [..., I, O], or uint8 [..., I/2, O]; for a table [..., V, M], or [..., V, M/2].
      scales: float16 [..., I/G, O]; for a table [..., V, M/G].
      axis: the dim along which groups run, `MATRIX` or `TABLE`.
    """

    values: Any
    scales: Any
    axis: int = dataclasses.field(default=MATRIX, metadata={"static": True})

    def product(self, x: jax.Array, layout: Layout) -> jax.Array:
        """See `Weight`: only the operands of `layout.matmul` are ever floats.

        A packed matrix is multiplied as two, each by every second number of the rows of x:
        interleaving the two first takes several times as long on a CPU.
        """

        # The backward pass converts again: otherwise the floats of all layers stay in memory.
        @jax.checkpoint
        def multiplied(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
            pieces = pieces_of(values)
            x_pieces = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, len(pieces)), -1, 0)
            products = [
                layout.matmul(one, scaled(piece, scales, self.axis).astype(x.dtype))
                for one, piece in zip(x_pieces, pieces, strict=True)
            ]
            return products[0] if len(products) == 1 else products[0] + products[1]

        return multiplied(x, self.values, jax.lax.stop_gradient(self.scales))

    def dense(self) -> jax.Array:
        """See `Weight`: float32."""
        return scaled(unpacked(self.values, self.axis), self.scales, self.axis)

    def rows(self, ids: jax.Array) -> jax.Array:
        """See `Weight`."""
        assert self.axis == TABLE, "the rows of a matrix lie across its groups"
        return Quantised(self.values[ids], self.scales[ids], TABLE).dense()

    def axes_of(self, axes: Axes) -> "Quantised":
        """See `Weight`. A single group is not sharded."""
        return Quantised(axes, scale_axes(axes, self.axis, self.scales.shape), self.axis)

    def learns(self) -> "Quantised":
        """See `Weight`: nothing does."""
        return Quantised(False, False, self.axis)


def scale_axes(axes: Axes, axis: int, shape: tuple[int, ...]) -> Axes:
    """The axes of scales of this shape, given the axes of the weight."""
    names = list(axes)
    if shape[axis] == 1:
        names[axis] = None
    return tuple(names)


def pieces_of(values: jax.Array) -> tuple[jax.Array, ...]:
    """The integers as float32: one array, or two if they are packed (even and odd places)."""
    if values.dtype == jnp.int8:
        return (values.astype(jnp.float32),)
    return tuple(half.astype(jnp.float32) - 8 for half in (values & 15, values >> 4))


def scaled(integers: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """Integers times the scale of their group, in float32."""
    shape = list(integers.shape)
    place = axis + len(shape)
    shape[place : place + 1] = [scales.shape[axis], shape[place] // scales.shape[axis]]
    each = jnp.expand_dims(scales.astype(jnp.float32), axis)
    return (integers.reshape(shape) * each).reshape(integers.shape)


def unpacked(values: jax.Array, axis: int) -> jax.Array:
    """The integers of `Quantised.values`, as float32 in the shape of the weight.

    >>> unpacked(jnp.asarray([[0x80], [0xF7]], jnp.uint8), MATRIX).T
    Array([[-8.,  0., -1.,  7.]], dtype=float32)
    """
    pieces = pieces_of(values)
    if len(pieces) == 1:
        return pieces[0]
    shape = list(values.shape)
    shape[axis] *= 2
    return jnp.stack(pieces, axis=axis + len(shape) + 1).reshape(shape)


def packed(integers: jax.Array, axis: int) -> jax.Array:
    """Integers in -8..7, packed two per byte: the inverse of `unpacked`."""
    low, high = (
        jax.lax.slice_in_dim(integers, start, None, 2, axis % integers.ndim) for start in (0, 1)
    )
    return ((low + 8) + (high + 8) * 16).astype(jnp.uint8)


def quantise(weight: jax.Array, bits: int, group_size: int, axis: int = MATRIX) -> Quantised:
    """The integers and scales nearest to a weight.

    >>> found = quantise(jnp.asarray([[4.0], [-1.0], [0.6], [-3.9]]), bits=4, group_size=4)
    >>> found.dense().T, found.scales
    (Array([[ 4. , -1. ,  0.5, -3.5]], dtype=float32), Array([[-0.5]], dtype=float16))

    Args:
      weight: float [..., I, O], or a table [..., V, M].
      bits: 8 or 4.
      group_size: G; 0: the whole dim.
      axis: the dim along which groups run.
    """
    weight = weight.astype(jnp.float32)
    shape = list(weight.shape)
    place = axis + len(shape)
    size = group_size or shape[place]
    grouped = weight.reshape(*shape[:place], shape[place] // size, size, *shape[place + 1 :])
    most, least = jnp.max(grouped, place + 1), jnp.min(grouped, place + 1)
    if bits == 8:
        scales = jnp.maximum(most, -least) / 127
    else:
        scales = jnp.where(most > -least, most, least) / -8
    scales = scales.astype(SCALE)
    each = jnp.expand_dims(scales.astype(jnp.float32), place + 1)
    integers = jnp.round(grouped / jnp.where(each == 0, 1, each)).reshape(shape)
    if bits == 8:
        return Quantised(jnp.clip(integers, -127, 127).astype(jnp.int8), scales, axis)
    return Quantised(packed(jnp.clip(integers, -8, 7), axis), scales, axis)


@dataclasses.dataclass(frozen=True)
class Quantisation(Settings):
    """Which weights of a model are quantised, and how.

    `names` choose parameters as in `models.selection`. The matrices among them are quantised: the
    embedding, the head and routers only if they are named.
    """

    names: tuple[str, ...] = ("experts",)  # "all": all except embedding, head and routers
    bits: int = setting(8, choices=BITS)  # per weight; 16: bfloat16, not integers
    group_size: int = setting(32, at_least=0)  # G, weights per scale; 0: a whole output channel

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.bits < 16 or self.group_size == 32,
            "quantisation.group_size applies only to 8 and 4 bits",
            f"bits={self.bits}, group_size={self.group_size}",
            "Leave it out",
        )

    def wrap(self, name: str, spec: ParameterSpec, inner: ParameterSpec) -> Any:
        """The specs of the arrays that represent a weight.

        Raises:
          ValueError: the group size does not divide the dim of the groups.
        """
        del inner  # quantisation is the innermost wrapping
        if self.bits == 16:
            return dataclasses.replace(spec, dtype=jnp.bfloat16, decays=False, trains=False)
        axis = axis_of(spec)
        size = spec.shape[axis]
        group = self.group_size or size
        what = "a divisor" if self.bits == 8 else "an even divisor"
        if self.bits == 4 and size % 2:
            what = "8 bits and a divisor"
        named = ", ".join(map(repr, self.names))
        require(
            size % group == 0 and (self.bits == 8 or group % 2 == 0),
            "quantisation.group_size must divide the dim along which it counts, with 4 bits into "
            "pairs",
            f"{name} {spec.shape[spec.num_stacked :]} in groups of {group}",
            f"Use {what} of {size}, or name the other components in place of {named} in "
            "quantisation.names",
        )
        values, scales = list(spec.shape), list(spec.shape)
        values[axis], scales[axis] = size * self.bits // 8, size // group
        names = scale_axes(spec.axes, axis, tuple(scales))

        def made(part: str, shape: list[int], axes: Axes, dtype: Any) -> ParameterSpec:
            def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
                drawn = spec.init(key, spec.shape, jnp.float32)
                array = getattr(self.apply(drawn, axis), part)
                assert (array.shape, array.dtype) == (shape, dtype), (array, shape, dtype)
                return array

            return dataclasses.replace(
                spec,
                shape=tuple(shape),
                axes=axes,
                init=init,
                decays=False,
                dtype=dtype,
                trains=False,
            )

        integer = jnp.int8 if self.bits == 8 else jnp.uint8
        return Quantised(
            made("values", values, spec.axes, integer),
            made("scales", scales, names, SCALE),
            axis,
        )

    def apply(self, weight: jax.Array, axis: int) -> Any:
        """The quantised weight."""
        if self.bits == 16:
            return weight.astype(jnp.bfloat16)
        return quantise(weight, self.bits, self.group_size, axis)


def axis_of(spec: ParameterSpec) -> int:
    """The dim along which a weight's groups run: the one that products contract."""
    return TABLE if spec.component == "embedding" else MATRIX
