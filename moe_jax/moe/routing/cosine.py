"""Cosine router logits (legend: `moe_jax.moe`)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.settings import setting
from moe_jax.moe.routing import Options
from moe_jax.moe.routing.logits import Projection, project, router_matrix, router_vector
from moe_jax.parameters import ParameterSpec, dense, truncated_normal_init
from moe_jax.part import Dims

# The learned temperature does not fall below 1 / 100 (as in Tutel), so gradients of the logits stay
# finite.
MAX_LOG_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True)
class Cosine(Projection):
    """Cosines of the projected token with every expert, divided by a learned temperature.

    Source: Chi et al. 2022, On the representation collapse of sparse mixture of experts,
      arXiv:2204.09179, sec. 3.1, eqs. 6-7.
    """

    dim: int = setting(256, at_least=1)  # D, of the compared vectors
    temperature: float = setting(1.0, above=0)  # initial value (paper: 0.3; sigmoid gates: 0.07)

    def specs(self, dims: Dims, options: Options, init_stddev: float) -> dict[str, Any]:
        """`projection` [M, D], `weight` [D, E], `log_scale` [1], which starts from 0."""
        init = truncated_normal_init(init_stddev)
        return {
            "projection": router_matrix(dims.model_dim, self.dim, init_stddev),
            "weight": ParameterSpec((self.dim, options.num_options), (None, None), init, "router"),
            "log_scale": router_vector(1),
        }

    def logits(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array:
        """In [-1, 1] / temperature; see `Projection`."""
        token_GSD = unit(project(x_GSM, params["projection"]), axis=-1)
        expert_DE = unit(dense(params["weight"]).astype(x_GSM.dtype), axis=0)
        log_scale = dense(params["log_scale"]).astype(x_GSM.dtype) - math.log(self.temperature)
        return project(token_GSD, expert_DE) * jnp.exp(jnp.minimum(log_scale, MAX_LOG_SCALE))


def unit(values: jax.Array, axis: int) -> jax.Array:
    """Vectors scaled to length 1 along an axis; 0 stays 0, with a finite gradient."""
    square = jnp.sum(values**2, axis=axis, keepdims=True)
    return values * jax.lax.rsqrt(square + 1e-12)
