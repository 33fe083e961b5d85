"""What the einsum and gather dispatchers share: the slots of every expert side by side."""

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.exchange import Exchange
from moe_jax.moe.experts import Experts, Weights


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


def through_experts(
    x_EGCM: jax.Array,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    exchange: Exchange,
) -> jax.Array:
    """Carries slots to their experts, computes them, and carries the outputs back, [E, G, C, M].

    In several chunks the slots of an expert are cut; no chunk waits for another, so that a compiler
    with asynchronous collectives overlaps them.
    """
    num_chunks = min(exchange.num_chunks, x_EGCM.shape[2])
    outputs = []
    for i, chunk_EGCM in enumerate(jnp.array_split(x_EGCM, num_chunks, axis=2)):
        key = rng if rng is None or i == 0 else jax.random.fold_in(rng, i)
        chunk_EGCM = exchange.to_experts(chunk_EGCM)
        outputs.append(exchange.to_tokens(experts(chunk_EGCM, weights, Slots(key))))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)
