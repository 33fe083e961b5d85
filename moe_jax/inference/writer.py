"""Writes batches of texts: calls prefill and decode, moves contexts, finds ends."""

import dataclasses
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.inference.decoding import Prompts, Routes, Serving, decode, in_groups, prefill
from moe_jax.inference.draft import Draft
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.speculative import begin, speculate
from moe_jax.models.model import LanguageModel
from moe_jax.models.token_routes import by_token
from moe_jax.parallel.rules import num_shards
from moe_jax.part import EncoderInputs

CHUNK = 16  # tokens decoded before the host reads them
Drawn = tuple[list[int], np.ndarray | None]  # new tokens of a text, experts of the tokens read


class Piece(NamedTuple):
    """New tokens of a text.

    Attributes:
      row: of the text: prompt i, sample s is i * num_samples + s.
      tokens: ids, in order, without the stop token.
      ended: whether a stop token ended the text.
      routes: the experts of the tokens that were read since the last piece, beginning with the
        prompt, int32 [length, layers, K] (`models.token_routes`); None if they are not recorded.
    """

    row: int
    tokens: list[int]
    ended: bool
    routes: np.ndarray | None = None


@dataclasses.dataclass
class Growing:
    """A text that is being written.

    Attributes:
      row: see `Piece`.
      tokens: of the prompt, and the tokens added.
      most: maximum number of tokens.
      start: number of leading tokens that are no longer seen.
      full: number of tokens at which the text is read again, from its last half.
      goes_on: whether it still needs tokens.
    """

    row: int
    tokens: list[int]
    most: int
    start: int = 0
    full: int = 0
    goes_on: bool = True

    @property
    def seen(self) -> list[int]:
        """The tokens to read; none of a text that is finished."""
        return self.tokens[self.start :] if self.goes_on else []

    @property
    def room(self) -> int:
        """The number of tokens to add before the text is read again."""
        return self.full - len(self.tokens) if self.goes_on else 0


@dataclasses.dataclass(frozen=True)
class Writer:
    """Continues batches of texts; for the arguments see `stream_tokens`."""

    serving: Serving
    model: LanguageModel
    sampling: Sampling
    context: int | None
    capacity: float
    num_ids: int | None
    stop_tokens: tuple[int, ...]
    start_token: int
    ended: Container[int]
    draft: Draft | None = None
    record: bool = False
    sees_prompt: bool = False

    def write(self, prompts: Sequence[tuple[int, list[int]]], num_tokens: int) -> Iterator[Piece]:
        """Adds tokens to a batch of numbered prompts.

        Each text is cut where it is itself full, so that the tokens it sees do not depend on other
        texts. Full texts wait for the others, and all are then read again together.
        """
        encoder, begins = None, [prompt for _, prompt in prompts]
        if self.model.has_encoder:
            if self.context:
                begins = [begin[-self.context :] for begin in begins]
            encoder = encoder_inputs(begins, whole_rows(len(begins)))
            begins = [[self.start_token] for _ in prompts]
        texts = [
            Growing(row, list(begin), len(begin) + num_tokens)
            for (row, _), begin in zip(prompts, begins, strict=True)
        ]
        if not num_tokens:
            yield from (Piece(text.row, [], False) for text in texts)
            return
        context = self.context or max(text.most for text in texts)
        for text in texts:
            text.start = max(len(text.tokens) - context, 0)
        sees_prompt = self.sees_prompt
        while any(text.goes_on for text in texts):
            for text in texts:
                # One more than the context: the last token is not read.
                text.full = min(text.start + context + 1, text.most)
            yield from self.until_full(texts, encoder, sees_prompt)
            sees_prompt = False  # what is read again contains generated tokens
            for text in texts:
                text.goes_on &= len(text.tokens) < text.most
                if text.goes_on:
                    text.start = len(text.tokens) - context // 2

    def until_full(
        self, texts: Sequence[Growing], encoder: EncoderInputs | None, sees_prompt: bool
    ) -> Iterator[Piece]:
        """Adds tokens until every text is full or has ended."""
        recorded = [0] * len(texts)
        chunks = self.plain if self.draft is None else self.speculative
        for chunk in chunks(texts, encoder, sees_prompt):
            for i, text in enumerate(texts):
                if not text.room:
                    continue
                drawn, routes = chunk[i]
                drawn = drawn[: text.room]
                ends = [j for j, token in enumerate(drawn) if token in self.stop_tokens]
                kept = drawn[: ends[0]] if ends else drawn
                text.tokens += kept
                if routes is not None:
                    routes = routes[: len(text.tokens) - recorded[i]]
                    recorded[i] += len(routes)
                yield Piece(text.row, kept, bool(ends), routes)
                text.goes_on = not ends
            for text in texts:
                text.goes_on &= text.row not in self.ended
            if not any(text.room for text in texts):
                return

    def plain(
        self, texts: Sequence[Growing], encoder: EncoderInputs | None, sees_prompt: bool
    ) -> Iterator[list[Drawn]]:
        """The tokens drawn for each text, chunk by chunk."""
        lengths = [len(text.seen) for text in texts]
        length = bucket(max(lengths))
        num_slots = length + whole_chunks(max(text.room for text in texts))
        how: dict[str, Any] = {
            "num_slots": num_slots, "sampling": self.sampling, "capacity": self.capacity,
            "record": self.record,
        }  # fmt: skip
        prompts = self.prompts(texts, length, encoder, sees_prompt)
        rows, routes = prefill(self.serving, prompts, model=self.model, **how)
        read = self.routes_of(routes, lengths)
        # The tokens of the whole batch share a capacity.
        model = in_groups(self.model, rows.live_B.shape[0]) if self.capacity else self.model
        stop_S = jnp.asarray(self.stop_tokens, jnp.int32)
        while True:
            rows, tokens_BN, routes = decode(
                self.serving, rows, stop_S, model=model, num_tokens=CHUNK, num_ids=self.num_ids,
                **how,
            )  # fmt: skip
            tokens = np.asarray(tokens_BN).tolist()
            new = self.routes_of(routes, [CHUNK] * len(texts))
            yield [(tokens[i], behind(read[i], new[i])) for i in range(len(texts))]
            read = [None] * len(texts)

    def speculative(
        self, texts: Sequence[Growing], encoder: EncoderInputs | None, sees_prompt: bool
    ) -> Iterator[list[Drawn]]:
        """The tokens drawn for each text, some passes at a time."""
        assert self.draft is not None and encoder is None, "checked"
        how, draft = self.draft.of(
            self.model, self.serving, self.sampling, self.num_ids, self.record
        )
        lengths, rooms = [len(text.seen) for text in texts], [text.room for text in texts]
        length = bucket(max(*lengths, how.drafter.places(how.length)))
        num_slots = length + whole_chunks(max(rooms)) + how.length + 1
        prompts = self.prompts(texts, length, None, sees_prompt)
        left_B = np.zeros(len(prompts.sample_B), np.int32)
        left_B[: len(texts)] = rooms
        stop_S = jnp.asarray(self.stop_tokens, jnp.int32)
        rows, routes = begin(
            self.serving, draft, prompts, left_B, stop_S, how=how, num_slots=num_slots
        )
        first, read = np.asarray(rows.next_B).tolist(), self.routes_of(routes, lengths)
        yield [([first[i]], read[i]) for i in range(len(texts))]
        while True:
            rows, tokens_BRL, counts_BR, kept_BR, routes = speculate(
                self.serving, draft, rows, stop_S, how=how, num_slots=num_slots,
                num_passes=max(CHUNK // (how.length + 1), 1),
            )  # fmt: skip
            tokens, counts = np.asarray(tokens_BRL), np.asarray(counts_BR)
            going_on = [i for i, text in enumerate(texts) if text.goes_on]
            self.draft.count(counts[going_on], np.asarray(kept_BR)[going_on])
            is_added = np.arange(how.length + 1) < counts[..., None]
            flat = jax.tree.map(lambda a: a.reshape(*a.shape[:2], -1, a.shape[-1]), routes)
            read = self.routes_of(flat, [is_added[0].size] * len(texts))
            yield [
                (
                    tokens[i][is_added[i]].tolist(),
                    None if (own := read[i]) is None else own[is_added[i].ravel()],
                )
                for i in range(len(texts))
            ]

    def prompts(
        self,
        texts: Sequence[Growing],
        length: int,
        encoder: EncoderInputs | None,
        sees_prompt: bool,
    ) -> Prompts:
        """The tokens to read as `Prompts` of `length` places, with data on the tokens before."""
        rows, seen = zip(*((text.row, text.seen) for text in texts), strict=True)
        # The last token of a full text is not read.
        longest = self.context or max(text.most for text in texts)
        lengths = [min(len(text.seen) + text.room, longest) for text in texts]
        prompts = prompts_of(seen, rows, length, lengths, encoder, sees_prompt)
        before_B, seen_BV = np.zeros_like(prompts.sample_B), None
        for i, text in enumerate(texts):
            before_B[i] = text.start
        if before_B.any() and self.sampling.repetition_penalty != 1:
            seen_BV = np.zeros((len(before_B), self.model.vocab_size), bool)
            for i, text in enumerate(texts):
                seen_BV[i, text.tokens[: text.start]] = True
        return prompts._replace(before_B=before_B, seen_BV=seen_BV)

    def routes_of(self, routes: Routes, lengths: Sequence[int]) -> list[np.ndarray | None]:
        """The experts of the last tokens of each row, `lengths` of them."""
        if not self.record:
            return [None] * len(lengths)
        layers = {name: own for name, own in self.model.moe_layers.items() if name in routes}
        rows = by_token(layers, {name: np.asarray(own) for name, own in routes.items()})
        return [row[len(row) - n :] for row, n in zip(rows, lengths, strict=False)]


def behind(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """Concatenates experts of successive tokens; returns `other` if either is None."""
    return other if one is None or other is None else np.concatenate([one, other])


def prompts_of(
    texts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    length: int,
    lengths: Sequence[int],
    encoder: EncoderInputs | None,
    sees_prompt: bool = False,
) -> Prompts:
    """Texts as arrays of `length` places; each text may grow to its length in `lengths`.

    An empty text is a row of padding, and such rows fill the batch up. `sees_prompt` makes the
    tokens of a text see each other in both directions.
    """
    batch = whole_rows(len(texts))
    tokens_BL, segments_BL = np.zeros((2, batch, length), np.int32)
    sample_B, lengths_B = np.zeros((2, batch), np.int32)
    for i, text in enumerate(texts):
        sample_B[i], lengths_B[i] = numbers[i], lengths[i]
        tokens_BL[i, length - len(text) :] = text
        segments_BL[i, length - len(text) :] = 1
    in_prefix_BL = segments_BL > 0 if sees_prompt else None
    return Prompts(tokens_BL, segments_BL, sample_B, lengths_B, encoder, in_prefix_BL)


def encoder_inputs(texts: Sequence[Sequence[int]], rows: int) -> EncoderInputs:
    """The inputs of an encoder in `rows` rows, padded on the right."""
    tokens_BT, segments_BT = np.zeros((2, rows, bucket(max(map(len, texts)))), np.int32)
    for i, text in enumerate(texts):
        tokens_BT[i, : len(text)], segments_BT[i, : len(text)] = text, 1
    return EncoderInputs(jnp.asarray(tokens_BT), None, jnp.asarray(segments_BT))


def whole_chunks(count: int) -> int:
    """`count` rounded up to whole chunks."""
    return -(-count // CHUNK) * CHUNK


def bucket(length: int) -> int:
    """The length to compile for: at most a quarter longer, or the next multiple of 16."""
    step = max(16, 2 ** max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def whole_rows(count: int) -> int:
    """`count` rounded up to rows that the current mesh splits evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    multiple = 1 if mesh.empty else num_shards("batch", mesh)
    return -(-count // multiple) * multiple
