"""Scales rotary frequencies to contexts longer than in pre-training.

`H` is half of the rotary dims: one frequency per pair of features. Other letters: `moe_jax.moe`.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class RotaryScaling(Settings):
    """A rule for the frequencies of `Rotary`, with two factors."""

    family: ClassVar[str] = "rotary_scaling"
    by_length: ClassVar[bool] = False  # whether it depends on the length of a document

    def scaled(self, frequency_H: jax.Array, base: float, length_BL: jax.Array | None) -> jax.Array:
        """The scaled frequencies.

        Args:
          frequency_H: float32, radians per position, from 1 down to about 1 / base.
          base: of `Rotary`.
          length_BL: int32, length of each token's document, if `by_length`; else None.

        Returns:
          float32 [H], or [B, L, 1, H] if they depend on the length of a document.
        """
        raise NotImplementedError

    def check_dim(self, dim: int) -> None:
        """Raises `ValueError` if the settings do not fit this number of rotary dims."""

    @property
    def cos_sin_factor(self) -> float:
        """Multiplies cosines and sines, and so scores by its square."""
        return 1.0

    def cos_sin_factors(self, length_BL: jax.Array | None) -> jax.Array | float:
        """`cos_sin_factor`, or [B, L, 1, 1] if it depends on the length of a document."""
        return self.cos_sin_factor

    @property
    def softmax_factor(self) -> float:
        """Multiplies the scale of scores, in a part that uses it."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Divides all frequencies by a factor: positions are interpolated.

    Source: Chen et al. 2023, arXiv:2306.15595, eq. 4.
    """

    factor: float = setting(1.0, at_least=1)  # new context length / original length

    def scaled(self, frequency_H: jax.Array, base: float, length_BL: jax.Array | None) -> jax.Array:
        """See `RotaryScaling`."""
        return frequency_H / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling(RotaryScaling):
    """A base that grows with documents longer than in pre-training (dynamic NTK).

    Source: transformers, modeling_rope_utils.py, "dynamic".
    """

    by_length: ClassVar[bool] = True

    # How fast the base grows with the length beyond original_length.
    factor: float = setting(1.0, at_least=1)
    original_length: int = setting(2048, at_least=1)  # tokens; shorter documents are unchanged

    def scaled(self, frequency_H: jax.Array, base: float, length_BL: jax.Array | None) -> jax.Array:
        """See `RotaryScaling`."""
        assert length_BL is not None, "by_length"
        stretch_BL = jnp.maximum(length_BL.astype(jnp.float32) / self.original_length, 1.0)
        growth_BL = self.factor * stretch_BL - (self.factor - 1)
        half = frequency_H.shape[0]
        exponent_H = -jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1)
        return frequency_H * growth_BL[:, :, None, None] ** exponent_H


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Divides slow frequencies by a factor, keeps fast ones, interpolates between.

    Source: Llama 3.1; transformers, modeling_rope_utils.py, "llama3".
    """

    factor: float = setting(8.0, at_least=1)  # divides slow frequencies
    # A frequency with fewer turns within original_length is divided by the whole factor.
    low_turns: float = setting(1.0, above=0)
    high_turns: float = setting(4.0, above=0)  # a frequency with more turns is kept
    original_length: int = setting(8192, at_least=1)  # tokens of pre-training

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.low_turns <= self.high_turns,
            "low_turns must be at most high_turns",
            f"low_turns={self.low_turns}, high_turns={self.high_turns}",
            "Change one of them",
        )

    def scaled(self, frequency_H: jax.Array, base: float, length_BL: jax.Array | None) -> jax.Array:
        """See `RotaryScaling`."""
        turns_H = self.original_length * frequency_H / (2 * math.pi)
        # If the width is 0, as in Llama 4 Scout, a frequency is either kept or divided.
        width = self.high_turns - self.low_turns or 1e-6
        kept_H = jnp.clip((turns_H - self.low_turns) / width, 0, 1)
        return (1 - kept_H) * frequency_H / self.factor + kept_H * frequency_H


@dataclasses.dataclass(frozen=True)
class Yarn(RotaryScaling):
    """Divides slow frequencies by a factor, keeps fast ones, with a ramp between.

    Scores also grow with the factor. `cos_sin_factor` is `attention_factor` if that is set. With
    both `mscale` and `mscale_all_dim` it is m(mscale) / m(mscale_all_dim), otherwise m(1), where
    m(s) = 0.1 s ln(factor) + 1.

    Source: Peng et al. 2023, arXiv:2309.00071, sec. 3.2 to 3.4; mscale: DeepSeek-V2's model code;
      transformers, modeling_rope_utils.py, "yarn".
    """

    factor: float = setting(1.0, at_least=1)  # divides slow frequencies
    original_length: int = setting(4096, at_least=1)  # tokens of pre-training
    fast_turns: float = setting(32.0, above=0)  # beta_fast: turns within original_length
    slow_turns: float = setting(1.0, above=0)  # beta_slow
    truncate: bool = True  # the ramp begins and ends at whole pairs; not in gpt-oss
    attention_factor: float | None = setting(None, above=0)  # of cosines and sines
    mscale: float = setting(0.0, at_least=0)  # 0: none
    mscale_all_dim: float = setting(0.0, at_least=0)  # 0: none

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.slow_turns <= self.fast_turns,  # Kimi K2: equal
            "slow_turns must be at most fast_turns",
            f"slow_turns={self.slow_turns}, fast_turns={self.fast_turns}",
            "Change one of them",
        )

    def scaled(self, frequency_H: jax.Array, base: float, length_BL: jax.Array | None) -> jax.Array:
        """See `RotaryScaling`."""
        half = frequency_H.shape[0]
        first, last = (
            half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)
            for turns in (self.fast_turns, self.slow_turns)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        width = last - first or 0.001  # as in transformers for a ramp without width
        slow_H = jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / width, 0, 1)
        return slow_H * frequency_H / self.factor + (1 - slow_H) * frequency_H

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def cos_sin_factor(self) -> float:
        """See `RotaryScaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_factor(self) -> float:
        """See `RotaryScaling`: m(mscale_all_dim) squared."""
        return self._magnitude(self.mscale_all_dim) ** 2


@dataclasses.dataclass(frozen=True)
class LongRope(RotaryScaling):
    """Divides each frequency by its own factor; long documents have other factors.

    A document is long if its final length exceeds `original_length` tokens.

    Source: Ding et al. 2024, arXiv:2402.13753; transformers, modeling_rope_utils.py, "longrope".
    """

    by_length: ClassVar[bool] = True

    short_factors: tuple[float, ...] = setting((), above=0)  # [H]; (): all 1
    long_factors: tuple[float, ...] = setting((), above=0)  # [H]; (): all 1
    original_length: int = setting(4096, at_least=2)  # tokens of pre-training
    factor: float = setting(1.0, at_least=1)  # longest context / original_length
    # Of cosines and sines; None: sqrt(1 + ln(factor) / ln(original_length)).
    attention_factor: float | None = setting(None, above=0)
    # The same in long documents (long_mscale of Phi-3.5); None: as in short ones.
    long_attention_factor: float | None = setting(None, above=0)

    def check_dim(self, dim: int) -> None:
        """See `RotaryScaling`."""
        sizes = {len(self.short_factors), len(self.long_factors)}
        require(
            sizes <= {0, dim // 2},
            "short_factors and long_factors must have one factor per turning pair",
            f"{len(self.short_factors)} and {len(self.long_factors)}, {dim // 2} pairs",
            "Correct them, or the dims that turn",
        )

    def scaled(self, frequency_H: jax.Array, base: float, length_BL: jax.Array | None) -> jax.Array:
        """See `RotaryScaling`."""
        short_H, long_H = (
            frequency_H / jnp.asarray(factors or (1.0,), jnp.float32)
            for factors in (self.short_factors, self.long_factors)
        )
        return jnp.where(self.is_long(length_BL), long_H, short_H)

    def is_long(self, length_BL: jax.Array | None) -> jax.Array:
        """Whether a token's document is longer than in pre-training: bool [B, L, 1, 1]."""
        assert length_BL is not None, "by_length"
        return (length_BL > self.original_length)[:, :, None, None]

    @property
    def cos_sin_factor(self) -> float:
        """See `RotaryScaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def cos_sin_factors(self, length_BL: jax.Array | None) -> jax.Array | float:
        """See `RotaryScaling`."""
        if self.long_attention_factor is None:
            return self.cos_sin_factor
        is_long = self.is_long(length_BL)
        return jnp.where(is_long, self.long_attention_factor, self.cos_sin_factor)


def document_lengths(
    positions_BL: jax.Array, segments_BL: jax.Array | None, lengths_B: jax.Array | None = None
) -> jax.Array:
    """int32 [B, L]: `lengths_B`, or the last position of each token's document or row, plus 1."""
    if lengths_B is not None:
        return jnp.broadcast_to(lengths_B[:, None], positions_BL.shape)
    if segments_BL is None:
        longest_B1 = jnp.max(positions_BL, axis=1, keepdims=True)
        return jnp.broadcast_to(longest_B1 + 1, positions_BL.shape)
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    return jnp.max(jnp.where(same_BLL, positions_BL[:, None, :], 0), axis=-1) + 1
