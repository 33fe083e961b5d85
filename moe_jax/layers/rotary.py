"""Rotary positions (legend: `moe_jax.moe`)."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.layers.rotary_scaling import RotaryScaling, document_lengths
from moe_jax.parallel.rules import platform


@dataclasses.dataclass(frozen=True)
class Rotary(Settings):
    """Rotates pairs of features of queries and keys by an angle that grows with position.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34 (interleaved pairs); halves: GPT-NeoX, Llama.
    """

    family: ClassVar[str] = "rotary"

    base: float = setting(10_000.0, above=1)  # slowest pair: about 1 / base radians per position
    dim: int | None = setting(None, at_least=2)  # number of leading dims that rotate; None: all
    interleaved: bool = False  # pairs (2j, 2j + 1); else (j, j + dim / 2)
    scaling: RotaryScaling | None = None  # of frequencies, for longer contexts

    def check(self) -> None:
        """See `Settings`."""
        if self.dim is not None:
            self.check_head_dim(self.dim)

    def check_head_dim(self, head_dim: int, name: str = "head_dim") -> None:
        """Raises `ValueError` if the rotary dims do not fit a head dim of this `name`."""
        turning = head_dim if self.dim is None else self.dim
        own = name if self.dim is None else "rotary.dim"
        require(
            turning % 2 == 0,
            f"rotary positions need an even {own}",
            f"{own}={turning}",
            "Use an even number",
        )
        require(
            turning <= head_dim,
            f"rotary.dim must be at most {name}",
            f"rotary.dim={turning}, {name}={head_dim}",
            "Lower it, or set it to None",
        )
        if self.scaling is not None:
            self.scaling.check_dim(turning)

    @property
    def softmax_factor(self) -> float:
        """The factor on the scale of DeepSeek's latent attention (YaRN with mscale_all_dim).

        `Attention` ignores it, like models with plain attention.
        """
        return 1.0 if self.scaling is None else self.scaling.softmax_factor

    def rotate(
        self,
        x_BLND: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
    ) -> jax.Array:
        """Rotates queries or keys.

        Args:
          x_BLND: queries or keys.
          positions_BL: int32 positions, restarting at 0 in every document.
          segments_BL: int32, the documents of a row, whose lengths some scalings need; None: a row
            is one document.
          lengths_B: int32, the final length of each row's document; None: that of the row.

        Returns:
          [B, L, N, D] in the dtype of `x_BLND`; angles in float32.
        """
        turning = x_BLND.shape[-1] if self.dim is None else self.dim
        half = turning // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        length_BL = None
        if self.scaling is not None:
            if self.scaling.by_length:
                length_BL = document_lengths(positions_BL, segments_BL, lengths_B)
            frequency = self.scaling.scaled(frequency, self.base, length_BL)
        angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if self.scaling is not None:
            factors = self.scaling.cos_sin_factors(length_BL)
            cos, sin = cos * factors, sin * factors
        # Computed once for queries, keys and all layers. Without the barrier, XLA would recompute
        # them for every rotated number. On a CPU it would do so for two arrays, hence the stack.
        cos, sin = jax.lax.optimization_barrier(jnp.stack((cos, sin)))
        x_BLND, rest = x_BLND[..., :turning], x_BLND[..., turning:]
        turned = turn(x_BLND, cos, sin, self.interleaved)
        return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def turn(x_BLND: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates every pair of features by its own angle; `cos` and `sin` are [B, L, 1, D / 2].

    Computed in float32, rounded to the dtype of `x_BLND`. The gradient is a rotation back, without
    the sums that the gradient of slices and a concatenation has.
    """
    x32 = x_BLND.astype(jnp.float32)
    if not interleaved:
        first, second = jnp.split(x32, 2, axis=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(pair, axis=-1).astype(x_BLND.dtype)
    if platform() == "tpu":
        cos, sin = (jnp.repeat(table, 2, axis=-1) for table in (cos, sin))
        return (x32 * cos + quarter_turn(x_BLND) * sin).astype(x_BLND.dtype)
    first, second = x32[..., ::2], x32[..., 1::2]
    pair = (first * cos - second * sin, second * cos + first * sin)
    return jnp.stack(pair, axis=-1).reshape(x32.shape).astype(x_BLND.dtype)


def _turn_forward(
    x_BLND: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return turn(x_BLND, cos, sin, interleaved), (cos, sin)


def _turn_back(
    interleaved: bool, angles: tuple[jax.Array, jax.Array], dturned_BLND: jax.Array
) -> tuple[jax.Array, None, None]:
    cos, sin = angles
    return turn(dturned_BLND, cos, -sin, interleaved), None, None


turn.defvjp(_turn_forward, _turn_back)


def quarter_turn(x: jax.Array) -> jax.Array:
    """(-x1, x0) of every pair (x0, x1) of neighbours in the last dim, float32.

    It multiplies by a matrix of 0, 1 and -1. The result is exact for finite numbers, since only one
    product of each sum is not 0. A TPU keeps the last dim in its lanes, where separating every
    second number moves the array about ten times.
    """
    size = x.shape[-1]
    pairs = np.kron(np.eye(size // 2), [[0, 1], [-1, 0]])
    highest = jax.lax.Precision.HIGHEST  # or a TPU rounds float32 to bfloat16
    return jnp.matmul(
        x, jnp.asarray(pairs, x.dtype), precision=highest, preferred_element_type=jnp.float32
    )
