"""From logits to the next token (legend: `moe_jax.moe`)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting

LEAST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling(Settings):
    """How a token is drawn; the settings after `seed` apply in the order of the fields.

    Each filter acts on the result of the filters before it, as in transformers (generation,
    `LogitsProcessorList`): the penalty, the temperature, then the three cuts.
    """

    seed: int = setting(0, at_least=0, below=2**32)  # equal seeds give equal tokens
    repetition_penalty: float = setting(1.0, above=0)  # > 1: tokens seen become less likely
    temperature: float = setting(0.0, at_least=0)  # divides logits; 0: the likeliest token
    top_k: int = setting(0, at_least=0)  # only the k likeliest tokens; 0: all
    top_p: float = setting(1.0, above=0, at_most=1)  # the fewest likeliest with this probability
    min_p: float = setting(0.0, at_least=0, at_most=1)  # minimum share of the highest probability

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE,
            f"temperature is 0 or at least {LEAST_TEMPERATURE}, or float32 overflows",
            f"temperature={self.temperature}",
            "Use 0 for the likeliest token",
        )


def filtered(logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that tokens are drawn from; -inf for tokens never drawn.

    Args:
      logits_BV: float32.
      seen_BV: bool, tokens of the text so far; needed only for a penalty.
      sampling: with a temperature > 0.

    Source: penalty: Keskar et al. 2019, CTRL, arXiv:1909.05858, sec. 4.1; top_p: Holtzman et al.
      2020, arXiv:1904.09751; min_p: Nguyen et al. 2024, arXiv:2407.01082.
    """
    logits_BV = penalized(logits_BV, seen_BV, sampling.repetition_penalty) / sampling.temperature
    vocabulary = logits_BV.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        logits_BV = within_top_p(logits_BV, sampling.top_p)
    if sampling.min_p > 0:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def penalized(logits_BV: jax.Array, seen_BV: jax.Array | None, penalty: float) -> jax.Array:
    """Divides positive logits of tokens seen by the penalty, and multiplies negative ones by it."""
    if penalty == 1 or seen_BV is None:
        return logits_BV
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, less_BV, logits_BV)


def within_top_p(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Keeps the likeliest tokens until their total probability is at least `top_p`."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    rank_BV = jnp.argsort(order_BV, axis=-1)
    keep_BV = jnp.take_along_axis(before_BV < top_p, rank_BV, axis=-1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def draw(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of every row: int32 [B].

    Args:
      logits_BV: float32; -inf for ids that are not tokens.
      seen_BV: see `filtered`.
      keys_B: a random key per row, so that rows do not depend on each other.
      sampling: the settings.
    """
    if sampling.temperature == 0:
        return likeliest(logits_BV, seen_BV, sampling)
    logits_BV = filtered(logits_BV, seen_BV, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def probabilities(logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The distribution that `draw` samples, float32 [B, V]; one-hot at a temperature of 0."""
    if sampling.temperature == 0:
        return jax.nn.one_hot(likeliest(logits_BV, seen_BV, sampling), logits_BV.shape[-1])
    return jax.nn.softmax(filtered(logits_BV, seen_BV, sampling), axis=-1)


def likeliest(logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The most likely token of every row, after the repetition penalty: int32 [B]."""
    logits_BV = penalized(logits_BV, seen_BV, sampling.repetition_penalty)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
