"""Continuing lists of token ids: batches, samples, contexts and streams over prefill and decode."""

import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.inference.decoding import Rows, Serving, decode, prefill
from moe_jax.inference.sampling import Sampling
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.rules import num_shards, without_mesh
from moe_jax.part import EncoderInputs
from moe_jax.training.ways import without_capacity

CHUNK = 16  # tokens between two looks at what came out
ROWS = 32  # texts at once, unless said otherwise


class Piece(NamedTuple):
    """What was added to a text.

    Attributes:
      row: of the text: prompt i, sample s is i * num_samples + s.
      tokens: ids, in order, without the one that ended the text.
      ended: whether one did.
    """

    row: int
    tokens: list[int]
    ended: bool


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
      params: parameters of the model; on a mesh they say which.
      prompts: token ids, each at least one. Of an encoder-decoder, what the encoder reads.
      num_tokens: how many to add at most.
      **settings: those of `stream_tokens`: `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`, `seed`, `num_samples`, `stop_tokens`, `context`, `batch_size`, ...

    Returns:
      The tokens added to prompt i, sample s, at i * num_samples + s; without the one that ended it.

    Raises:
      ValueError: see `stream_tokens`.
    """
    answers: dict[int, list[int]] = {}
    for piece in stream_tokens(config, params, prompts, num_tokens, **settings):
        answers.setdefault(piece.row, []).extend(piece.tokens)
    return [answers[row] for row in sorted(answers)]


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
    **sampling: Any,
) -> Iterator[Piece]:
    """Continues prompts, and yields what is added as it comes.

    Args:
      config: see `generate_tokens`.
      params: see there.
      prompts: see there.
      num_tokens: see there.
      num_samples: texts for each prompt, each with random keys of its own.
      stop_tokens: each of which ends a text.
      state: of the model's parts, such as selection biases; or None.
      step: of training, for settings of routers that are annealed; None: at their ends.
      context: most tokens that are seen. A text that outgrows it goes on from its last half; of a
        longer prompt the last `context` tokens are read. None: all are seen, whatever the model was
        trained on.
      batch_size: texts at once; what a text gets does not depend on it.
      num_ids: ids from here on have logits but are no tokens (a padded vocabulary); None: all are.
      start_token: begins what the decoder of an encoder-decoder writes.
      capacity: capacity factor of MoE layers, whose group is then the whole batch; 0: dropless.
      ended: rows that are not continued. Whoever reads the stream may add to a set of them as it
        comes, such as a text that has a stop string: it gets no more, and frees its batch.
      **sampling: fields of `Sampling`.

    Yields:
      A `Piece` for every text and chunk of tokens, the last of a text with `ended`, or when
      `num_tokens` are there.

    Raises:
      ValueError: a prompt is empty or has an id that the model does not know, a number is out of
        range, or the model looks at later tokens.
    """
    how, model = Sampling(**sampling), for_inference(config.model)
    check(model, prompts, num_tokens, num_samples, context, batch_size, capacity)
    require(
        not without_capacity(model).looks_ahead(training=False),
        "a model that looks at later tokens cannot go on from a cache",
        f"{sorted(n for n, p in model.part.items() if p.looks_ahead(training=False))} do",
        "Train expert choice with a predictor, or use stream_anew, which reads all anew",
    )
    repeated = [list(prompt) for prompt in prompts for _ in range(num_samples)]
    rows = [(row, prompt) for row, prompt in enumerate(repeated) if row not in ended]
    serving = Serving(params, state, step)
    writer = Writer(
        serving, model, how, context, capacity, num_ids, tuple(stop_tokens), start_token, ended
    )
    with mesh_of(params):
        for start in range(0, len(rows), batch_size):
            yield from writer.write(rows[start : start + batch_size], num_tokens)


def for_inference(model: LanguageModel) -> LanguageModel:
    """The model with one sequence to a routing group, and nothing computed again."""
    return dataclasses.replace(in_groups(model, 0), remat="none")


def in_groups(model: LanguageModel, group_size: int) -> LanguageModel:
    """The model with so many tokens in a routing group; 0: one sequence."""

    def regrouped(part: Any) -> Any:
        return dataclasses.replace(part, group_size=group_size) if part.routes else part

    return model.map_parts(regrouped)


def check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    num_samples: int,
    context: int | None,
    batch_size: int = ROWS,
    capacity: float = 0.0,
) -> None:
    """Refuses what cannot be continued, as `ValueError`."""
    for name, value, least in (
        ("num_tokens", num_tokens, 0),
        ("num_samples", num_samples, 1),
        ("context", 2 if context is None else context, 2),
        ("batch_size", batch_size, 1),
        ("capacity", capacity, 0),
    ):
        require(value >= least, f"{name} is at least {least}", f"{name}={value}", "Raise it")
    for i, prompt in enumerate(prompts):
        require(len(prompt) > 0, "a prompt has at least one token", f"prompt {i} has none",
                "Begin it with the bos_id of the tokenizer")  # fmt: skip
        least, most = min(prompt), max(prompt)
        require(
            0 <= least and most < model.vocab_size,
            f"token ids lie in 0..{model.vocab_size - 1}, the model's vocabulary",
            f"prompt {i} has {least if least < 0 else most}",
            "Encode it with the tokenizer that the model was trained with",
        )


def mesh_of(params: Any) -> Any:
    """The context of the mesh that parameters lie on; of one device, that of no mesh."""
    mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    return without_mesh() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh)


@dataclasses.dataclass(frozen=True)
class Writer:
    """Continues batches of texts; arguments are those of `stream_tokens`."""

    serving: Serving
    model: LanguageModel
    sampling: Sampling
    context: int | None
    capacity: float
    num_ids: int | None
    stop_tokens: tuple[int, ...]
    start_token: int
    ended: Container[int]

    def write(self, texts: Sequence[tuple[int, list[int]]], num_tokens: int) -> Iterator[Piece]:
        """Adds tokens to a batch of numbered prompts."""
        numbers = [row for row, _ in texts]
        encoder, seen = None, [prompt for _, prompt in texts]
        if self.model.has_encoder:
            encoder = self.read(seen)
            seen = [[self.start_token] for _ in texts]
        live, left = set(range(len(texts))), num_tokens
        if not left:
            yield from (Piece(row, [], False) for row in numbers)
        while left and live:
            context = self.context or max(map(len, seen)) + left
            seen = [text[-context:] for text in seen]
            # Of the last token of all nothing more is seen.
            room = min(left, context + 1 - max(map(len, seen)))
            for chunk, pieces in self.until(seen, numbers, live, room, encoder):
                left -= chunk
                yield from pieces
            if left and live:
                seen = [text[-(context // 2) :] for text in seen]

    def until(
        self,
        seen: list[list[int]],
        numbers: Sequence[int],
        live: set[int],
        room: int,
        encoder: EncoderInputs | None,
    ) -> Iterator[tuple[int, list[Piece]]]:
        """Adds up to `room` tokens to every live text, in place; yields them chunk by chunk."""
        length = bucket(max(map(len, seen)))
        num_slots = length + -(-room // CHUNK) * CHUNK
        rows = self.begin(seen, numbers, live, (length, num_slots), encoder)
        stop_S = jnp.asarray(self.stop_tokens, jnp.int32)
        for done in range(0, room, CHUNK):
            rows, tokens_BN = decode(
                self.serving, rows, stop_S,
                model=self.decoding_model(rows), num_slots=num_slots, num_tokens=CHUNK,
                sampling=self.sampling, num_ids=self.num_ids, capacity=self.capacity,
            )  # fmt: skip
            count = min(CHUNK, room - done)
            pieces = []
            for i, drawn in enumerate(np.asarray(tokens_BN)[: len(seen), :count].tolist()):
                if i not in live:
                    continue
                ends = [j for j, token in enumerate(drawn) if token in self.stop_tokens]
                kept = drawn[: ends[0]] if ends else drawn
                seen[i] = seen[i] + kept
                pieces.append(Piece(numbers[i], kept, bool(ends)))
                if ends:
                    live.discard(i)
            yield count, pieces
            live -= {i for i in live if numbers[i] in self.ended}
            if not live:
                return

    def begin(
        self,
        seen: list[list[int]],
        numbers: Sequence[int],
        live: set[int],
        sizes: tuple[int, int],
        encoder: EncoderInputs | None,
    ) -> Rows:
        """Reads the texts, into so many places and slots; rows of padding fill the batch up."""
        length, num_slots = sizes
        batch = whole_rows(len(seen))
        tokens_BL, segments_BL = np.zeros((2, batch, length), np.int32)
        for i, text in enumerate(seen):
            if i in live:
                tokens_BL[i, length - len(text) :] = text
                segments_BL[i, length - len(text) :] = 1
        sample_B = np.zeros(batch, np.int32)
        sample_B[: len(seen)] = numbers
        return prefill(
            self.serving, tokens_BL, segments_BL, sample_B, encoder,
            model=self.model, num_slots=num_slots, sampling=self.sampling, capacity=self.capacity,
        )  # fmt: skip

    def decoding_model(self, rows: Rows) -> LanguageModel:
        """The model in which, with a capacity, the tokens of the whole batch share it."""
        batch = rows.live_B.shape[0]
        if not self.capacity:
            return self.model
        return in_groups(self.model, batch)

    def read(self, texts: Sequence[Sequence[int]]) -> EncoderInputs:
        """What an encoder reads: padded on the right."""
        tokens_BT, segments_BT = np.zeros(
            (2, whole_rows(len(texts)), bucket(max(map(len, texts)))), np.int32
        )
        for i, text in enumerate(texts):
            tokens_BT[i, : len(text)], segments_BT[i, : len(text)] = text, 1
        return EncoderInputs(jnp.asarray(tokens_BT), None, jnp.asarray(segments_BT))


def bucket(length: int) -> int:
    """A length that is compiled for: at most a quarter more, or a multiple of 16."""
    step = max(16, 2 ** max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def whole_rows(count: int) -> int:
    """So many rows, or as few more as the mesh in use splits evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    multiple = 1 if mesh.empty else num_shards("batch", mesh)
    return -(-count // multiple) * multiple
