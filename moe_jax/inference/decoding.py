"""Prefill and decode: rows of tokens go on from caches (legend: `moe_jax.moe`; T counts slots).

Prompts of different lengths are padded on the left, so that every row goes on in the same slot.
Padding is seen by no layer, and a row gets the same whatever stands beside it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.inference.sampling import Sampling, draw
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, EncoderInputs


class Serving(NamedTuple):
    """What every call of a generation shares, besides the model.

    Attributes:
      params: of the model.
      state: of its parts, such as selection biases; or None.
      step: int32 scalar, of training, for settings that are annealed; None: at their ends.
    """

    params: Any
    state: Mapping[str, Any] | None = None
    step: jax.Array | None = None


class Rows(NamedTuple):
    """Texts on their way.

    Attributes:
      cache: of the stack, by position; of its slots `filled` are.
      filled: int32 scalar.
      logits_BV: float32, of the next token.
      positions_B: int32, of the next token in its text.
      last_B: int32, the last token.
      live_B: bool, False for padding and for texts that have ended.
      seen_BV: bool, tokens of the text so far; None without a penalty on repetition.
      sample_B: int32, number of a row's random keys.
      memory: the output of the encoder and its segments, or None.
    """

    cache: Any
    filled: jax.Array
    logits_BV: jax.Array
    positions_B: jax.Array
    last_B: jax.Array
    live_B: jax.Array
    seen_BV: jax.Array | None
    sample_B: jax.Array
    memory: tuple[jax.Array, jax.Array] | None


@functools.partial(jax.jit, static_argnames=("model", "num_slots", "sampling", "capacity"))
def prefill(
    serving: Serving,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    sample_B: jax.Array,
    encoder: EncoderInputs | None = None,
    *,
    model: LanguageModel,
    num_slots: int,
    sampling: Sampling,
    capacity: float = 0.0,
) -> Rows:
    """Reads the prompts.

    Args:
      serving: parameters and state.
      tokens_BL: int32, the prompts, padded on the left.
      segments_BL: int32, 1; 0 for padding, of which a row may be whole.
      sample_B: see `Rows`.
      encoder: what the encoder reads; None without one.
      model: the model.
      num_slots: T, of the caches: L and all tokens to come.
      sampling: whether to keep count of tokens seen.
      capacity: capacity factor of MoE layers; 0: dropless.
    """
    positions_BL = jnp.maximum(jnp.cumsum(segments_BL, axis=1) - 1, 0)
    call = Call(
        tokens_BL=tokens_BL, positions_BL=positions_BL, segments_BL=segments_BL, counts_up=True,
        step=serving.step, encoder=encoder, cache_index=jnp.int32(0), cache_length=num_slots,
        prefill=True, capacity=capacity,
    )  # fmt: skip
    call, _ = model.encode(serving.params, call, state=serving.state)
    batch, memory = tokens_BL.shape[0], None
    if call.memory is not None:
        assert call.memory_segments_BT is not None
        memory = (call.memory, call.memory_segments_BT)
    cache = empty_cache(model, batch, num_slots, 0 if memory is None else memory[0].shape[1])
    output = model.run(serving.params, call, state=serving.state, cache=cache, last_alone=True)
    seen_BV = None
    if sampling.repetition_penalty != 1:
        rows = jnp.arange(batch)[:, None]
        seen_BV = jnp.zeros((batch, model.vocab_size), jnp.bool_)
        seen_BV = seen_BV.at[rows, tokens_BL].max(segments_BL > 0)
    return Rows(
        cache=output.cache,
        filled=jnp.int32(tokens_BL.shape[1]),
        logits_BV=output.logits_BLV[:, -1],
        positions_B=positions_BL[:, -1] + 1,
        last_B=tokens_BL[:, -1],
        live_B=segments_BL[:, -1] > 0,
        seen_BV=seen_BV,
        sample_B=sample_B,
        memory=memory,
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "num_slots", "num_tokens", "sampling", "num_ids", "capacity"),
    donate_argnames=("rows",),
)
def decode(
    serving: Serving,
    rows: Rows,
    stop_S: jax.Array,
    *,
    model: LanguageModel,
    num_slots: int,
    num_tokens: int,
    sampling: Sampling,
    num_ids: int | None = None,
    capacity: float = 0.0,
) -> tuple[Rows, jax.Array]:
    """Adds tokens to every row.

    Args:
      serving: parameters and state.
      rows: as `prefill` or an earlier call left them; their arrays are used up.
      stop_S: int32, tokens that end a text.
      model: the model.
      num_slots: T, as in `prefill`.
      num_tokens: how many to add.
      sampling: how they are drawn.
      num_ids: ids from here on have logits but are no tokens; None: all are.
      capacity: capacity factor of MoE layers; 0: dropless.

    Returns:
      The rows, and the tokens, int32 [B, num_tokens]; those behind the end of a text say nothing.
    """

    def one(rows: Rows, _: None) -> tuple[Rows, jax.Array]:
        logits_BV = rows.logits_BV
        if num_ids is not None:
            logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < num_ids, logits_BV, -jnp.inf)
        key = jax.random.key(sampling.seed)
        keys_B = jax.vmap(lambda n, i: jax.random.fold_in(jax.random.fold_in(key, n), i))(
            rows.sample_B, rows.positions_B
        )
        token_B = draw(logits_BV, rows.seen_BV, keys_B, sampling)
        live_B = rows.live_B & ~jnp.any(token_B[:, None] == stop_S, axis=-1)
        memory, memory_segments_BT = rows.memory or (None, None)
        call = Call(
            tokens_BL=token_B[:, None],
            previous_B=rows.last_B,
            positions_BL=rows.positions_B[:, None],
            segments_BL=live_B.astype(jnp.int32)[:, None],
            counts_up=True,
            step=serving.step,
            memory=memory,
            memory_segments_BT=memory_segments_BT,
            cache_index=rows.filled,
            cache_length=num_slots,
            capacity=capacity,
        )
        output = model.run(serving.params, call, state=serving.state, cache=rows.cache)
        seen_BV = rows.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        rows = Rows(
            cache=output.cache,
            filled=rows.filled + 1,
            logits_BV=output.logits_BLV[:, -1],
            positions_B=rows.positions_B + 1,
            last_B=token_B,
            live_B=live_B,
            seen_BV=seen_BV,
            sample_B=rows.sample_B,
            memory=rows.memory,
        )
        return rows, token_B

    rows, tokens_NB = jax.lax.scan(one, rows, None, length=num_tokens)
    return rows, constrain(tokens_NB.T, None, None)


def empty_cache(model: LanguageModel, batch: int, num_slots: int, memory_length: int = 0) -> Any:
    """The caches of a model before the first token, by position, laid on the mesh in use.

    What is kept of tokens, the component "cache", has the compute dtype.
    """
    dims = model.dims._replace(memory_length=memory_length)
    specs = model.decoder.cache_specs(dims, batch, num_slots)

    def narrowed(spec: Any) -> Any:
        is_float = jnp.issubdtype(spec.dtype, jnp.floating)
        kept = is_float and spec.component == "cache"
        return dataclasses.replace(spec, dtype=model.compute_dtype) if kept else spec

    specs = jax.tree.map(narrowed, specs)
    arrays = init_parameters(jax.random.key(0), specs)
    return jax.tree.map(lambda spec, array: constrain(array, *spec.axes), specs, arrays)
