"""RMSNorm and LayerNorm, in float32 whatever the compute dtype (legend: `moe_jax.moe`)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.settings import Settings, setting
from moe_jax.parameters import ParameterSpec, dense, ones, zeros


@dataclasses.dataclass(frozen=True)
class Norm(Settings):
    """A norm over the last dim."""

    family: ClassVar[str] = "norm"

    epsilon: float = setting(1e-6, above=0)  # added to the mean square or the variance

    def specs(self, dim: int, component: str = "norms") -> dict[str, Any]:
        """The parameters of a norm of vectors of this dim."""
        return {"scale": ParameterSpec((dim,), (None,), ones, component, decays=False)}

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim], same dtype."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """x / rms(x) * scale.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """See `Norm`."""
        return rms_norm(x, dense(params["scale"]), self.epsilon)


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean) / std * scale + bias.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    def specs(self, dim: int, component: str = "norms") -> dict[str, Any]:
        """See `Norm`."""
        bias = ParameterSpec((dim,), (None,), zeros, component, decays=False)
        return {**super().specs(dim, component), "bias": bias}

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """See `Norm`."""
        return layer_norm(x, dense(params["scale"]), dense(params["bias"]), self.epsilon)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm over the last dim; float32 inside, the dtype of `x` outside."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last dim; float32 inside, the dtype of `x` outside."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(x.dtype)
