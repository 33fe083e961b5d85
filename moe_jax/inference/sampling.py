"""Sampling a continuation token by token (legend: `moe_jax.moe`)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.data import open_tokenizer_of
from moe_jax.models.model import LanguageModel
from moe_jax.part import Call


@functools.partial(jax.jit, static_argnames=("model", "num_ids"))
def next_token(
    params: Any,
    state: Mapping[str, Any] | None,
    window_L: jax.Array,
    length: jax.Array,
    temperature: jax.Array,
    seed: jax.Array,
    index: jax.Array,
    step: jax.Array | None = None,
    *,
    model: LanguageModel,
    num_ids: int | None = None,
) -> jax.Array:
    """Samples the token after `window_L[:length]`; int32 scalar, below `num_ids` if given.

    A vocabulary may be padded, so that it divides over devices: ids from `num_ids` on, the
    tokenizer's vocab_size, have logits but are no tokens.

    What stands behind `length` is padding, which no layer sees; routing is dropless where tokens
    choose. Groups are of the whole window: where experts choose tokens without a predictor, and in
    Soft MoE, a token's output depends on what follows it in the window, and so on how much of the
    text is there; random and uniform experts are those of the place in the window.
    """
    positions = jnp.arange(window_L.shape[0])
    call = Call(
        tokens_BL=window_L[None],
        positions_BL=positions[None],
        segments_BL=(positions < length).astype(jnp.int32)[None],
        counts_up=True,
        step=step,
        capacity=0.0,
    )
    output = model.run(params, call, state=state)
    logits_V = output.logits_BLV[0, length - 1]
    if num_ids is not None:
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < num_ids, logits_V, -jnp.inf)
    rng = jax.random.fold_in(jax.random.key(seed), index)
    greedy = jnp.argmax(logits_V)
    sampled = jax.random.categorical(rng, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)


def continue_text(
    params: Any,
    state: Mapping[str, Any] | None,
    config: ExperimentConfig,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    step: jax.Array | None = None,
) -> str:
    """Continues a prompt.

    Args:
      params: parameters of the model.
      state: of its parts, such as selection biases; or None.
      config: of the run.
      prompt: any text; of a long one, the last `sequence_length` tokens are seen.
      num_tokens: how many tokens to add at most; the end of a document ends it.
      temperature: divides the logits; 0 takes the likeliest token.
      seed: equal seeds give equal texts.
      step: of training, for settings of the router that are annealed; None: at their ends.

    Returns:
      The continuation, without the prompt.

    Raises:
      ValueError: a negative temperature or number of tokens, a seed beyond 32 bits, or a model with
        an encoder.
    """
    if not 0 <= temperature < float("inf") or num_tokens < 0:
        raise ValueError(
            "temperature, which is finite, and num_tokens are not negative: "
            f"temperature={temperature}, num_tokens={num_tokens}. Use temperature=0 for the "
            "likeliest token."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed lies in 0..2**32 - 1: seed={seed}. Use another.")
    if config.model.has_encoder:
        raise ValueError(
            "a text is continued by a decoder without an encoder: the model has both. Set "
            "training.sample_prompt='' to train without a sample."
        )
    tokenizer = open_tokenizer_of(config.data)
    window = config.data.sequence_length
    model = in_groups_of(window, config.model)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    start = len(ids)
    for i in range(num_tokens):
        seen = ids[-window:]
        window_L = np.full(window, tokenizer.pad_id, np.int32)
        window_L[: len(seen)] = seen
        token = next_token(
            params,
            state,
            window_L,
            np.int32(len(seen)),
            np.float32(temperature),
            np.uint32(seed),
            np.int32(i),
            step,
            model=model,
            num_ids=tokenizer.vocab_size,
        )
        if int(token) == tokenizer.eos_id:
            break
        ids.append(int(token))
    return tokenizer.decode(ids[start:])


def in_groups_of(window: int, model: LanguageModel) -> LanguageModel:
    """The model with routing groups of so many tokens, where its routers allow it.

    One sequence is the group that always fits. Where tokens choose, a dropless layer computes the
    same in any; otherwise `next_token` says what the window decides. A router that mixes tokens
    (Soft MoE) has learned the slots of a group, and keeps the groups that it was trained with.
    """

    def regrouped(part: Any) -> Any:
        keeps = not part.routes or part.router.mixes
        return part if keeps else dataclasses.replace(part, group_size=window)

    return model.map_parts(regrouped)
