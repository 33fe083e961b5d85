"""Low-rank adapters: a frozen matrix plus a small trained product.

x (W + s a b) is computed as x W + s (x a) b, so W is never copied. W is float32, bfloat16 or
quantised. b starts at 0, so new adapters leave the model's outputs exactly unchanged.

Source: Hu et al. 2021, LoRA, arXiv:2106.09685; s = alpha / rank. Legend: `moe_jax.moe`; R is the
rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.parameters import (
    Axes,
    Layout,
    ParameterSpec,
    Weight,
    columns,
    dense,
    grouped,
    scaled_init,
    weight_axes,
    zeros,
)

ADAPTERS = "adapters"  # the component of a and b


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """base + scale * a b, where only a and b are trained.

    Attributes:
      base: the matrix, an array [..., I, O] or a `Weight`.
      a: [..., I, R], without the expert dim if all experts share it.
      b: [..., R, O], likewise.
      scale: alpha / rank.
      shared: whether the base has an expert dim, before its matrix, that a and b lack.
    """

    base: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})
    shared: bool = dataclasses.field(default=False, metadata={"static": True})

    def product(self, x: jax.Array, layout: Layout) -> jax.Array:
        """See `Weight`."""
        assert not self.shared, "experts come through `of_experts`"
        base = jax.tree.map(jax.lax.stop_gradient, self.base)
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        update = layout.matmul(layout.matmul(x, a), b)
        return grouped(x, base, layout) + self.scale * update

    def dense(self) -> jax.Array:
        """See `Weight`."""
        update = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
        if self.shared:
            update = jnp.expand_dims(update, -3)
        return dense(self.base) + self.scale * update

    def columns(self, choose: Callable[[jax.Array], jax.Array]) -> "LowRank":
        """See `Weight`. Every output depends on all of a."""
        return dataclasses.replace(self, base=columns(self.base, choose), b=choose(self.b))

    def axes_of(self, axes: Axes) -> "LowRank":
        """See `Weight`. The rank dim is not sharded."""
        *leading, inward, outward = axes
        base = weight_axes(axes, self.base)
        if self.shared:
            leading = leading[:-1]
        a, b = (*leading, inward, None), (*leading, None, outward)
        return dataclasses.replace(self, base=base, a=a, b=b)

    def of_experts(self, num_experts: int) -> "LowRank":
        """See `Weight`. Shared a and b are repeated per expert, and their gradients add up."""
        if not self.shared:
            return self
        a, b = (jnp.broadcast_to(each, (num_experts, *each.shape)) for each in (self.a, self.b))
        return dataclasses.replace(self, a=a, b=b, shared=False)

    def learns(self) -> "LowRank":
        """See `Weight`."""
        base = jax.tree.map(lambda _: False, self.base)
        return dataclasses.replace(self, base=base, a=True, b=True)


@dataclasses.dataclass(frozen=True)
class Adapters(Settings):
    """Which matrices have a low-rank adapter, and its rank.

    `names` choose parameters as in `models.selection`. The matrices among them are adapted: the
    head and routers only if they are named, the embedding never.
    """

    names: tuple[str, ...] = ("attention",)  # "all": all except head, routers and embedding
    rank: int = setting(8, at_least=1)  # R
    alpha: float = setting(16.0, above=0)  # a b is multiplied by alpha / rank
    per_expert: bool = True  # each expert has its own a and b; else a layer's experts share them

    def wrap(self, name: str, spec: ParameterSpec, inner: Any) -> LowRank:
        """The specs of a matrix and of its adapter.

        Args:
          name: of the matrix, for errors.
          spec: of the plain matrix.
          inner: what represents the matrix so far: this spec, or its quantised specs.

        Raises:
          ValueError: it is the embedding, a table whose rows are read, or the rank is too high.
        """
        require(
            spec.component != "embedding",
            "only matrices that multiply can have adapters",
            f"adapters.names={self.names} choose the embedding, a table",
            "Leave it out",
        )
        *leading, inputs, outputs = spec.shape
        require(
            self.rank <= min(inputs, outputs),
            "adapters.rank must be at most that of the matrix",
            f"rank={self.rank}, {name} {(inputs, outputs)}",
            f"Use a rank of at most {min(inputs, outputs)}",
        )
        *names, inward, outward = spec.axes
        shared = not self.per_expert and "expert" in names
        if shared:
            assert names[-1] == "expert", (name, spec.axes)
            leading, names = leading[:-1], names[:-1]
        adapter = dataclasses.replace(
            spec, component=ADAPTERS, num_stacked=spec.num_stacked - shared, dtype=jnp.float32
        )
        a = dataclasses.replace(
            adapter,
            shape=(*leading, inputs, self.rank),
            axes=(*names, inward, None),
            init=scaled_init(1 / 3, inputs),  # the variance of PEFT's uniform values
        )
        b = dataclasses.replace(
            adapter,
            shape=(*leading, self.rank, outputs),
            axes=(*names, None, outward),
            init=zeros,
        )
        base = jax.tree.map(lambda one: dataclasses.replace(one, trains=False), inner)
        return LowRank(base, a, b, self.alpha / self.rank, shared)
