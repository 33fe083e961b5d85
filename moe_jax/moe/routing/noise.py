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
    anneal_from: float | None = setting(None, at_least=0, below=1)  # value at the first step
    anneal_steps: int = setting(0, at_least=0)  # steps of the linear change; 0: constant

    def check(self) -> None:
        """See `Settings`."""
        check_annealing(self.anneal_from, self.anneal_steps)

    def on_tokens(self, x_GSM: jax.Array, rng: jax.Array, step: jax.Array | None) -> jax.Array:
        """See `Noise`."""
        epsilon = annealed(self.anneal_from, self.epsilon, self.anneal_steps, step)
        low, high = 1 - epsilon, 1 + epsilon
        return x_GSM * jax.random.uniform(rng, x_GSM.shape, x_GSM.dtype, low, high)


def draw_allowed(rng: jax.Array, rate: float, num_options: int, num_selected: int) -> jax.Array:
    """Which experts may be chosen: bool [E], each False with probability `rate`, independently.

    The K experts with the largest draws are always allowed.

    >>> allowed_E = draw_allowed(jax.random.key(0), 0.99, num_options=8, num_selected=2)
    >>> int(allowed_E.sum())
    2
    """
    drawn_E = jax.random.uniform(jax.random.fold_in(rng, 4), (num_options,))
    least = jnp.sort(drawn_E)[num_options - num_selected]
    return (drawn_E >= rate) | (drawn_E >= least)


@dataclasses.dataclass(frozen=True)
class Gaussian(Noise):
    """Adds Gaussian noise of standard deviation `stddev` to every logit."""

    stddev: float = setting(1.0, at_least=0)  # in units of logits
    anneal_from: float | None = setting(None, at_least=0)  # value at the first step; None: constant
    anneal_steps: int = setting(0, at_least=0)  # steps of the linear change; 0: constant

    def check(self) -> None:
        """See `Settings`."""
        check_annealing(self.anneal_from, self.anneal_steps)

    @property
    def always_on(self) -> bool:
        """See `Noise`."""
        return self.stddev > 0 and self.anneal_from != 0

    def std(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array | None:
        """See `Noise`."""
        stddev = annealed(self.anneal_from, self.stddev, self.anneal_steps, step)
        return jnp.full((1, 1, 1), stddev, x_GSM.dtype)


@dataclasses.dataclass(frozen=True)
class Learned(Noise):
    """Adds Gaussian noise of standard deviation softplus(x W_noise) to every logit.

    W_noise starts from 0, so the deviation starts from softplus(0) = 0.69.

    Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 4 and app. A.
    """

    @property
    def always_on(self) -> bool:
        """See `Noise`."""
        return True

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """`weight` [M, E]."""
        return {"weight": router_matrix(dims.model_dim, options.num_options, 0)}

    def std(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array | None:
        """See `Noise`."""
        return jax.nn.softplus(project(x_GSM, params["weight"]))
