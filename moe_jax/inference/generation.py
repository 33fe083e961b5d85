"""Continues lists of token ids: batches, samples, contexts and streams over prefill and decode."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.inference.decoding import Serving, for_inference, layers_apart, why_anew
from moe_jax.inference.draft import Draft
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.writer import Piece, Writer
from moe_jax.models.model import LanguageModel
from moe_jax.models.token_routes import ABSENT
from moe_jax.parallel.rules import without_mesh

ROWS = 32  # texts at once, unless said otherwise


def generate_tokens(
    config: ExperimentConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    **settings: Any,
) -> list[list[int]]:
    """Continues prompts.

        answers = generate_tokens(config, params, [[1, 17, 4], [1, 9]], num_tokens=32)

    Args:
      config: of the run, or of the imported model.
      params: parameters of the model; the mesh they are on, if any, is used.
      prompts: lists of token ids, at least one each. The encoder of an encoder-decoder reads them.
      num_tokens: maximum number of tokens to add.
      **settings: arguments of `stream_tokens`: `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`, `seed`, `num_samples`, `stop_tokens`, `context`, `batch_size`,
        `draft`, ...

    Returns:
      The tokens added to prompt i, sample s, at i * num_samples + s, without the stop token; [] for
      a row in `ended`.

    Raises:
      ValueError: see `stream_tokens`.
    """
    answers: dict[int, list[int]] = {}
    for piece in stream_tokens(config, params, prompts, num_tokens, **settings):
        answers.setdefault(piece.row, []).extend(piece.tokens)
    return [answers.get(row, []) for row in range(len(prompts) * settings.get("num_samples", 1))]


def generate_with_routes(
    config: ExperimentConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    **settings: Any,
) -> tuple[list[list[int]], list[np.ndarray]]:
    """`generate_tokens`, and the experts of every token.

        answers, routes = generate_with_routes(config, params, prompts, num_tokens=32)
        texts = [prompt + answer for prompt, answer in zip(prompts, answers)]
        record = record_of_routes(config.model, texts, routes)

    Returns:
      The answers, and for each the experts of its prompt and its own tokens, int32 [length, layers,
      K]; -1 where a token chose fewer experts, and for a last token that was not read.
      `models.token_routes` reads this format.

    Raises:
      ValueError: see `stream_tokens`; also if `ended` is given.
    """
    require(
        not settings.get("ended"),
        "every text needs recorded experts",
        f"ended={settings.get('ended')}",
        "Leave those prompts out",
    )
    answers: dict[int, list[int]] = {}
    routes: dict[int, list[np.ndarray]] = {}
    settings |= {"record": True}
    for piece in stream_tokens(config, params, prompts, num_tokens, **settings):
        assert piece.routes is not None
        answers.setdefault(piece.row, []).extend(piece.tokens)
        routes.setdefault(piece.row, []).append(piece.routes)
    samples = settings.get("num_samples", 1)
    whole = {
        row: joined_routes(routes[row], len(prompts[row // samples]) + len(answers[row]))
        for row in answers
    }
    return [answers[row] for row in sorted(answers)], [whole[row] for row in sorted(whole)]


def joined_routes(pieces: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The experts of `length` tokens, from the pieces of a text; -1 for tokens not read."""
    routes = np.concatenate(pieces)
    missing = [(0, length - len(routes)), (0, 0), (0, 0)]
    return np.pad(routes, missing, constant_values=ABSENT)


def stream_tokens(
    config: ExperimentConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    num_samples: int = 1,
    stop_tokens: Sequence[int] = (),
    state: Mapping[str, Any] | None = None,
    step: jax.Array | None = None,
    context: int | None = None,
    batch_size: int = ROWS,
    num_ids: int | None = None,
    start_token: int = 0,
    capacity: float = 0.0,
    ended: Container[int] = (),
    draft: Draft | None = None,
    record: bool = False,
    **sampling: Any,
) -> Iterator[Piece]:
    """Continues prompts, and yields new tokens as they are generated.

    Args:
      config: see `generate_tokens`.
      params: see there.
      prompts: see there.
      num_tokens: see there.
      num_samples: texts per prompt, each with its own random keys.
      stop_tokens: each of them ends a text.
      state: of the model's parts, such as selection biases; or None.
      step: training step for annealed settings of routers; None: their end values.
      context: maximum number of tokens seen. A longer prompt is cut to its last `context` tokens. A
        text that reaches the limit continues from its last `context // 2` tokens, once the others
        of its batch are full too. None: all tokens are seen, whatever the model was trained on.
      batch_size: texts at once; without a capacity, the result of a text does not depend on it.
      num_ids: ids from here on have logits but are not tokens (a padded vocabulary); None: all are
        tokens.
      start_token: first token of the decoder of an encoder-decoder.
      capacity: capacity factor of MoE layers; 0: dropless. New tokens share it with those of the
        whole batch. In a prompt it holds row by row, padding included. A text that has ended by
        `num_tokens` or `ended` takes slots until its batch ends.
      ended: rows that are not continued. The reader of the stream may pass a set and add rows to
        it, for example on a stop string: such a text gets no more tokens, and frees its batch.
      draft: proposes tokens, and counts how many are accepted; None: no speculation. A draft does
        not change the distribution of a text, nor the text at a temperature of 0.
      record: whether pieces contain the experts of their tokens.
      **sampling: fields of `Sampling`.

    Yields:
      A `Piece` per text and chunk of tokens. A text stops with the piece that has `ended` set, or
      with `num_tokens` tokens.

    Raises:
      ValueError: a prompt is empty or contains an id that the model does not know, a number is out
        of range, or the model cannot continue from a cache (`decoding.why_anew`); the draft does
        not fit the model; or `record` is set for a model without experts, for an encoder-decoder,
        beyond the context, or with `num_tokens` of 0.
    """
    how, model = Sampling(**sampling), for_inference(config.model)
    check(model, prompts, num_tokens, num_samples, context, batch_size, capacity)
    require(
        not (why := why_anew(model)),
        "a model that looks at later tokens, or keeps nothing of earlier ones, has no cache",
        why,
        "Train expert choice with a predictor, give a part of yours a cache, or use stream_anew",
    )
    if record:
        check_record(model, prompts, num_tokens, context)
    if draft is not None:
        require(
            not capacity,
            "with a draft experts must be dropless, since several tokens of a text are read "
            "together",
            f"capacity={capacity}",
            "Leave out one of them",
        )
        draft.drafter(model, num_ids)  # refuses before anything runs
    repeated = [list(prompt) for prompt in prompts for _ in range(num_samples)]
    rows = [(row, prompt) for row, prompt in enumerate(repeated) if row not in ended]
    model, serving = layers_apart(model, Serving(params, state, step))
    writer = Writer(
        serving, model, how, context, capacity, num_ids, tuple(stop_tokens), start_token, ended,
        draft, record, config.data.objective.sees_prompt,
    )  # fmt: skip
    for start in range(0, len(rows), batch_size):
        pieces = writer.write(rows[start : start + batch_size], num_tokens)
        while True:
            with mesh_of(params):  # not around `yield`: the reader's mesh is its own
                piece = next(pieces, None)
            if piece is None:
                break
            yield piece


def check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    num_samples: int,
    context: int | None,
    batch_size: int = ROWS,
    capacity: float = 0.0,
) -> None:
    """Raises `ValueError` for prompts or numbers that cannot be used."""
    for name, value, least in (
        ("num_tokens", num_tokens, 0),
        ("num_samples", num_samples, 1),
        ("context", 2 if context is None else context, 2),
        ("batch_size", batch_size, 1),
        ("capacity", capacity, 0),
    ):
        require(value >= least, f"{name} must be at least {least}", f"{name}={value}", "Raise it")
    for i, prompt in enumerate(prompts):
        require(
            np.ndim(prompt) == 1,
            "prompts must be lists of token ids",
            f"prompt {i} is {prompt!r}",
            "Pass a list of prompts, [prompt] for one, and a text to stream_text",
        )
        check_ids(model, prompt, "prompt", f"prompt {i}")


def check_ids(
    model: LanguageModel,
    ids: Sequence[int],
    kind: str,
    name: str,
    fix: str = "Begin it with the bos_id of the tokenizer",
) -> None:
    """Raises `ValueError` for no ids, with the advice `fix`, or for ids outside the vocabulary."""
    require(len(ids) > 0, f"a {kind} must have at least one token", f"{name} has none", fix)
    least, most = min(ids), max(ids)
    require(
        0 <= least and most < model.vocab_size,
        f"token ids must lie in 0..{model.vocab_size - 1}, the model's vocabulary",
        f"{name} has {least if least < 0 else most}",
        "Encode it with the tokenizer that the model was trained with",
    )


def check_record(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    context: int | None,
) -> None:
    """Raises `ValueError` for texts whose experts cannot be recorded."""
    require(
        bool(model.moe_parts) and not model.has_encoder,
        "experts can be recorded only of a decoder with MoE layers",
        "the model has an encoder" if model.has_encoder else f"parts {sorted(model.part)}",
        "Leave the record out",
    )
    require(
        num_tokens > 0,
        "experts can be recorded only while tokens are added",
        f"num_tokens={num_tokens}",
        "Use record_routing on the prompts",
    )
    longest = max(map(len, prompts), default=0)
    require(
        context is None or longest + num_tokens <= context + 1,
        "experts can be recorded only of texts that fit into the context",
        f"a prompt of {longest} tokens, num_tokens={num_tokens}, context={context}",
        "Raise context, or lower num_tokens",
    )


def mesh_of(params: Any) -> Any:
    """The context of the mesh that parameters are placed on; for one device, of no mesh."""
    mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    return without_mesh() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh)
