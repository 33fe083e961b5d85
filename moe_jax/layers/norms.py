"""RMSNorm and LayerNorm, in float32 for every compute dtype (legend: `moe_jax.moe`)."""

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
    use_scale: bool = True  # multiplies each feature by a weight

    def specs(self, dim: int, component: str = "norms", axis: str | None = None) -> dict[str, Any]:
        """The parameters for vectors of size `dim`; `axis` is its name in `parallel.rules`."""
        if not self.use_scale:
            return {}
        return {"scale": ParameterSpec((dim,), (axis,), ones, component, decays=False)}

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
        x32 = x.astype(jnp.float32)
        return weighted(params, x32 * inverse_root(x32, self.epsilon)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """(x - mean) / std * scale + bias.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    use_bias: bool = True  # not in DBRX

    def specs(self, dim: int, component: str = "norms", axis: str | None = None) -> dict[str, Any]:
        """See `Norm`."""
        specs = super().specs(dim, component, axis)
        if self.use_bias:
            specs["bias"] = ParameterSpec((dim,), (axis,), zeros, component, decays=False)
        return specs

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """See `Norm`."""
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        return weighted(params, centered * inverse_root(centered, self.epsilon)).astype(x.dtype)


def inverse_root(x32: jax.Array, epsilon: float) -> jax.Array:
    """1 / sqrt(mean square + epsilon) over the last dim: [..., 1]."""
    return jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)


def weighted(params: Any, x32: jax.Array) -> jax.Array:
    """Times the scale, if any, plus the bias, if any."""
    if "scale" in params:
        x32 *= dense(params["scale"])
    return x32 + dense(params["bias"]) if "bias" in params else x32
