"""Answers to prompts: pairs and conversations, in which only the answers are predicted."""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np

from moe_jax.config.check import require
from moe_jax.config.kinds import is_foreign, kind_of, source_hash
from moe_jax.config.settings import setting
from moe_jax.data.chat_template import BESIDE_TOKENIZER, ChatTemplate, open_chat_template
from moe_jax.data.conversations import Conversation, pair
from moe_jax.data.objectives.objective import Example, Key, Lengths, Objective
from moe_jax.data.objectives.pairs import Pair, pack_pairs, row_of
from moe_jax.data.packed_windows import PackedDocuments
from moe_jax.data.tokenizer import DocumentEncoder, Tokenizer
from moe_jax.data.windows import DomainTokens, RawWindow, Windows

logger = logging.getLogger(__name__)
warn_once = functools.lru_cache(maxsize=64)(logger.warning)


class AnswerEncoder(NamedTuple):
    """Encodes conversations: each token is twice its id, plus 1 if it is in an answer.

    `objective.encoder` makes it; see `tokenizer.DocumentEncoder`.
    """

    tokenizer: Tokenizer
    objective: "Supervised"

    @property
    def name(self) -> str:
        """The name of the tokenizer."""
        return self.tokenizer.name

    @property
    def dtype(self) -> np.dtype:
        """The dtype of doubled ids."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 2**15 else np.uint32)

    def encode_document(self, text: str) -> np.ndarray:
        """The tokens of a conversation that `Conversation.to_text` wrote."""
        ids, is_answer = self.objective.encode(Conversation.of_text(text), self.tokenizer)
        return (2 * ids.astype(np.int64) + is_answer).astype(self.dtype)

    def fingerprint(self) -> str:
        """Sha256 of the tokenizer, the objective, the template and which answers are marked.

        An objective of the user's counts with its source, which may encode differently.
        """
        template = self.objective.fingerprints(self.tokenizer).get("chat_template", "")
        says: tuple[object, ...] = type(self.objective).__name__, template
        says += (self.objective.last_answer_only,)
        if is_foreign(kind := kind_of(self.objective)):
            says += (source_hash(kind),)
        return hashlib.sha256(f"{self.tokenizer.fingerprint()} {says}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Predict the answers to prompts, in a decoder.

    A pair is `bos, prompt, answer, eos`; targets are the answer and its `eos`. Prompt and answer
    are encoded separately, so that generation, which has only the prompt, reads the same tokens.
    With a chat template, a pair is a user's message and an assistant's, and the tokens are those of
    the template; targets are the assistant's messages, each with the special token that ends it.
    """

    reads_conversations: ClassVar[bool] = True
    file_settings: ClassVar[tuple[str, ...]] = ("chat_template",)

    # "": prompt and answer one after the other; "tokenizer": the template beside the tokenizer; or
    # the path of a .jinja file. The run records its contents, so that the path may change.
    chat_template: str = setting("", changes_results=False)
    # Today's date for the template's `strftime_now`: YYYY-MM-DD; "": none.
    date: str = ""
    last_answer_only: bool = False  # only the last answer of a conversation is a target
    packed: bool = True  # several pairs per row, as they fit; else one
    # A pair that is longer than a row is refused, loses its end, or is left out.
    too_long: str = setting("refuse", choices=("refuse", "truncate", "leave_out"))

    def check(self) -> None:
        """See `Settings`."""
        try:
            datetime.date.fromisoformat(self.date or "2026-01-31")
            rule = "" if self.chat_template or not self.date else "needs a chat template"
        except ValueError:
            rule = "must be YYYY-MM-DD"
        require(not rule, f"date {rule}", f"date={self.date!r}", "Correct it, or leave it out")

    def template(self, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The chat template; None without one."""
        if not self.chat_template:
            return None
        return open_chat_template(self.chat_template, tokenizer, self.date)

    def encode(
        self, conversation: Conversation, tokenizer: Tokenizer
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a conversation.

        Returns:
            Integers [N], and bool [N]: whether a token is in an answer, its end included.

        Raises:
            ValueError: the template refuses the conversation, or messages have no template.
        """
        template = self.template(tokenizer)
        if template is not None:
            return template.encode(conversation.messages, last_only=self.last_answer_only)
        require(
            conversation.is_pair,
            "Messages need a chat template to become tokens",
            "data.objective.chat_template=''",
            "Set config.data.objective.chat_template=tokenizer, or the path of a .jinja file; or "
            'make a line of a prompt and an answer: {"prompt": "...", "answer": "..."}',
        )
        prompt, answer = (tokenizer.encode(message.content) for message in conversation.messages)
        before = (
            [*prompt, tokenizer.eos_id] if self.encoder_decoder else [tokenizer.bos_id, *prompt]
        )
        after = [*answer, tokenizer.eos_id]
        return np.array([*before, *after]), np.arange(len(before) + len(after)) >= len(before)

    def encoder(self, tokenizer: Tokenizer) -> DocumentEncoder:
        """See `Objective`: marks the tokens of answers."""
        return AnswerEncoder(tokenizer, self)

    def fingerprints(self, tokenizer: Tokenizer) -> dict[str, str]:
        """See `Objective`: the chat template."""
        template = self.template(tokenizer)
        return {} if template is None else {"chat_template": template.fingerprint()}

    def with_whole_paths(self) -> Self:
        """See `Objective`."""
        if self.chat_template in ("", BESIDE_TOKENIZER):
            return self
        path = pathlib.Path(self.chat_template).expanduser().absolute()
        return dataclasses.replace(self, chat_template=str(path))

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """See `Objective`: with a chat template, the ids of a user's message."""
        template = self.template(tokenizer)
        if template is None:
            return super().prompt_ids(tokenizer, prompt)
        return template.prompt_ids(pair(prompt, "").messages[:1]).tolist()

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """See `Objective`: also the token that ends an answer in the template."""
        template = self.template(tokenizer)
        ends = () if template is None else template.stop_ids
        return tuple(dict.fromkeys((*super().stop_ids(tokenizer), *ends)))

    def windows(self, tokens: DomainTokens, sequence_length: int, *, keep_partial: bool) -> Windows:
        """See `Objective`: rows of whole pairs, which may always be partly empty.

        Raises:
            ValueError: a pair is longer than a row, and `too_long` is "refuse".
        """
        del keep_partial
        lengths = self.lengths(sequence_length)
        limits = lengths.encoder, lengths.decoder
        sizes_D2 = self.sizes(tokens)
        fits_D = np.all(sizes_D2 <= limits, axis=1)
        kept_D = fits_D | (self.too_long == "truncate")
        for document in np.flatnonzero(kept_D & ~fits_D) if not self.encoder_decoder else ():
            begin = int(tokens.offsets[document])
            kept_D[document] = np.any(tokens.read(begin + 1, begin + 1 + sequence_length) & 1)
        self._say_too_long(tokens, sizes_D2[~fits_D], int(np.sum(~kept_D)), sequence_length)
        documents_C = np.flatnonzero(kept_D)
        sizes_C2 = np.minimum(sizes_D2, limits)[documents_C]
        return PackedDocuments(tokens, documents_C, sizes_C2, limits=limits, packed=self.packed)

    def _say_too_long(
        self, tokens: DomainTokens, sizes_N2: np.ndarray, left_out: int, sequence_length: int
    ) -> None:
        """Refuses or counts the pairs that fit no row, by the tokens of their two sides."""
        if not len(sizes_N2):
            return
        lengths = self.lengths(sequence_length)
        limits = lengths.encoder, lengths.decoder
        have: dict[str, int] = {}
        need: dict[str, int] = {}
        longest_2 = sizes_N2.max(axis=0).tolist()
        for name, limit, longest in zip(self.settings_of_sides, limits, longest_2, strict=True):
            if longest > limit:
                have[name], need[name] = limit, max(need.get(name, 0), longest)
        found = (
            f"{len(sizes_N2)} of the {tokens.num_documents} pairs of {tokens.name} are longer "
            f"than {' or '.join(f'{name}={limit}' for name, limit in have.items())}"
        )
        values = " and ".join(f"config.{name}={longest}" for name, longest in need.items())
        require(
            self.too_long != "refuse",
            "A prompt with its answer must fit into a sequence",
            f"{found}, the longest has {' and '.join(map(str, need.values()))} tokens",
            f"Set {values}, or config.data.objective.too_long='truncate' or 'leave_out'",
        )
        warn_once(f"{found}: {len(sizes_N2) - left_out} are cut and {left_out} left out.")

    def sizes(self, tokens: DomainTokens) -> np.ndarray:
        """Tokens of each document on the encoder's side of a row and on the decoder's.

        Returns:
            int64 [documents, 2].
        """
        sizes_D = np.diff(tokens.offsets) - 1  # the last token is only a target
        return np.stack([np.zeros_like(sizes_D), sizes_D], axis=1)

    def example(
        self, window: RawWindow, *, sequence_length: int, tokenizer: Tokenizer, key: Key
    ) -> Example:
        """See `Objective`; nothing is drawn.

        Inputs are all tokens of each pair except the last, targets all except the first. The loss
        weight is 1 if the target is in an answer. A segment is a pair.
        """
        del key
        pairs = [tokens[: sequence_length + 1] for tokens in _documents(window)]
        segments = [np.full(len(tokens) - 1, n) for n, tokens in enumerate(pairs, 1)]
        filled = functools.partial(row_of, length=sequence_length)
        pad_id = tokenizer.pad_id
        return {
            "inputs": filled([tokens[:-1] >> 1 for tokens in pairs], filler=pad_id),
            "targets": filled([tokens[1:] >> 1 for tokens in pairs], filler=pad_id),
            "segment_ids": filled(segments, filler=0),
            "positions": filled([np.arange(len(tokens) - 1) for tokens in pairs], filler=0),
            "loss_weights": filled([tokens[1:] & 1 for tokens in pairs], filler=0).astype(
                np.float32
            ),
            "domain": np.array(window.domain, np.int32),
        }


@dataclasses.dataclass(frozen=True)
class EncoderSupervised(Supervised):
    """Write the answer to a prompt that an encoder reads.

    The encoder reads `prompt, eos`; the decoder writes `answer, eos`. `data.sequence_length` is
    the length of the encoder inputs.
    """

    encoder_decoder: ClassVar[bool] = True

    answer_length: int = setting(0, at_least=0)  # tokens of the decoder; 0: as many as the encoder

    def check(self) -> None:
        """See `Settings`."""
        super().check()
        require(
            not self.chat_template,
            "an encoder reads a prompt as it is, without a chat template",
            f"chat_template={self.chat_template!r}",
            "Leave it out",
        )

    def lengths(self, sequence_length: int) -> Lengths:
        """See `Objective`."""
        decoder = self.answer_length or sequence_length
        return Lengths(sequence_length + decoder, decoder, sequence_length)

    @property
    def settings_of_sides(self) -> tuple[str, str]:
        """See `Objective`."""
        answers = "data.objective.answer_length" if self.answer_length else "data.sequence_length"
        return "data.sequence_length", answers

    def sizes(self, tokens: DomainTokens) -> np.ndarray:
        """See `Supervised`; reads all tokens."""
        whole_D = np.diff(tokens.offsets)
        spans = itertools.pairwise(tokens.offsets.tolist())
        answers_D = np.array([np.sum(tokens.read(*span) & 1) for span in spans], np.int64)
        return np.stack([whole_D - answers_D, answers_D], axis=1)

    def example(
        self, window: RawWindow, *, sequence_length: int, tokenizer: Tokenizer, key: Key
    ) -> Example:
        """See `Objective`; `pack_pairs` describes the arrays."""
        del key
        lengths = self.lengths(sequence_length)
        pairs = []
        for tokens in _documents(window):
            ids, is_answer = tokens >> 1, tokens % 2 == 1
            pairs.append(
                Pair(ids[~is_answer][: lengths.encoder], ids[is_answer][: lengths.decoder])
            )
        return pack_pairs(
            pairs, lengths=lengths, pad_id=tokenizer.pad_id, eos_id=None, domain=window.domain
        )


def _documents(window: RawWindow) -> Sequence[np.ndarray]:
    """The tokens of each document of a window."""
    return np.split(window.tokens, np.flatnonzero(np.diff(window.segment_ids)) + 1)
