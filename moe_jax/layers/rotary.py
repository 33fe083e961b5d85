"""Rotary positions (legend: `moe_jax.moe`)."""

import jax
import jax.numpy as jnp


def rotate(x_BLND: jax.Array, positions_BL: jax.Array, base: float) -> jax.Array:
    """Turns pairs of features (d, d + D/2) by an angle that grows with the position.

    Args:
      x_BLND: queries or keys; D is even.
      positions_BL: int32 positions, restarting at 0 in every document.
      base: the slowest pair turns by about 1 / base radian a position.

    Returns:
      [B, L, N, D] in the dtype of `x_BLND`; angles in float32.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, with the halves layout of GPT-NeoX and Llama.
    """
    half = x_BLND.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BLND.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLND.dtype)
