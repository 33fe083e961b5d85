"""The drafters, which propose tokens to a model: a smaller model, or its own multi-token modules.

Legend: `moe_jax.moe`; Y counts proposed tokens, L = Y + 1 the places of a pass of the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.inference.decoding import Prompts, Serving, arrays_of, read
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import NAME, Modules, later_call, separated
from moe_jax.models.output import ModelOutput
from moe_jax.part import Call, Dims, Part

# Arguments: logits [B, V], the tokens seen, the distance ahead. Returns: a token [B], its
# distribution [B, V], the tokens seen including the new one.
Draw = Callable[
    [jax.Array, jax.Array | None, int | jax.Array],
    tuple[jax.Array, jax.Array, jax.Array | None],
]


class Texts(NamedTuple):
    """Texts that are being decoded; each has a next token, which is drawn but not yet read.

    Attributes:
      cache: of the model, by layer position.
      draft: the state of the `Drafter`.
      slots_B: int32, number of filled slots of a row, and so the slot of the next token.
      next_B: int32, the next token.
      previous_B: int32, the token before `next_B`.
      positions_B: int32, position of `next_B` in the text.
      left_B: int32, number of tokens still wanted after `next_B`.
      live_B: bool, False for padding and for texts that have ended.
      seen_BV: bool, tokens of the text so far; None without a repetition penalty.
      sample_B: see `decoding.Rows`.
      before_B: see `decoding.Rows`.
      lengths_B: see `decoding.Rows`.
    """

    cache: Any
    draft: Any
    slots_B: jax.Array
    next_B: jax.Array
    previous_B: jax.Array
    positions_B: jax.Array
    left_B: jax.Array
    live_B: jax.Array
    seen_BV: jax.Array | None
    sample_B: jax.Array
    before_B: jax.Array
    lengths_B: jax.Array

    def call(
        self,
        tokens_BL: jax.Array,
        num_slots: int,
        *,
        step: jax.Array | None,
        previous_B: jax.Array | None = None,
        ahead: int | jax.Array = 0,
        keep_BL: jax.Array | bool = True,
    ) -> Call:
        """A dropless call that continues from a cache.

        Args:
          tokens_BL: the tokens to read.
          num_slots: T, of the cache.
          step: of training.
          previous_B: the token before `tokens_BL`; None: `self.previous_B`.
          ahead: distance of the first token from `next_B`.
          keep_BL: bool, False for padding.
        """
        positions_BL = self.positions_B[:, None] + ahead + jnp.arange(tokens_BL.shape[1])
        is_token_BL = self.live_B[:, None] & (positions_BL >= 0) & keep_BL
        return Call(
            tokens_BL=tokens_BL,
            previous_B=self.previous_B if previous_B is None else previous_B,
            positions_BL=positions_BL,
            segments_BL=is_token_BL.astype(jnp.int32),
            contiguous=True,
            step=step,
            cache_index=self.slots_B + ahead,
            cache_length=num_slots,
            capacity=0.0,
            lengths_B=self.lengths_B,
        )


def cache_can_rewind(model: LanguageModel) -> bool:
    """Whether tokens can be overwritten in all caches of a model."""
    return parts_take_back(model.decoder.parts(), model.dims)


def parts_take_back(parts: Mapping[str, Part], dims: Dims) -> bool:
    """Whether tokens can be overwritten in the cache of every part that has one."""
    return all(part.cache_can_rewind for part in parts.values() if part.cache_specs(dims, 1, 1))


def read_accepted(
    model: LanguageModel,
    serving: Serving,
    cache: Any,
    texts: Texts,
    tokens_BL: jax.Array,
    accepted_B: jax.Array,
    num_slots: int,
) -> Any:
    """The cache from before a pass, extended by `next_B` and the accepted tokens only."""
    keep_BL = jnp.arange(tokens_BL.shape[1]) <= accepted_B[:, None]
    call = texts.call(tokens_BL, num_slots, step=serving.step, keep_BL=keep_BL)
    return model.run(serving.params, call, state=serving.state, cache=cache).cache


@dataclasses.dataclass(frozen=True)
class SmallerModel:
    """A smaller model that proposes tokens one by one; its state is its caches.

    Attributes:
      model: the smaller model, with the same vocabulary.
      vocab_size: V, of the model that it drafts for.
      sees_prompt: whether it reads prompts bidirectionally.
    """

    model: LanguageModel
    vocab_size: int
    sees_prompt: bool = False

    def places(self, length: int) -> int:
        """The minimum padded length of a batch of prompts."""
        return 1

    def begin(
        self,
        serving: Serving,
        prompts: Prompts,
        call: Call,
        output: ModelOutput,
        first_B: jax.Array,
        num_slots: int,
        length: int,
    ) -> Any:
        """The drafter's state after the prompts.

        Args:
          serving: parameters and state of the draft.
          prompts: the prompts.
          call: the model's call that read the prompts.
          output: of the model.
          first_B: the first new token of every row.
          num_slots: T, of the caches.
          length: Y.
        """
        # What is read again contains generated tokens.
        is_first_B = jnp.broadcast_to(prompts.before_B, prompts.lengths_B.shape) == 0
        marks = jnp.asarray(prompts.segments_BL) > 0 if self.sees_prompt else None
        marks = marks if marks is None else marks & is_first_B[:, None]
        prompts = prompts._replace(in_prefix_BL=marks)
        return read(serving, prompts, model=self.model, num_slots=num_slots)[1].cache

    def propose(
        self, serving: Serving, texts: Texts, draw: Draw, num_slots: int, length: int
    ) -> tuple[jax.Array, jax.Array, Any]:
        """The proposed tokens [B, Y], their distributions [B, Y, V], and the drafter's new state.

        Args:
          serving: parameters and state of the draft.
          texts: the texts so far.
          draw: draws a token.
          num_slots: T, of the caches.
          length: Y.
        """

        def one(carry: Any, ahead: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            cache, token_B, previous_B, seen_BV = carry
            call = texts.call(
                token_B[:, None], num_slots, step=serving.step, previous_B=previous_B, ahead=ahead
            )
            output = self.model.run(serving.params, call, state=serving.state, cache=cache)
            logits_BV = as_wide(output.logits_BLV[:, -1], self.vocab_size)
            new_B, probs_BV, seen_BV = draw(logits_BV, seen_BV, ahead + 1)
            return (output.cache, new_B, token_B, seen_BV), (new_B, probs_BV)

        carry = (texts.draft, texts.next_B, texts.previous_B, texts.seen_BV)
        # The last round only reads the last token: its own proposal is not used.
        (cache, *_), (tokens, probs) = jax.lax.scan(one, carry, jnp.arange(length + 1))
        return tokens[:-1].T, jnp.moveaxis(probs[:-1], 0, 1), cache

    def settle(
        self,
        serving: Serving,
        kept: Any,
        texts: Texts,
        tokens_BL: jax.Array,
        added_BL: jax.Array,
        accepted_B: jax.Array,
        output: ModelOutput,
        num_slots: int,
    ) -> Any:
        """The drafter's state after the model has accepted tokens.

        Args:
          serving: parameters and state of the draft.
          kept: the state that `propose` returned.
          texts: the texts before the proposal.
          tokens_BL: `next_B` and the proposed tokens.
          added_BL: the accepted tokens, then the token that the model drew.
          accepted_B: number of accepted tokens.
          output: of the model, on `tokens_BL`.
          num_slots: T, of the caches.
        """
        if cache_can_rewind(self.model):
            return kept
        return read_accepted(
            self.model, serving, texts.draft, texts, tokens_BL, accepted_B, num_slots
        )


class Window(NamedTuple):
    """The state of the multi-token modules; W counts the last places that the model has read.

    Attributes:
      caches: of each module that is used.
      hidden_BWM: the inputs of the model's head at these places.
      tokens_BW: int32, the tokens one place later; the last is `Texts.next_B`.
    """

    caches: tuple[Any, ...]
    hidden_BWM: jax.Array
    tokens_BW: jax.Array


@dataclasses.dataclass(frozen=True)
class OwnModules:
    """The model's own multi-token modules, in a chain.

    Module m = 1, 2, ... proposes the token m + 1 ahead of the last place that the model has read.
    The last module then repeats: its output replaces that of the module before it, one place later
    (DeepSeek-AI 2024, arXiv:2412.19437, sec. 5.4.3, has one module).

    Attributes:
      model: the model.
    """

    model: LanguageModel

    @property
    def modules(self) -> Modules:
        """The modules of the model."""
        assert self.model.modules is not None, "checked"
        return self.model.modules

    def places(self, length: int) -> int:
        """See `SmallerModel`: W.

        The modules read the last W places again, since new tokens change the last module's output.
        """
        return length + min(self.modules.depth, length)

    def used(self, serving: Serving, length: int) -> list[Any]:
        """Parameters and state of each module that is used."""
        state = separated(serving.state)
        return self.modules.each(serving.params[NAME], state)[: min(self.modules.depth, length)]

    def run(
        self, own: Any, serving: Serving, hidden_BLM: jax.Array, call: Call, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Runs one module: its output for the head, [B, L, M], and its new cache."""
        embed = functools.partial(self.model.embed, serving.params)
        output = self.modules.run(own, hidden_BLM, call, embed, cache)
        return output.x_BLM, output.cache

    def begin(
        self,
        serving: Serving,
        prompts: Prompts,
        call: Call,
        output: ModelOutput,
        first_B: jax.Array,
        num_slots: int,
        length: int,
    ) -> Window:
        """See `SmallerModel`."""
        batch, hidden_BLM, caches = len(first_B), output.hidden_BLM, []
        assert hidden_BLM is not None
        recent, last = hidden_BLM[:, -self.places(length) :], prompts.tokens_BL
        for k, own in enumerate(self.used(serving, length), 1):
            specs = self.modules.module.cache_specs(self.model.dims, batch, num_slots)
            cache = arrays_of(specs, self.model)
            hidden_BLM, cache = self.run(own, serving, hidden_BLM, later_call(call, k), cache)
            caches.append(cache)
        tokens = jnp.concatenate([last, first_B[:, None]], axis=1)[:, -self.places(length) :]
        return Window(tuple(caches), recent, tokens)

    def propose(
        self, serving: Serving, texts: Texts, draw: Draw, num_slots: int, length: int
    ) -> tuple[jax.Array, jax.Array, Window]:
        """See `SmallerModel`."""
        window, width, seen_BV = texts.draft, self.places(length), texts.seen_BV
        hidden, tokens, caches = window.hidden_BWM, window.tokens_BW, []
        drawn: list[tuple[jax.Array, jax.Array]] = []
        used = self.used(serving, length)
        at = functools.partial(
            texts.call, num_slots=num_slots, step=serving.step, previous_B=0 * texts.next_B
        )
        for k, (own, cache) in enumerate(zip(used, window.caches, strict=True), 1):
            # A module uses the position of its token, k places later.
            call = moved(at(tokens, ahead=-width), k)
            hidden, cache = self.run(own, serving, hidden, call, cache)
            caches.append(cache)
            token_B, probs_BV, seen_BV = draw(self.head(serving, hidden), seen_BV, k)
            drawn.append((token_B, probs_BV))
            tokens = jnp.concatenate([tokens[:, 1:], token_B[:, None]], axis=1)

        def more(carry: Any, k: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            hidden, token_B, seen_BV, cache = carry
            call = moved(at(token_B[:, None], ahead=k - 1 - len(used)), len(used))
            hidden, cache = self.run(used[-1], serving, hidden, call, cache)
            new_B, probs_BV, seen_BV = draw(self.head(serving, hidden), seen_BV, k)
            return (hidden, new_B, seen_BV, cache), (new_B, probs_BV)

        proposed, probs = (jnp.stack(a, axis=1) for a in zip(*drawn, strict=True))
        if length > len(used):
            carry = (hidden[:, -1:], proposed[:, -1], seen_BV, caches[-1])
            ks = jnp.arange(len(used) + 1, length + 1)
            (*_, caches[-1]), rest = jax.lax.scan(more, carry, ks)
            proposed = jnp.concatenate([proposed, rest[0].T], axis=1)
            probs = jnp.concatenate([probs, jnp.moveaxis(rest[1], 0, 1)], axis=1)
        return proposed, probs, window._replace(caches=tuple(caches))

    def head(self, serving: Serving, hidden_BLM: jax.Array) -> jax.Array:
        """The logits of the last place, [B, V]."""
        return self.model.logits(serving.params, hidden_BLM[:, -1:])[:, 0]

    def settle(
        self,
        serving: Serving,
        kept: Window,
        texts: Texts,
        tokens_BL: jax.Array,
        added_BL: jax.Array,
        accepted_B: jax.Array,
        output: ModelOutput,
        num_slots: int,
    ) -> Window:
        """See `SmallerModel`: moves the window; later cache entries will be overwritten."""

        def last(old: jax.Array, new: jax.Array) -> jax.Array:
            both = jnp.concatenate([old, new.astype(old.dtype)], axis=1)
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=old.shape[1])
            return jax.vmap(cut)(both, accepted_B + 1)

        assert output.hidden_BLM is not None
        return Window(
            kept.caches,
            last(kept.hidden_BWM, output.hidden_BLM),
            last(kept.tokens_BW, added_BL),
        )


Drafter = SmallerModel | OwnModules


def moved(call: Call, k: int) -> Call:
    """The call with positions shifted by k, in the same slots."""
    assert call.positions_BL is not None
    return dataclasses.replace(call, positions_BL=call.positions_BL + k)


def as_wide(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """Logits cut or padded with -inf to another padded vocabulary size."""
    more = vocab_size - logits_BV.shape[-1]
    if more <= 0:
        return logits_BV[:, :vocab_size]
    return jnp.pad(logits_BV, ((0, 0), (0, more)), constant_values=-jnp.inf)
