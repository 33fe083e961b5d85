"""Prefill and decode: rows of tokens continue from caches (legend: `moe_jax.moe`; T counts slots).

Prompts of different lengths are padded on the left, so that every row continues in the same slot.
No layer sees padding. Without a capacity, the result of a row does not depend on the other rows.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.inference.sampling import Sampling, draw
from moe_jax.models.capacity import without_capacity
from moe_jax.models.model import LanguageModel
from moe_jax.models.output import ModelOutput
from moe_jax.models.routing_record import choices_of
from moe_jax.models.token_routes import ABSENT
from moe_jax.models.unrolled import unrolled, unrolled_params
from moe_jax.moe.routing import Choices
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, EncoderInputs

Routes = dict[str, jax.Array]  # experts by part, int32 [X, B, L, K]; {} without a record


class Serving(NamedTuple):
    """Inputs that every call of a generation shares, besides the model.

    Attributes:
      params: of the model.
      state: of its parts, such as selection biases; or None.
      step: int32 scalar, training step for annealed settings; None: their end values.
    """

    params: Any
    state: Mapping[str, Any] | None = None
    step: jax.Array | None = None


class Rows(NamedTuple):
    """Texts that are being decoded.

    Attributes:
      cache: of the stack, by layer position.
      filled: int32 scalar, number of filled slots of the cache.
      logits_BV: float32, of the next token.
      positions_B: int32, of the next token in its text.
      last_B: int32, the last token.
      live_B: bool, False for padding and for texts that have ended.
      seen_BV: bool, tokens of the text so far; None without a repetition penalty.
      sample_B: int32, number from which a row's random keys are made.
      before_B: int32, number of tokens before the first position, which are no longer seen.
      memory: the output of the encoder and its segments, or None.
      lengths_B: int32, maximum length of each text in tokens; see `Call`.
    """

    cache: Any
    filled: jax.Array
    logits_BV: jax.Array
    positions_B: jax.Array
    last_B: jax.Array
    live_B: jax.Array
    seen_BV: jax.Array | None
    sample_B: jax.Array
    before_B: jax.Array
    memory: tuple[jax.Array, jax.Array] | None
    lengths_B: jax.Array


class Prompts(NamedTuple):
    """Texts to continue; NumPy or JAX arrays.

    Attributes:
      tokens_BL: int32, padded on the left.
      segments_BL: int32, 1 for tokens, 0 for padding; a whole row may be padding.
      sample_B: see `Rows`.
      lengths_B: see `Rows`.
      encoder: inputs of the encoder; None without one.
      in_prefix_BL: bool; see `Call`.
      before_B: see `Rows`.
      seen_BV: bool, tokens before the first position; None: the repetition penalty ignores them.
    """

    tokens_BL: Any
    segments_BL: Any
    sample_B: Any
    lengths_B: Any
    encoder: EncoderInputs | None = None
    in_prefix_BL: Any = None
    before_B: Any = 0
    seen_BV: Any = None


@functools.partial(
    jax.jit, static_argnames=("model", "num_slots", "sampling", "capacity", "record")
)
def prefill(
    serving: Serving,
    prompts: Prompts,
    *,
    model: LanguageModel,
    num_slots: int,
    sampling: Sampling,
    capacity: float = 0.0,
    record: bool = False,
) -> tuple[Rows, Routes]:
    """Reads the prompts.

    Args:
      serving: parameters and state.
      prompts: the prompts.
      model: the model.
      num_slots: T, of the caches: L and all new tokens.
      sampling: its repetition penalty decides whether the rows record the tokens seen.
      capacity: capacity factor of MoE layers; 0: dropless.
      record: whether to return the experts.

    Returns:
      The rows, and the experts of the prompts.
    """
    how: dict[str, Any] = {"num_slots": num_slots, "capacity": capacity, "record": record}
    call, output = read(serving, prompts, model=model, last_alone=True, **how)
    assert call.positions_BL is not None
    memory = None
    if call.memory is not None:
        assert call.memory_segments_BT is not None
        memory = (call.memory, call.memory_segments_BT)
    rows = Rows(
        cache=output.cache,
        filled=jnp.int32(prompts.tokens_BL.shape[1]),
        logits_BV=output.logits_BLV[:, -1],
        positions_B=call.positions_BL[:, -1] + 1,
        last_B=prompts.tokens_BL[:, -1],
        live_B=prompts.segments_BL[:, -1] > 0,
        seen_BV=seen_in(prompts, model.vocab_size, sampling),
        sample_B=prompts.sample_B,
        before_B=jnp.asarray(prompts.before_B, jnp.int32),
        memory=memory,
        lengths_B=prompts.lengths_B,
    )
    return rows, routes_of(model, output)


def read(
    serving: Serving,
    prompts: Prompts,
    *,
    model: LanguageModel,
    num_slots: int,
    capacity: float = 0.0,
    record: bool = False,
    last_alone: bool = False,
) -> tuple[Call, ModelOutput]:
    """Runs the prompts through a model with an empty cache; for the arguments see `prefill`."""
    segments_BL = jnp.asarray(prompts.segments_BL)
    call = Call(
        tokens_BL=prompts.tokens_BL,
        positions_BL=jnp.maximum(jnp.cumsum(segments_BL, axis=1) - 1, 0),
        segments_BL=segments_BL, contiguous=True, step=serving.step, encoder=prompts.encoder,
        cache_index=jnp.int32(0), cache_length=num_slots, prefill=True, capacity=capacity,
        lengths_B=prompts.lengths_B, record=record, in_prefix_BL=prompts.in_prefix_BL,
    )  # fmt: skip
    call, _ = model.encode(serving.params, call, state=serving.state)
    memory_length = 0 if call.memory is None else call.memory.shape[1]
    cache = empty_cache(model, segments_BL.shape[0], num_slots, memory_length)
    return call, model.run(
        serving.params, call, state=serving.state, cache=cache, last_alone=last_alone
    )


def seen_in(prompts: Prompts, vocab_size: int, sampling: Sampling) -> jax.Array | None:
    """The tokens of each text so far, bool [B, V]; None without a repetition penalty."""
    if sampling.repetition_penalty == 1:
        return None
    rows = jnp.arange(prompts.tokens_BL.shape[0])[:, None]
    seen_BV = jnp.zeros((len(rows), vocab_size), jnp.bool_)
    if prompts.seen_BV is not None:
        seen_BV = jnp.asarray(prompts.seen_BV)
    return seen_BV.at[rows, prompts.tokens_BL].max(prompts.segments_BL > 0)


def routes_of(model: LanguageModel, output: ModelOutput) -> Routes:
    """The experts of the decoder's tokens, by part: int32 [X, B, L, K], -1 where absent."""

    def of(choices: Choices) -> jax.Array:
        index_XBLK = jnp.where(choices.chosen, choices.expert_index, ABSENT)
        return constrain(index_XBLK, None, None, None, None)  # every process reads all

    choices = choices_of(output.aux)
    return {name: of(choices[name]) for name in model.decoder.parts() if name in choices}


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "num_slots",
        "num_tokens",
        "sampling",
        "num_ids",
        "capacity",
        "record",
    ),
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
    record: bool = False,
) -> tuple[Rows, jax.Array, Routes]:
    """Adds tokens to every row.

    Args:
      serving: parameters and state.
      rows: from `prefill` or an earlier call; their arrays are donated.
      stop_S: int32, tokens that end a text.
      model: the model.
      num_slots: T, as in `prefill`.
      num_tokens: number of tokens to add.
      sampling: how tokens are drawn.
      num_ids: ids from here on have logits but are not tokens; None: all are tokens.
      capacity: capacity factor of MoE layers; 0: dropless.
      record: whether to return the experts.

    Returns:
      The rows; the tokens, int32 [B, num_tokens]; their experts. Entries after the end of a text
      are meaningless.
    """

    def one(rows: Rows, _: None) -> tuple[Rows, tuple[jax.Array, Routes]]:
        keys_B = keys_of(rows.sample_B, rows.before_B + rows.positions_B, sampling)
        token_B = draw(below(rows.logits_BV, num_ids), rows.seen_BV, keys_B, sampling)
        live_B = rows.live_B & ~jnp.any(token_B[:, None] == stop_S, axis=-1)
        memory, memory_segments_BT = rows.memory or (None, None)
        call = Call(
            tokens_BL=token_B[:, None],
            previous_B=rows.last_B,
            positions_BL=rows.positions_B[:, None],
            segments_BL=live_B.astype(jnp.int32)[:, None],
            contiguous=True,
            step=serving.step,
            memory=memory,
            memory_segments_BT=memory_segments_BT,
            cache_index=rows.filled,
            cache_length=num_slots,
            capacity=capacity,
            lengths_B=rows.lengths_B,
            record=record,
        )
        output = model.run(serving.params, call, state=serving.state, cache=rows.cache)
        rows = rows._replace(
            cache=output.cache,
            filled=rows.filled + 1,
            logits_BV=output.logits_BLV[:, -1],
            positions_B=rows.positions_B + 1,
            last_B=token_B,
            live_B=live_B,
            seen_BV=with_token(rows.seen_BV, token_B),
        )
        return rows, (token_B, routes_of(model, output))

    rows, (tokens_NB, routes) = jax.lax.scan(one, rows, None, length=num_tokens)
    # [N, X, B, 1, K] by part, to [X, B, N, K].
    routes = jax.tree.map(lambda a: a[:, :, :, 0].transpose(1, 2, 0, 3), routes)
    return rows, constrain(tokens_NB.T, None, None), routes


def with_token(seen_BV: jax.Array | None, token_B: jax.Array) -> jax.Array | None:
    """The tokens seen, with one more in each row."""
    return None if seen_BV is None else seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


def keys_of(sample_B: jax.Array, places_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The random key of the token in each place, [B]; it does not depend on the other rows.

    Places are counted from the beginning of the text, even if its first tokens are no longer seen.
    """
    key = jax.random.key(sampling.seed)
    return jax.vmap(lambda n, i: jax.random.fold_in(jax.random.fold_in(key, n), i))(
        sample_B, places_B
    )


def below(logits: jax.Array, num_ids: int | None) -> jax.Array:
    """Logits [..., V] with -inf for ids that are not tokens."""
    if num_ids is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < num_ids, logits, -jnp.inf)


def for_inference(model: LanguageModel) -> LanguageModel:
    """The model with one sequence per routing group, without rematerialisation."""
    return dataclasses.replace(in_groups(model, 0), remat="none")


def why_anew(model: LanguageModel) -> str:
    """Why a model must read its whole context anew for every token; "" if caches suffice."""
    if without_capacity(model).looks_ahead(training=False):
        ahead = sorted(n for n, part in model.part.items() if part.looks_ahead(training=False))
        return f"{ahead} look at later tokens"
    uncached = model.decoder.without_cache(model.dims)
    return f"{uncached} have no cache_specs, and pointwise=False" if uncached else ""


def layers_apart(model: LanguageModel, serving: Serving) -> tuple[LanguageModel, Serving]:
    """On one CPU, the model with unrolled layers, each with its own arrays.

    On a CPU, a scan over layers copies the matrices of a layer before it multiplies by them, which
    takes half of the decoding time (docs/results.md). The new arrays are views of the stacked ones;
    a copy is made only where a view does not begin at a multiple of 64 bytes. On accelerators and
    meshes the layers stay scanned. So do the layers of a quantised model: if they are unrolled, XLA
    dequantises all of them before the first product.
    """
    if model.quantisation is not None:
        return model, serving
    arrays = [leaf for leaf in jax.tree.leaves(serving.params) if isinstance(leaf, jax.Array)]
    devices = {device for array in arrays for device in array.devices()} or {jax.devices()[0]}
    if len(devices) > 1 or any(device.platform != "cpu" for device in devices):
        return model, serving

    def view(array: jax.Array, index: int) -> jax.Array:
        return jax.device_put(np.asarray(array)[index], may_alias=True)

    params = unrolled_params(model, serving.params, view)
    return unrolled(model), serving._replace(params=params)


def in_groups(model: LanguageModel, group_size: int) -> LanguageModel:
    """The model with `group_size` tokens per routing group; 0: one sequence."""

    def regrouped(part: Any) -> Any:
        return dataclasses.replace(part, group_size=group_size) if part.routes else part

    return model.map_parts(regrouped)


def empty_cache(model: LanguageModel, batch: int, num_slots: int, memory_length: int = 0) -> Any:
    """The empty caches of a model, by layer position, placed on the current mesh.

    Floats of the component "cache" have the compute dtype.
    """
    dims = model.dims._replace(memory_length=memory_length)
    return arrays_of(model.decoder.cache_specs(dims, batch, num_slots), model)


def arrays_of(specs: Any, model: LanguageModel) -> Any:
    """The empty caches that the specs declare; see `empty_cache`."""

    def narrowed(spec: Any) -> Any:
        is_float = jnp.issubdtype(spec.dtype, jnp.floating)
        kept = is_float and spec.component == "cache"
        return dataclasses.replace(spec, dtype=model.compute_dtype) if kept else spec

    specs = jax.tree.map(narrowed, specs)
    arrays = init_parameters(jax.random.key(0), specs)
    return jax.tree.map(lambda spec, array: constrain(array, *spec.axes), specs, arrays)
