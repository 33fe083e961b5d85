"""The layout of the einsum and gather dispatchers: the slots of every expert side by side."""

import jax
import jax.numpy as jnp


class Slots:
    """Rows `[E, G, C, I]`: the slots of expert e meet its weights `[e, I, O]`."""

    def __init__(self, rng: jax.Array | None):
        self.rng = rng

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[E, G, C, I] x [E, I, O] -> [E, G, C, O]."""
        return jnp.einsum("EGCI,EIO->EGCO", x, weight)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[E, O] -> [E, 1, 1, O]."""
        return bias[:, None, None, :]
