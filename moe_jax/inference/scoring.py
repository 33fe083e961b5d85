"""Log-likelihoods of continuations of contexts (legend: `moe_jax.moe`)."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.inference.anew import in_groups_of
from moe_jax.inference.decoding import Serving, for_inference
from moe_jax.inference.generation import ROWS, check, check_ids, mesh_of
from moe_jax.inference.writer import bucket, encoder_inputs, whole_rows
from moe_jax.models.capacity import without_capacity
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.rules import constrain
from moe_jax.part import Call, EncoderInputs
from moe_jax.training.loss import target_nats

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation


class Scored(NamedTuple):
    """The score of a continuation.

    Attributes:
      log_likelihood: nats, the sum over its tokens.
      num_tokens: of the continuation.
      is_greedy: whether greedy decoding from the context produces it.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


def score_continuations(
    config: ExperimentConfig,
    params: Any,
    pairs: Sequence[Pair],
    *,
    state: Mapping[str, Any] | None = None,
    step: jax.Array | None = None,
    context: int | None = None,
    batch_size: int = ROWS,
    num_ids: int | None = None,
    start_token: int = 0,
) -> list[Scored]:
    """Scores continuations of contexts, dropless.

        yes, no = score_continuations(config, params, [([1, 17, 4], [9]), ([1, 17, 4], [8, 2])])

    Args:
      config: of the run, or of the imported model.
      params: parameters of the model; the mesh they are on, if any, is used.
      pairs: token ids of a context and of a continuation, at least one each. In an encoder-decoder
        the encoder reads the context, and the decoder writes the continuation.
      state: of the model's parts, such as selection biases; or None.
      step: training step for annealed settings of routers; None: their end values.
      context: maximum number of tokens read; a longer context is cut from the left. None: all are
        read, whatever the model was trained on. A model that looks at later tokens needs it, since
        it always reads a window of this length.
      batch_size: pairs at once; the score of a pair does not depend on it.
      num_ids: greedy decoding draws ids below it (a padded vocabulary); None: all. Likelihoods use
        the whole softmax, as in training.
      start_token: first token of the decoder of an encoder-decoder.

    Returns:
      One `Scored` per pair, in order. If the model looks at later tokens, it may have seen the
      tokens that it scores: `training.loss_labels.loss_labels` returns the mark for that.

    Raises:
      ValueError: a context or continuation is empty or contains an id that the model does not know;
        a continuation has more tokens than `context`; or the model mixes tokens in groups whose
        size does not divide `context`.
    """
    check_pairs(config.model, pairs, context, batch_size)
    if without_capacity(config.model).looks_ahead(training=False):
        assert context is not None
        model, window = in_groups_of(context, config.model), context
    else:
        model, window = for_inference(config.model), 0
    read: list[list[int]] = []  # tokens that the encoder reads
    if model.has_encoder:
        read = [list(before)[-(context or len(before)) :] for before, _ in pairs]
        pairs = [([start_token], continuation) for _, continuation in pairs]
    texts = [cut(pair, context) for pair in pairs]
    lengths = padded_lengths(texts, read, window)
    order = sorted(range(len(texts)), key=lambda i: lengths[i])
    serving, ids = Serving(params, state, step), np.int32(num_ids or model.vocab_size)
    scores: dict[int, Scored] = {}
    with mesh_of(params):
        rows = whole_rows(min(batch_size, max(len(texts), 1)))
        for some in runs_of(order, lengths, rows):
            batch = arrays_of([texts[i] for i in some], rows, lengths[some[0]][0])
            encoder = encoder_inputs([read[i] for i in some], rows) if read else None
            sums_B, greedy_B = map(
                np.asarray,
                score_batch(
                    serving,
                    ids,
                    *batch,
                    encoder,
                    model=model,
                    sees_prompt=config.data.objective.sees_prompt,
                ),
            )
            for row, i in enumerate(some):
                scores[i] = Scored(float(sums_B[row]), texts[i][1], bool(greedy_B[row]))
    return [scores[i] for i in range(len(texts))]


@functools.partial(jax.jit, static_argnames=("model", "sees_prompt"))
def score_batch(
    serving: Serving,
    num_ids: jax.Array,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    targets_BL: jax.Array,
    counts_BL: jax.Array,
    encoder: EncoderInputs | None = None,
    *,
    model: LanguageModel,
    sees_prompt: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihoods of the targets that count, float32 [B], and whether all are greedy, bool [B].

    Args:
      serving: parameters and state.
      num_ids: int32 scalar; greedy decoding draws ids below it.
      tokens_BL: int32, padded on the right.
      segments_BL: int32, 1 for tokens, 0 for padding.
      targets_BL: int32, the next token of each.
      counts_BL: bool, whether the target belongs to the continuation.
      encoder: inputs of the encoder; None without one.
      model: the model.
      sees_prompt: whether contexts are read bidirectionally.
    """
    earlier_BL = jnp.cumsum(counts_BL, axis=1) - counts_BL  # number of targets that count
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    call = Call(
        tokens_BL=tokens_BL, positions_BL=positions_BL, segments_BL=segments_BL, contiguous=True,
        step=serving.step, capacity=0.0, encoder=encoder,
        in_prefix_BL=earlier_BL == 0 if sees_prompt else None,
    )  # fmt: skip
    logits_BLV = model.run(serving.params, call, state=serving.state).logits_BLV
    sums_B = -jnp.sum(target_nats(logits_BLV, targets_BL) * counts_BL, axis=1)
    is_token_V = jnp.arange(logits_BLV.shape[-1]) < num_ids
    likeliest_BL = jnp.argmax(jnp.where(is_token_V, logits_BLV, -jnp.inf), axis=-1)
    greedy_B = jnp.all((likeliest_BL == targets_BL) | ~counts_BL, axis=1)
    return constrain(sums_B, None), constrain(greedy_B, None)  # every process reads all


def check_pairs(
    model: LanguageModel, pairs: Sequence[Pair], context: int | None, batch_size: int
) -> None:
    """Raises `ValueError` for pairs that cannot be scored."""
    require(
        context is not None or not without_capacity(model).looks_ahead(training=False),
        "a model that looks at later tokens needs windows of one size",
        "context=None",
        "Pass the sequence_length of its training",
    )
    parts: Mapping[str, Any] = model.part
    for name, part in parts.items():
        size = part.group_size if part.routes and part.router.mixes else 0
        require(
            not size or (context or 0) % size == 0,
            "a router that mixes tokens needs a context of whole groups, or texts would mix",
            f"context={context}, {name}.group_size={size}",
            "Pass a multiple of it",
        )
    check(model, [], 0, 1, context, batch_size)
    for i, (before, continuation) in enumerate(pairs):
        check_ids(model, before, "context", f"the context of pair {i}")
        name = f"the continuation of pair {i}"
        check_ids(model, continuation, "continuation", name, "Leave the pair out")
        require(
            context is None or len(continuation) <= context,
            "a continuation must have at most `context` tokens",
            f"pair {i} has {len(continuation)}, context={context}",
            "Shorten it, or raise context",
        )


def padded_lengths(
    texts: Sequence[tuple[list[int], int]], read: Sequence[list[int]], window: int
) -> list[tuple[int, int]]:
    """The padded length of each text, and of its encoder input; 0 without an encoder.

    Both depend only on the pair itself, so that its score does not depend on other pairs.
    """
    return [
        (window or bucket(len(text) - 1), bucket(len(read[i])) if read else 0)
        for i, (text, _) in enumerate(texts)
    ]


def cut(pair: Pair, context: int | None) -> tuple[list[int], int]:
    """The last `context` + 1 tokens of a text (None: all), and the number of scored ones."""
    text = [*pair[0], *pair[1]]
    return text[-(context + 1) :] if context else text, len(pair[1])


def runs_of(order: Sequence[int], lengths: Sequence[Any], most: int) -> Iterator[list[int]]:
    """Cuts an order into runs of equal lengths, with at most `most` items per run."""
    run: list[int] = []
    for i in order:
        if run and (len(run) == most or lengths[run[0]] != lengths[i]):
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def arrays_of(texts: Sequence[tuple[list[int], int]], rows: int, length: int) -> tuple[Any, ...]:
    """Tokens, segments, targets and which of them count, [B, L], padded on the right."""
    tokens_BL, segments_BL, targets_BL = np.zeros((3, rows, length), np.int32)
    counts_BL = np.zeros((rows, length), np.bool_)
    for row, (text, scored) in enumerate(texts):
        end = len(text) - 1
        tokens_BL[row, :end], targets_BL[row, :end] = text[:-1], text[1:]
        segments_BL[row, :end] = 1
        counts_BL[row, end - scored : end] = True
    return tokens_BL, segments_BL, targets_BL, counts_BL


def encode_pair(
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    *,
    bos: bool = True,
    has_encoder: bool = False,
) -> Pair:
    """Encodes a text as a whole, and splits it at the end of its context.

    Spaces at the end of the context move to the continuation, since most tokenizers join them to
    the next word. An encoder-decoder gets two texts, and the first ends with `eos_id`.

    Args:
      tokenizer: of the model.
      context: the text before the continuation; may be "" with `bos`.
      continuation: the text to score.
      bos: whether the text begins with `bos_id`, as a document does.
      has_encoder: whether the model is an encoder-decoder.

    Source: lm-evaluation-harness, lm_eval/api/model.py, `TemplateLM._encode_pair`.
    """
    kept = context.rstrip()
    if has_encoder:
        rest = context[len(kept) :] + continuation
        return [*tokenizer.encode(kept).tolist(), tokenizer.eos_id], tokenizer.encode(rest).tolist()
    begin = [tokenizer.bos_id] if bos else []
    whole = begin + tokenizer.encode(context + continuation).tolist()
    length = len(begin) + len(tokenizer.encode(kept))
    return whole[:length], whole[length:]
