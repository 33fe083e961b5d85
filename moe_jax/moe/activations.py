"""Activations of experts and of dense feed-forward networks (legend: `moe_jax.moe`)."""

import dataclasses
from typing import ClassVar

import jax

from moe_jax.moe.experts import Activation


@dataclasses.dataclass(frozen=True)
class Gelu(Activation):
    """GELU with the error function, as in PyTorch."""

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        return jax.nn.gelu(inner, approximate=False)


@dataclasses.dataclass(frozen=True)
class GeluTanh(Activation):
    """GELU by the hyperbolic tangent, JAX's own default."""

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        return jax.nn.gelu(inner, approximate=True)


@dataclasses.dataclass(frozen=True)
class Silu(Activation):
    """x wi times its sigmoid."""

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        return jax.nn.silu(inner)


@dataclasses.dataclass(frozen=True)
class SwiGLU(Activation):
    """silu(x wg) * x wi (Shazeer 2020, arXiv:2002.05202)."""

    gated: ClassVar[bool] = True

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        assert gate is not None
        return jax.nn.silu(gate) * inner


@dataclasses.dataclass(frozen=True)
class GeGLU(Activation):
    """gelu(x wg) * x wi, GELU with the error function (Shazeer 2020, arXiv:2002.05202)."""

    gated: ClassVar[bool] = True

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        assert gate is not None
        return jax.nn.gelu(gate, approximate=False) * inner


@dataclasses.dataclass(frozen=True)
class GeGLUTanh(Activation):
    """gelu(x wg) * x wi, GELU by the hyperbolic tangent (Grok-1)."""

    gated: ClassVar[bool] = True

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        assert gate is not None
        return jax.nn.gelu(gate, approximate=True) * inner
