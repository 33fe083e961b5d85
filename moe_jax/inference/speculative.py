"""Speculative decoding: a draft proposes tokens, and one pass of the model accepts some of them.

A draft does not change the distribution of a text: better proposals only save passes. Each row
accepts its own number of tokens, and its result does not depend on the other rows. Later tokens
overwrite rejected ones in the caches.

Legend: `moe_jax.moe`; Y counts proposed tokens, L = Y + 1 the places of a pass.

Source: Leviathan et al. 2023, arXiv:2211.17192, alg. 1; Chen et al. 2023, arXiv:2302.01318.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.inference.decoding import (
    Prompts,
    Routes,
    Serving,
    below,
    keys_of,
    read,
    routes_of,
    seen_in,
    with_token,
)
from moe_jax.inference.drafting import (
    Drafter,
    Texts,
    cache_can_rewind,
    read_accepted,
)
from moe_jax.inference.sampling import Sampling, draw, probabilities
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.rules import constrain

PROPOSED, ACCEPTED = 1, 2  # folded into the random key of a place


def rule(
    target_BLV: jax.Array, draft_BYV: jax.Array, proposed_BY: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Acceptance probabilities of proposed tokens, and distributions of replacement tokens.

    A token x is accepted with probability min(1, p(x) / q(x)), where p is the distribution of the
    model and q that of the draft. The first rejected token is replaced by one drawn from
    max(0, p - q), normalised. If all are accepted, one more token is drawn from p.

    Args:
      target_BLV: p, float32.
      draft_BYV: q, float32.
      proposed_BY: int32, drawn from q.

    Returns:
      float32 [B, Y], and distributions [B, L, V].

    Source: Leviathan et al. 2023, arXiv:2211.17192, sec. 2.3.
    """
    p_BYV = target_BLV[:, :-1]
    p_BY, q_BY = (
        jnp.take_along_axis(a, proposed_BY[..., None], axis=-1)[..., 0] for a in (p_BYV, draft_BYV)
    )
    rest_BYV = jnp.maximum(p_BYV - draft_BYV, 0)
    total_BY1 = jnp.sum(rest_BYV, axis=-1, keepdims=True)
    # If the rest is 0, p equals q except for rounding, and every token is accepted.
    rest_BYV = jnp.where(total_BY1 > 0, rest_BYV / total_BY1, p_BYV)
    instead_BLV = jnp.concatenate([rest_BYV, target_BLV[:, -1:]], axis=1)
    return jnp.minimum(p_BY / q_BY, 1), instead_BLV


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Settings that stay the same throughout a generation.

    Attributes:
      model: the model.
      drafter: proposes tokens.
      length: Y, number of proposed tokens.
      sampling: how the model and the drafter draw tokens.
      num_ids: ids from here on have logits but are not tokens; None: all are tokens.
      record: whether to return the experts of tokens.
    """

    model: LanguageModel
    drafter: Drafter
    length: int
    sampling: Sampling
    num_ids: int | None = None
    record: bool = False


@functools.partial(jax.jit, static_argnames=("how", "num_slots"))
def begin(
    serving: Serving,
    draft: Serving,
    prompts: Prompts,
    left_B: jax.Array,
    stop_S: jax.Array,
    *,
    how: Speculation,
    num_slots: int,
) -> tuple[Texts, Routes]:
    """Reads the prompts and draws a token after each, `Texts.next_B`.

    Args:
      serving: parameters and state of the model.
      draft: parameters and state of the draft; with the model's own modules, those of the model.
      prompts: the prompts.
      left_B: int32, number of tokens wanted.
      stop_S: int32, tokens that end a text.
      how: the settings.
      num_slots: T, of the caches: for the prompts, the new tokens, and L more.

    Returns:
      The texts, and the experts of the prompts.
    """
    model, sampling = how.model, how.sampling
    call, output = read(
        serving, prompts, model=model, num_slots=num_slots, record=how.record, last_alone=True
    )
    assert call.positions_BL is not None
    positions_B = call.positions_BL[:, -1] + 1
    seen_BV = seen_in(prompts, model.vocab_size, sampling)
    before_B = jnp.asarray(prompts.before_B, jnp.int32)
    keys_B = keys_of(prompts.sample_B, before_B + positions_B, sampling)
    first_B = draw(below(output.logits_BLV[:, -1], how.num_ids), seen_BV, keys_B, sampling)
    first_B = constrain(first_B, None)  # every process reads all
    is_text_B = jnp.asarray(prompts.segments_BL)[:, -1] > 0
    texts = Texts(
        cache=output.cache,
        draft=how.drafter.begin(draft, prompts, call, output, first_B, num_slots, how.length),
        slots_B=jnp.full(first_B.shape, prompts.tokens_BL.shape[1], jnp.int32),
        next_B=first_B,
        previous_B=jnp.asarray(prompts.tokens_BL)[:, -1],
        positions_B=positions_B,
        left_B=left_B - 1,
        live_B=is_text_B & (left_B > 1) & ~jnp.any(first_B[:, None] == stop_S, axis=-1),
        seen_BV=with_token(seen_BV, first_B),
        sample_B=jnp.asarray(prompts.sample_B),
        before_B=before_B,
        lengths_B=jnp.asarray(prompts.lengths_B),
    )
    return texts, routes_of(model, output)


@functools.partial(
    jax.jit, static_argnames=("how", "num_slots", "num_passes"), donate_argnames=("texts",)
)
def speculate(
    serving: Serving,
    draft: Serving,
    texts: Texts,
    stop_S: jax.Array,
    *,
    how: Speculation,
    num_slots: int,
    num_passes: int,
) -> tuple[Texts, jax.Array, jax.Array, jax.Array, Routes]:
    """Adds 1 to L tokens per pass to every live text.

    Args:
      serving: see `begin`.
      draft: see there.
      texts: from `begin` or an earlier call; their arrays are donated.
      stop_S: see there.
      how: see there.
      num_slots: see there.
      num_passes: number of model passes.

    Returns:
      The texts; the tokens, int32 [B, num_passes, L]; the number that each pass drew for each text,
      int32 [B, num_passes], 0 once it has ended; how many of these are kept, without the stop token
      and the tokens after it or beyond `left_B`; and the experts of the tokens that the passes
      read, by part, [X, B, num_passes, L, K]. A pass does not read the last token that it draws:
      the next pass has its experts.
    """

    def one(texts: Texts, _: None) -> tuple[Texts, tuple[jax.Array, jax.Array, jax.Array, Routes]]:
        return one_pass(serving, draft, texts, stop_S, how, num_slots)

    texts, (tokens, counts, kept, routes) = jax.lax.scan(one, texts, None, length=num_passes)
    routes = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), routes)
    tokens = constrain(jnp.moveaxis(tokens, 0, 1), None, None, None)
    return texts, tokens, constrain(counts.T, None, None), constrain(kept.T, None, None), routes


def one_pass(
    serving: Serving,
    draft: Serving,
    texts: Texts,
    stop_S: jax.Array,
    how: Speculation,
    num_slots: int,
) -> tuple[Texts, tuple[jax.Array, jax.Array, jax.Array, Routes]]:
    """One pass of `speculate`."""
    model, length = how.model, how.length

    def propose(
        logits_BV: jax.Array, seen_BV: jax.Array | None, ahead: int | jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        probs_BV = probabilities(below(logits_BV, how.num_ids), seen_BV, how.sampling)
        token_B = drawn_of(probs_BV, keys_at(texts, ahead, how, PROPOSED))
        return token_B, probs_BV, with_token(seen_BV, token_B)

    proposed_BY, draft_BYV, kept = how.drafter.propose(draft, texts, propose, num_slots, length)
    tokens_BL = jnp.concatenate([texts.next_B[:, None], proposed_BY], axis=1)
    call = texts.call(tokens_BL, num_slots, step=serving.step)
    call = dataclasses.replace(call, record=how.record)
    output = model.run(serving.params, call, state=serving.state, cache=texts.cache)
    target_BLV = targets(output.logits_BLV, texts.seen_BV, proposed_BY, how)
    accepted_B, last_B = accept(texts, target_BLV, draft_BYV, proposed_BY, how)

    places = jnp.arange(length + 1)
    padded_BL = jnp.pad(proposed_BY, ((0, 0), (0, 1)))
    added_BL = jnp.where(places < accepted_B[:, None], padded_BL, last_B[:, None])
    is_added_BL = (places <= accepted_B[:, None]) & texts.live_B[:, None]
    is_stop_BL = (added_BL[..., None] == stop_S).any(axis=-1) & is_added_BL
    is_kept_BL = is_added_BL & (jnp.cumsum(is_stop_BL, axis=1) == 0)
    is_kept_BL &= places < texts.left_B[:, None]
    count_B, kept_B = (
        jnp.sum(which_BL, axis=1, dtype=jnp.int32) for which_BL in (is_added_BL, is_kept_BL)
    )
    cache, seen_BV = output.cache, texts.seen_BV
    if not cache_can_rewind(model):
        cache = read_accepted(model, serving, texts.cache, texts, tokens_BL, accepted_B, num_slots)
    for i in range(length + 1):
        seen_BV = with_token(seen_BV, jnp.where(is_added_BL[:, i], added_BL[:, i], texts.next_B))
    texts = texts._replace(
        cache=cache,
        draft=how.drafter.settle(
            draft, kept, texts, tokens_BL, added_BL, accepted_B, output, num_slots
        ),
        slots_B=texts.slots_B + count_B,
        next_B=last_B,
        previous_B=of_each_row(tokens_BL, accepted_B),
        positions_B=texts.positions_B + count_B,
        left_B=texts.left_B - count_B,
        live_B=texts.live_B & ~is_stop_BL.any(axis=1) & (texts.left_B > count_B),
        seen_BV=seen_BV,
    )
    return texts, (added_BL, count_B, kept_B, routes_of(model, output))


def targets(
    logits_BLV: jax.Array, seen_BV: jax.Array | None, proposed_BY: jax.Array, how: Speculation
) -> jax.Array:
    """The model's distributions in a pass, [B, L, V], each given the proposed tokens before it."""
    logits_BLV, found = below(logits_BLV, how.num_ids), []
    for i in range(how.length + 1):
        found.append(probabilities(logits_BLV[:, i], seen_BV, how.sampling))
        if i < how.length:
            seen_BV = with_token(seen_BV, proposed_BY[:, i])
    return jnp.stack(found, axis=1)


def accept(
    texts: Texts,
    target_BLV: jax.Array,
    draft_BYV: jax.Array,
    proposed_BY: jax.Array,
    how: Speculation,
) -> tuple[jax.Array, jax.Array]:
    """The number of accepted tokens, [B], and the token after them, [B]; see `rule`."""
    accept_BY, instead_BLV = rule(target_BLV, draft_BYV, proposed_BY)
    chances = [
        jax.vmap(jax.random.uniform)(keys_at(texts, i + 1, how, ACCEPTED))
        for i in range(how.length)
    ]
    is_good_BY = jnp.stack(chances, axis=1) < accept_BY
    accepted_B = jnp.sum(jnp.cumprod(is_good_BY, axis=1, dtype=jnp.int32), axis=1)
    keys_B = keys_at(texts, accepted_B + 1, how)
    return accepted_B, drawn_of(of_each_row(instead_BLV, accepted_B), keys_B)


def keys_at(texts: Texts, ahead: int | jax.Array, how: Speculation, purpose: int = 0) -> jax.Array:
    """The random keys [B] of the tokens `ahead` places after `next_B`.

    If a token is rejected, later places are drawn again. Their discarded draws affected nothing
    that stays, so the same keys are used again.
    """
    places_B = texts.before_B + texts.positions_B + ahead
    keys_B = keys_of(texts.sample_B, places_B, how.sampling)
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys_B) if purpose else keys_B


def of_each_row(values: jax.Array, index_B: jax.Array) -> jax.Array:
    """Selects entry `index_B` of each row of [B, L, ...]: [B, ...]."""
    return jax.vmap(lambda row, i: row[i])(values, index_B)


def drawn_of(probs_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws a token per row, int32 [B]."""
    return jax.vmap(jax.random.categorical)(keys_B, jnp.log(probs_BV)).astype(jnp.int32)
