"""Rules that map a model's parameters to the tensors of a file, in either direction.

A family lists `Rule`s. A rule names a tensor, the parameters that it holds, and its layout. The key
of a parameter is its path in one layer: "attention/wq", "moe/experts/wi", "moe_norm/scale". Outside
the layers it is "embedding", "final_norm/scale" or "head", in an encoder "encoder/attention/wq".

>>> Rule("layers.{layer}.w1.weight", "moe/experts/wg", LINEAR).name_at(layer=3)
'layers.3.w1.weight'
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]


class Layout:
    """How a file stores an array of one layer; the base class stores it unchanged."""

    def shape(self, shape: Shape) -> Shape:
        """The shape in the file, given the shape of the parameter."""
        return shape

    def read(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Converts a tensor to the parameter of this shape; returns a view if possible."""
        del shape
        return tensor

    def write(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `read`."""
        return values


class Linear(Layout):
    """PyTorch's [out, in] for [in, out]; leading dims are kept."""

    def shape(self, shape: Shape) -> Shape:
        """See `Layout`."""
        return (*shape[:-2], shape[-1], shape[-2])

    def read(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """See `Layout`."""
        return np.swapaxes(tensor, -1, -2)

    def write(self, values: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        return np.swapaxes(values, -1, -2)


@dataclasses.dataclass(frozen=True)
class Merged(Layout):
    """An inner layout with its first two dims merged: [E, A, B] as [E * A, B]."""

    inner: Layout

    def shape(self, shape: Shape) -> Shape:
        """See `Layout`."""
        first, second, *rest = self.inner.shape(shape)
        return (first * second, *rest)

    def read(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """See `Layout`."""
        return self.inner.read(tensor.reshape(self.inner.shape(shape)), shape)

    def write(self, values: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        values = self.inner.write(values)
        return values.reshape(-1, *values.shape[2:])


@dataclasses.dataclass(frozen=True)
class Inserted(Layout):
    """An inner layout with a dim of size 1 inserted, such as a convolution's [C, 1, K]."""

    axis: int
    inner: Layout = Layout()

    def shape(self, shape: Shape) -> Shape:
        """See `Layout`."""
        shape = self.inner.shape(shape)
        return (*shape[: self.axis], 1, *shape[self.axis :])

    def read(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """See `Layout`."""
        return self.inner.read(tensor.squeeze(self.axis), shape)

    def write(self, values: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        return np.expand_dims(self.inner.write(values), self.axis)


AS_IS, LINEAR = Layout(), Linear()


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor, or one per layer or expert, and the parameters that it holds.

    Attributes:
      name: of the tensor, with "{layer}" and "{expert}" if it belongs to one.
      keys: one parameter, or several that are joined along `axis`.
      layout: of each parameter.
      axis: of the tensor, along which several parameters are joined.
      interleaved: whether they alternate along `axis` instead of following each other.
    """

    name: str
    keys: str | tuple[str, ...]
    layout: Layout = AS_IS
    axis: int = 0
    interleaved: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """The keys as a tuple."""
        return (self.keys,) if isinstance(self.keys, str) else self.keys

    @property
    def of_expert(self) -> bool:
        """Whether the tensor belongs to one expert."""
        return "{expert}" in self.name

    def name_at(self, layer: int | None, expert: int | None = None) -> str:
        """The name of the tensor of a layer and an expert."""
        return self.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the tensor, given the shapes of its parameters."""
        inner = [self.layout.shape(shape) for shape in shapes]
        if len(inner) == 1:
            return inner[0]
        joined = list(inner[0])
        joined[self.axis] = sum(shape[self.axis] for shape in inner)
        return tuple(joined)

    def read(self, tensor: np.ndarray, shapes: Sequence[Shape], which: int) -> np.ndarray:
        """Extracts one of the parameters from the tensor."""
        sizes = [self.layout.shape(shape)[self.axis] for shape in shapes] if len(shapes) > 1 else []
        if self.interleaved:
            part = slice(which, None, len(shapes))
        else:
            part = slice(sum(sizes[:which]), sum(sizes[: which + 1]))
        if len(shapes) > 1:
            axis = self.axis % tensor.ndim
            tensor = tensor[(*(slice(None),) * axis, part)]
        return self.layout.read(tensor, shapes[which])

    def write(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parameters."""
        inner = [self.layout.write(one) for one in values]
        if len(inner) == 1:
            return inner[0]
        if not self.interleaved:
            return np.concatenate(inner, self.axis)
        axis = self.axis % inner[0].ndim
        shape = list(inner[0].shape)
        shape[axis] *= len(inner)
        return np.stack(inner, axis + 1).reshape(shape)
