"""Noise of routers in training (legend: `moe_jax.moe`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.settings import setting
from moe_jax.moe.routing import Options
from moe_jax.moe.routing.logits import Noise, annealed, check_annealing, project, router_matrix
from moe_jax.part import Dims


@dataclasses.dataclass(frozen=True)
class Jitter(Noise):
    """Multiplies the router's copy of a token by U(1 - epsilon, 1 + epsilon) (Switch: 0.01)."""

    epsilon: float = setting(0.01, at_least=0, below=1)  # factors lie in 1 +- epsilon
    anneal_from: float | None = setting(None, at_least=0, below=1)  # epsilon at the first step
    anneal_steps: int = setting(0, at_least=0)  # ... moves linearly by this step; 0: constant

    def check(self) -> None:
        """See `Settings`."""
        check_annealing(self.anneal_from, self.anneal_steps)

    def on_tokens(self, x_GSM: jax.Array, rng: jax.Array, step: jax.Array | None) -> jax.Array:
        """See `Noise`."""
        epsilon = annealed(self.anneal_from, self.epsilon, self.anneal_steps, step)
        low, high = 1 - epsilon, 1 + epsilon
        return x_GSM * jax.random.uniform(rng, x_GSM.shape, x_GSM.dtype, low, high)


@dataclasses.dataclass(frozen=True)
class Gaussian(Noise):
    """Adds N(0, stddev) to every logit."""

    stddev: float = setting(1.0, at_least=0)  # in units of logits
    anneal_from: float | None = setting(None, at_least=0)  # deviation at the first step
    anneal_steps: int = setting(0, at_least=0)  # ... moves linearly by this step; 0: constant

    def check(self) -> None:
        """See `Settings`."""
        check_annealing(self.anneal_from, self.anneal_steps)

    @property
    def least_std(self) -> float:
        """See `Noise`."""
        return self.stddev if self.anneal_from is None else min(self.stddev, self.anneal_from)

    def std(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array | None:
        """See `Noise`."""
        stddev = annealed(self.anneal_from, self.stddev, self.anneal_steps, step)
        return jnp.full((1, 1, 1), stddev, x_GSM.dtype)


@dataclasses.dataclass(frozen=True)
class Learned(Noise):
    """Adds N(0, softplus(x W_noise)) to every logit.

    W_noise starts from 0, and the deviation so from softplus(0) = 0.69.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 4 and app. A.
    """

    @property
    def least_std(self) -> float:
        """See `Noise`."""
        return 1e-10

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """`weight` [M, E]."""
        return {"weight": router_matrix(dims.model_dim, options.num_options, 0)}

    def std(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array | None:
        """See `Noise`."""
        return jax.nn.softplus(project(x_GSM, params["weight"]))
