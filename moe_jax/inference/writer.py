"""Batches of texts on their way: prefill and decode called, contexts moved on, ends found."""

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

CHUNK = 16  # tokens between two looks at what came out
Drawn = tuple[list[int], np.ndarray | None]  # tokens of a text, and experts of what was read


class Piece(NamedTuple):
    """What was added to a text.

    Attributes:
      row: of the text: prompt i, sample s is i * num_samples + s.
      tokens: ids, in order, without the one that ended the text.
      ended: whether one did.
      routes: the experts of the tokens that were read since the piece before, those of the prompt
        first, int32 [length, layers, K] (`models.token_routes`); None if they are not recorded.
    """

    row: int
    tokens: list[int]
    ended: bool
    routes: np.ndarray | None = None


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
    draft: Draft | None = None
    record: bool = False
    sees_prompt: bool = False

    def write(self, texts: Sequence[tuple[int, list[int]]], num_tokens: int) -> Iterator[Piece]:
        """Adds tokens to a batch of numbered prompts."""
        numbers = [row for row, _ in texts]
        encoder, seen = None, [prompt for _, prompt in texts]
        if self.model.has_encoder:
            encoder = encoder_inputs(seen, whole_rows(len(seen)))
            seen = [[self.start_token] for _ in texts]
        live, left, sees_prompt = set(range(len(texts))), num_tokens, self.sees_prompt
        if not left:
            yield from (Piece(row, [], False) for row in numbers)
        while left and live:
            context = self.context or max(map(len, seen)) + left
            seen = [text[-context:] for text in seen]
            # Of the last token of all nothing more is seen.
            room = min(left, context + 1 - max(map(len, seen)))
            yield from self.until(seen, numbers, live, room, encoder, sees_prompt)
            left, sees_prompt = left - room, False  # what is read again has tokens of its own
            if left and live:
                seen = [text[-(context // 2) :] for text in seen]

    def until(
        self,
        seen: list[list[int]],
        numbers: Sequence[int],
        live: set[int],
        room: int,
        encoder: EncoderInputs | None,
        sees_prompt: bool,
    ) -> Iterator[Piece]:
        """Adds `room` tokens to every live text, in place, as far as it does not end before."""
        full = [len(text) + room for text in seen]
        recorded = [0] * len(seen)
        growing = set(live)  # texts that have not got their room
        chunks = self.plain if self.draft is None else self.speculative
        for chunk in chunks(seen, numbers, live, room, encoder, sees_prompt):
            for i in sorted(growing):
                drawn, routes = chunk[i]
                drawn = drawn[: full[i] - len(seen[i])]
                ends = [j for j, token in enumerate(drawn) if token in self.stop_tokens]
                kept = drawn[: ends[0]] if ends else drawn
                seen[i] = seen[i] + kept
                if routes is not None:
                    routes = routes[: len(seen[i]) - recorded[i]]
                    recorded[i] += len(routes)
                yield Piece(numbers[i], kept, bool(ends), routes)
                if ends:
                    live.discard(i)
            live -= {i for i in live if numbers[i] in self.ended}
            growing = {i for i in growing & live if len(seen[i]) < full[i]}
            if not growing:
                return

    def plain(
        self,
        seen: Sequence[list[int]],
        numbers: Sequence[int],
        live: set[int],
        room: int,
        encoder: EncoderInputs | None,
        sees_prompt: bool,
    ) -> Iterator[list[Drawn]]:
        """What is drawn in each text, chunk by chunk."""
        length = bucket(max(map(len, seen)))
        num_slots = length + whole_chunks(room)
        how: dict[str, Any] = {
            "num_slots": num_slots, "sampling": self.sampling, "capacity": self.capacity,
            "record": self.record,
        }  # fmt: skip
        prompts = prompts_of(seen, numbers, live, length, room, encoder, sees_prompt)
        rows, routes = prefill(self.serving, prompts, model=self.model, **how)
        read = self.routes_of(routes, seen)
        # With a capacity the tokens of the whole batch share it.
        model = in_groups(self.model, rows.live_B.shape[0]) if self.capacity else self.model
        stop_S = jnp.asarray(self.stop_tokens, jnp.int32)
        while True:
            rows, tokens_BN, routes = decode(
                self.serving, rows, stop_S, model=model, num_tokens=CHUNK, num_ids=self.num_ids,
                **how,
            )  # fmt: skip
            tokens = np.asarray(tokens_BN).tolist()
            new = self.routes_of(routes, seen, CHUNK)
            yield [(tokens[i], behind(read[i], new[i])) for i in range(len(seen))]
            read = [None] * len(seen)

    def speculative(
        self,
        seen: Sequence[list[int]],
        numbers: Sequence[int],
        live: set[int],
        room: int,
        encoder: EncoderInputs | None,
        sees_prompt: bool,
    ) -> Iterator[list[Drawn]]:
        """What is drawn in each text, some passes at a time."""
        assert self.draft is not None and encoder is None, "checked"
        how, draft = self.draft.of(
            self.model, self.serving, self.sampling, self.num_ids, self.record
        )
        length = bucket(max(*map(len, seen), how.drafter.places(how.length)))
        num_slots = length + whole_chunks(room) + how.length + 1
        prompts = prompts_of(seen, numbers, live, length, room, None, sees_prompt)
        left_B = np.full(len(prompts.sample_B), room, np.int32)
        stop_S = jnp.asarray(self.stop_tokens, jnp.int32)
        texts, routes = begin(
            self.serving, draft, prompts, left_B, stop_S, how=how, num_slots=num_slots
        )
        first, read = np.asarray(texts.next_B).tolist(), self.routes_of(routes, seen)
        yield [([first[i]], read[i]) for i in range(len(seen))]
        while True:
            texts, tokens_BRL, counts_BR, routes = speculate(
                self.serving, draft, texts, stop_S, how=how, num_slots=num_slots,
                num_passes=max(CHUNK // (how.length + 1), 1),
            )  # fmt: skip
            tokens, counts = np.asarray(tokens_BRL), np.asarray(counts_BR)
            self.draft.count(counts[sorted(live)])
            is_added = np.arange(how.length + 1) < counts[..., None]
            flat = jax.tree.map(lambda a: a.reshape(*a.shape[:2], -1, a.shape[-1]), routes)
            read = self.routes_of(flat, seen, is_added[0].size)
            yield [
                (
                    tokens[i][is_added[i]].tolist(),
                    None if (own := read[i]) is None else own[is_added[i].ravel()],
                )
                for i in range(len(seen))
            ]

    def routes_of(
        self, routes: Routes, seen: Sequence[list[int]], length: int | None = None
    ) -> list[np.ndarray | None]:
        """The experts of the last tokens of each row: so many, or those of its text."""
        if not self.record:
            return [None] * len(seen)
        layers = {name: own for name, own in self.model.moe_layers.items() if name in routes}
        rows = by_token(layers, {name: np.asarray(own) for name, own in routes.items()})
        return [row[-(length or len(text)) :] for row, text in zip(rows, seen, strict=False)]


def behind(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """Experts of tokens one behind the other."""
    return other if one is None or other is None else np.concatenate([one, other])


def prompts_of(
    texts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    live: set[int],
    length: int,
    room: int,
    encoder: EncoderInputs | None,
    sees_prompt: bool = False,
) -> Prompts:
    """The live texts as arrays of so many places, each to get `room` tokens more.

    Rows of padding stand for the others, and fill the batch up. With `sees_prompt` the tokens of a
    text see each other from both sides.
    """
    batch = whole_rows(len(texts))
    tokens_BL, segments_BL = np.zeros((2, batch, length), np.int32)
    sample_B, lengths_B = np.zeros((2, batch), np.int32)
    for i, text in enumerate(texts):
        sample_B[i] = numbers[i]
        if i in live:
            tokens_BL[i, length - len(text) :] = text
            segments_BL[i, length - len(text) :] = 1
            lengths_B[i] = len(text) + room
    in_prefix_BL = segments_BL > 0 if sees_prompt else None
    return Prompts(tokens_BL, segments_BL, sample_B, lengths_B, encoder, in_prefix_BL)


def encoder_inputs(texts: Sequence[Sequence[int]], rows: int) -> EncoderInputs:
    """What an encoder reads, in so many rows: padded on the right."""
    tokens_BT, segments_BT = np.zeros((2, rows, bucket(max(map(len, texts)))), np.int32)
    for i, text in enumerate(texts):
        tokens_BT[i, : len(text)], segments_BT[i, : len(text)] = text, 1
    return EncoderInputs(jnp.asarray(tokens_BT), None, jnp.asarray(segments_BT))


def whole_chunks(count: int) -> int:
    """So many tokens, or as few more as make whole chunks."""
    return -(-count // CHUNK) * CHUNK


def bucket(length: int) -> int:
    """A length that is compiled for: at most a quarter more, or a multiple of 16."""
    step = max(16, 2 ** max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def whole_rows(count: int) -> int:
    """So many rows, or as few more as the mesh in use splits evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    multiple = 1 if mesh.empty else num_shards("batch", mesh)
    return -(-count // multiple) * multiple
