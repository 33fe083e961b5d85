"""Activations of experts and of dense feed-forward networks (legend: `moe_jax.moe`)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class Activation(Settings):
    """The function between the matrix products of a feed-forward network.

    Attributes:
      gated: whether there is a third matrix, for the gate.
    """

    family: ClassVar[str] = "activation"
    gated: ClassVar[bool] = False

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """The hidden units.

        Args:
          inner: x wi, [..., H].
          gate: x wg, [..., H], if the activation is gated; else None.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Relu(Activation):
    """max(x wi, 0)."""

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        return jax.nn.relu(inner)


def gelu(x: jax.Array) -> jax.Array:
    """GELU, x Phi(x), with the standard normal CDF Phi (Hendrycks and Gimpel, arXiv:1606.08415).

    Equal to `jax.nn.gelu(x, approximate=False)`, but its gradient also passes the checks of
    `jax.shard_map` in jax 0.12.
    """
    return 0.5 * x * erfc(-x * math.sqrt(0.5))


@jax.custom_jvp
def erfc(x: jax.Array) -> jax.Array:
    """1 - erf(x)."""
    return jax.lax.erfc(x)


@erfc.defjvp
def _erfc_derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return erfc(x), -2 / math.sqrt(math.pi) * (dx * jnp.exp(-jnp.square(x)))


@dataclasses.dataclass(frozen=True)
class Gelu(Activation):
    """GELU with the error function, as in PyTorch."""

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        return gelu(inner)


@dataclasses.dataclass(frozen=True)
class GeluTanh(Activation):
    """GELU by the tanh approximation, JAX's default."""

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
        return gelu(gate) * inner


@dataclasses.dataclass(frozen=True)
class GeGLUTanh(Activation):
    """gelu(x wg) * x wi, GELU by the tanh approximation (Grok-1)."""

    gated: ClassVar[bool] = True

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        assert gate is not None
        return jax.nn.gelu(gate, approximate=True) * inner


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU(Activation):
    """(x wi + 1) * gate * sigmoid(alpha gate), with gate = x wg, both clamped (gpt-oss).

    The gate is clamped from above only, x wi on both sides.
    """

    gated: ClassVar[bool] = True

    limit: float = setting(7.0, above=0)  # gate <= limit, -limit <= x wi <= limit
    alpha: float = setting(1.702, above=0)  # in the sigmoid; 1.702 is close to GELU

    def apply(self, inner: jax.Array, gate: jax.Array | None) -> jax.Array:
        """See `Activation`."""
        assert gate is not None
        gate = jnp.minimum(gate, self.limit)
        inner = jnp.clip(inner, -self.limit, self.limit)
        return (inner + 1) * gate * jax.nn.sigmoid(self.alpha * gate)
