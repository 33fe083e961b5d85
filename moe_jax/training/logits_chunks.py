"""Scores in chunks of positions, so that the logits of one chunk exist at a time.

The logits of a microbatch, in float32 and with their gradient, can be the largest arrays of a step:
8 x 4,096 positions of 152,000 ids take 20 GB, twice. Legend: `moe_jax.moe`; C counts chunks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.parallel.rules import mesh_axes, mesh_in_use

Fields = Mapping[str, jax.Array]
Score = Callable[[jax.Array, Fields], Any]


def over_chunks(score: Score, hidden_BLM: jax.Array, fields: Fields, num_chunks: int) -> Any:
    """Scores chunks of positions one after another; the backward pass scores each again.

    Args:
      score: a function of hidden states and fields, [B, L / C, ...].
      hidden_BLM: what the head reads.
      fields: arrays [B, L, ...].
      num_chunks: C, a divisor of L; 1 scores all positions at once and none again.

    Returns:
      The outputs of `score`, with a leading dim C.
    """
    if num_chunks == 1:
        return jax.tree.map(lambda x: x[None], score(hidden_BLM, fields))

    def in_chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]), 1, 0)

    again = jax.checkpoint(score, prevent_cse=False)  # the loop already keeps the two apart
    chunks = jax.tree.map(in_chunks, (hidden_BLM, dict(fields)))
    return jax.lax.map(lambda chunk: again(*chunk), chunks)


def sum_over_chunks(
    score: Callable[..., Any],
    weights: Any,
    hidden_BLM: jax.Array,
    fields: Fields,
    others: Any,
    num_chunks: int,
) -> Any:
    """The sums of scores over chunks and devices.

    On a mesh each device sums the gradient of its weights over its chunks. So weights are gathered
    once and gradients reduced once, not once per chunk.

    Args:
      score: a function of weights, hidden states, fields and others; its outputs add up over
        positions and sequences.
      weights: of the head.
      hidden_BLM: see `over_chunks`.
      fields: see `over_chunks`.
      others: further arrays, the same for all chunks.
      num_chunks: C, a divisor of L.
    """

    def total(weights: Any, hidden_BLM: jax.Array, fields: Fields, others: Any) -> Any:
        scores = over_chunks(
            lambda hidden_BLM, fields: score(weights, hidden_BLM, fields, others),
            hidden_BLM, fields, num_chunks,
        )  # fmt: skip
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), scores)

    mesh = mesh_in_use()
    axes = () if mesh is None else mesh_axes("batch", mesh)
    if num_chunks == 1 or not axes:
        return total(weights, hidden_BLM, dict(fields), others)

    def on_device(weights: Any, hidden_BLM: jax.Array, fields: Fields, others: Any) -> Any:
        # Varying from here on: their gradients are summed over devices here, after the loop.
        weights, others = jax.lax.pcast((weights, others), axes, to="varying")
        return jax.lax.psum(total(weights, hidden_BLM, fields, others), axes)

    return jax.shard_map(
        on_device,
        in_specs=(jax.P(), jax.P(axes), jax.P(axes), jax.P()),
        out_specs=jax.P(),
        axis_names=set(axes),
    )(weights, hidden_BLM, dict(fields), others)
