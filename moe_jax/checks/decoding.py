"""Decoding from caches compared with one pass, for `moe_jax.checks`."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks.around import LENGTH
from moe_jax.checks.trial import STEP, Trial
from moe_jax.parameters import init_parameters
from moe_jax.part import Call

ENDS = (0, 5, 6, LENGTH)  # bounds of what is read at once: a prompt, one token, two tokens
PADDING = (0, 3, 4)  # places before the text of a row, in turn


def read_twice(trial: Trial) -> tuple[Any, Any]:
    """The logits of the first batch from caches, and from one pass without: float32 [B, L, V].

    With caches, a row begins after some padding, whose logits are set to 0. In the pass it begins
    at the first place, followed by padding. Routing is dropless.
    """
    model, params, state = trial.model.map_parts(in_one_group), trial.params, trial.state
    tokens_BL = trial.batches.tokens_PBL[0]
    padding_B1 = np.resize(PADDING, trial.batch_size)[:, None]
    places_L = np.arange(LENGTH)
    is_text_BL = places_L >= padding_B1
    every = Call(
        step=jnp.int32(STEP), capacity=0.0, encoder=trial.encoder, contiguous=True,
        lengths_B=jnp.asarray(LENGTH - padding_B1[:, 0], jnp.int32),
    )  # fmt: skip
    moved_BL = (places_L + padding_B1) % LENGTH  # the place of a row that moves there

    @jax.jit
    def at_once(params: Any) -> jax.Array:
        call = dataclasses.replace(
            every,
            tokens_BL=jnp.asarray(np.take_along_axis(tokens_BL, moved_BL, 1)),
            positions_BL=jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens_BL.shape),
            segments_BL=jnp.asarray(np.take_along_axis(is_text_BL, moved_BL, 1), jnp.int32),
        )
        return model.run(params, call, state=state).logits_BLV

    @jax.jit
    def from_caches(params: Any) -> jax.Array:
        dims = model.dims._replace(memory_length=LENGTH if model.has_encoder else 0)
        specs = model.decoder.cache_specs(dims, trial.batch_size, LENGTH)
        cache, logits = init_parameters(jax.random.key(0), specs), []
        call, _ = model.encode(params, every, state=state)
        for start, end in itertools.pairwise(ENDS):
            piece = dataclasses.replace(
                call,
                tokens_BL=jnp.asarray(tokens_BL[:, start:end]),
                previous_B=jnp.asarray(tokens_BL[:, start - 1]) if start else None,
                positions_BL=jnp.maximum(jnp.asarray(places_L - padding_B1)[:, start:end], 0),
                segments_BL=jnp.asarray(is_text_BL[:, start:end], jnp.int32),
                cache_index=jnp.int32(start),
                cache_length=LENGTH,
                prefill=start == 0,
            )
            output = model.run(params, piece, state=state, cache=cache)
            cache = output.cache
            logits.append(output.logits_BLV)
        return jnp.concatenate(logits, axis=1)

    whole_BLV = np.take_along_axis(
        np.asarray(at_once(params)), ((places_L - padding_B1) % LENGTH)[..., None], 1
    )
    is_text_BL1 = is_text_BL[..., None]
    return np.asarray(from_caches(params)) * is_text_BL1, whole_BLV * is_text_BL1


def in_one_group(part: Any) -> Any:
    """An MoE part with one sequence per routing group, as in generation."""
    return dataclasses.replace(part, group_size=0) if part.routes else part
