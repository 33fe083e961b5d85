"""Continues token ids without a cache: every token reads the whole window again.

Models that look at later tokens need this, since each new token changes their past. So do models
with a part that keeps nothing of earlier tokens. It is also the baseline for what a cache saves.
"""

import dataclasses
import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.inference.decoding import Serving, below, keys_of
from moe_jax.inference.generation import check, mesh_of
from moe_jax.inference.sampling import Sampling, draw
from moe_jax.inference.writer import Piece, whole_rows
from moe_jax.models.model import LanguageModel
from moe_jax.part import Call


@functools.partial(jax.jit, static_argnames=("model", "sampling", "num_ids"))
def next_token(
    serving: Serving,
    window_L: jax.Array,
    length: jax.Array,
    row: jax.Array,
    index: jax.Array,
    *,
    model: LanguageModel,
    sampling: Sampling,
    num_ids: int | None = None,
    num_prefix: jax.Array | None = None,
    seen_V: jax.Array | None = None,
) -> jax.Array:
    """Draws the token after `window_L[:length]`; int32 scalar, below `num_ids` if given.

    A repetition penalty applies to the tokens in `seen_V`, bool.

    Entries after `length` are padding, which no layer sees. Token-choice routing is dropless. The
    routing group is the whole window. In expert choice without a predictor and in Soft MoE, a
    token's output depends on the tokens after it, and so on how much of the text is in the window.
    """
    positions = jnp.arange(window_L.shape[0])
    is_seen_L = positions < length
    num_rows = whole_rows(1)  # every device with a row computes the same text

    def repeated(a_L: jax.Array) -> jax.Array:
        return jnp.broadcast_to(a_L, (num_rows, *a_L.shape))

    call = Call(
        tokens_BL=repeated(window_L), positions_BL=repeated(positions),
        segments_BL=repeated(is_seen_L.astype(jnp.int32)), contiguous=True,
        step=serving.step, capacity=0.0,
        in_prefix_BL=None if num_prefix is None else repeated(positions < num_prefix),
    )  # fmt: skip
    output = model.run(serving.params, call, state=serving.state)
    logits_BV = below(output.logits_BLV[:1, length - 1], num_ids)
    seen_BV = None if seen_V is None else seen_V[None]
    return draw(logits_BV, seen_BV, keys_of(row[None], index[None], sampling), sampling)[0]


def stream_anew(
    config: ExperimentConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    context: int,
    num_samples: int = 1,
    stop_tokens: Sequence[int] = (),
    state: Mapping[str, Any] | None = None,
    step: jax.Array | None = None,
    num_ids: int | None = None,
    pad_id: int = 0,
    ended: Container[int] = (),
    **sampling: Any,
) -> Iterator[Piece]:
    """`stream_tokens`, one text at a time; each step reads the last `context` tokens."""
    check(config.model, prompts, num_tokens, num_samples, context)
    serving, how = Serving(params, state, step), Sampling(**sampling)
    model = in_groups_of(context, config.model)
    for row in range(len(prompts) * num_samples):
        prompt = prompts[row // num_samples]
        ids = list(prompt)
        seen_V = np.zeros(model.vocab_size, bool)
        if not num_tokens and row not in ended:
            yield Piece(row, [], False)
        for _ in range(num_tokens):
            if row in ended:
                break
            window_L = np.full(context, pad_id, np.int32)
            window_L[: len(ids)] = ids[-context:]
            seen_V[ids] = True
            with mesh_of(params):
                drawn = next_token(
                    serving, window_L, np.int32(min(len(ids), context)), np.int32(row),
                    np.int32(len(ids)), model=model, sampling=how, num_ids=num_ids,
                    num_prefix=prefix_left(config, len(prompt), len(ids), context),
                    seen_V=seen_V,
                )  # fmt: skip
            token = int(drawn)
            stops = token in stop_tokens
            yield Piece(row, [] if stops else [token], stops)
            if stops:
                break
            ids.append(token)


def prefix_left(
    config: ExperimentConfig, prompt: int, length: int, context: int
) -> np.int32 | None:
    """The number of prompt tokens in the window; None if a prompt is read causally."""
    if not config.data.objective.sees_prompt:
        return None
    return np.int32(max(prompt - max(length - context, 0), 0))


def in_groups_of(window: int, model: LanguageModel) -> LanguageModel:
    """The model with routing groups of `window` tokens, where its routers allow it.

    A group of one sequence always fits. A dropless token-choice layer computes the same in any
    group; for the others see `next_token`. A router that mixes tokens (Soft MoE) has learned the
    slots of its group, so it keeps the group size of training.
    """

    def regrouped(part: Any) -> Any:
        keeps = not part.routes or part.router.mixes
        return part if keeps else dataclasses.replace(part, group_size=window)

    return model.map_parts(regrouped)
