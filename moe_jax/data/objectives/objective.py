"""The base class of objectives, and the types of their inputs and outputs."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from moe_jax.config.check import require
from moe_jax.config.kinds import kind_of
from moe_jax.config.settings import Settings
from moe_jax.data.tokenizer import DocumentEncoder, Tokenizer
from moe_jax.data.windows import DocumentWindows, DomainTokens, RawWindow, Windows

Example = dict[str, np.ndarray]
# Determines the random draws of an example: a seed and the example's number, each below 2^64.
Key = tuple[int, int]


class Lengths(NamedTuple):
    """Sizes of an example.

    Attributes:
        window: tokens of the window that it is made from, at most.
        decoder: L, length of the targets.
        encoder: T, length of the encoder inputs; 0 without an encoder.
    """

    window: int
    decoder: int
    encoder: int = 0


def generator(key: Key) -> np.random.Generator:
    """A random generator that depends only on the key."""
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


@dataclasses.dataclass(frozen=True)
class Objective(Settings):
    """What a model is asked to predict.

    Attributes:
        encoder_decoder: whether a batch has encoder inputs.
        continues_text: whether the targets continue the text that the model reads, so that their
            bits per byte are meaningful.
        reads_conversations: whether records are prompts with answers, instead of texts.
        file_settings: names of settings that may be the path of a file, which may be moved.
    """

    family: ClassVar[str] = "objective"
    encoder_decoder: ClassVar[bool] = False
    continues_text: ClassVar[bool] = True
    reads_conversations: ClassVar[bool] = False
    file_settings: ClassVar[tuple[str, ...]] = ()

    @property
    def sees_prompt(self) -> bool:
        """Whether the tokens of a prompt see each other in both directions, in a decoder."""
        return False

    def encoder(self, tokenizer: Tokenizer) -> DocumentEncoder:
        """The encoder of the documents that `windows` reads; by default the tokenizer."""
        return tokenizer

    def fingerprints(self, tokenizer: Tokenizer) -> dict[str, str]:
        """Sha256 of the files that the objective reads, by name; a resumed run needs the same.

        Raises:
            ValueError: a file is missing, or is for another tokenizer.
        """
        del tokenizer
        return {}

    def with_whole_paths(self) -> Self:
        """The objective with absolute paths, for use from another folder."""
        return self

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """The ids that the encoder, or else the decoder, reads before the answer to a prompt.

        Raises:
            ValueError: the prompt cannot be encoded.
        """
        ids = tokenizer.encode(prompt).tolist()
        return [*ids, tokenizer.eos_id] if self.encoder_decoder else [tokenizer.bos_id, *ids]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end generation."""
        return tokenizer.end_ids

    def lengths(self, sequence_length: int) -> Lengths:
        """The sizes of an example at this `data.sequence_length`.

        Raises:
            ValueError: examples cannot be so short.
        """
        return Lengths(window=sequence_length + 1, decoder=sequence_length)

    @property
    def settings_of_sides(self) -> tuple[str, str]:
        """Names of the settings of the row length, on the encoder's and the decoder's side."""
        return "data.sequence_length", "data.sequence_length"

    def windows(self, tokens: DomainTokens, sequence_length: int, *, keep_partial: bool) -> Windows:
        """The windows of a domain.

        Args:
            tokens: tokens of the domain.
            sequence_length: `data.sequence_length`.
            keep_partial: whether the last tokens make a shorter window if they do not fill one.
        """
        window = self.lengths(sequence_length).window
        return DocumentWindows(tokens, window=window, keep_partial=keep_partial)

    def arrays(self, sequence_length: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of every array of an example except `domain`, by name."""
        lengths = self.lengths(sequence_length)
        names = ("inputs", "targets", "segment_ids", "positions")
        arrays: dict[str, tuple[tuple[int, ...], type]] = {
            name: ((lengths.decoder,), np.int32) for name in names
        }
        arrays["loss_weights"] = ((lengths.decoder,), np.float32)
        if lengths.encoder:
            for name in ("inputs", "segment_ids", "positions"):
                arrays[f"encoder_{name}"] = ((lengths.encoder,), np.int32)
        return arrays

    def example(
        self, window: RawWindow, *, sequence_length: int, tokenizer: Tokenizer, key: Key
    ) -> Example:
        """Makes an example from a window.

        Args:
            window: at most `lengths(sequence_length).window` tokens.
            sequence_length: `data.sequence_length`.
            tokenizer: the tokenizer that made the tokens.
            key: key of the random draws.

        Returns:
            The arrays that `arrays(sequence_length)` lists, and `domain`, an int32 scalar. They
            satisfy `check_positions`.
        """
        raise NotImplementedError

    def vocab_size(self, tokenizer: Tokenizer, sequence_length: int) -> int:
        """The number of ids of examples: the tokenizer's, and those that the objective adds.

        Raises:
            ValueError: the settings do not fit the length.
        """
        del sequence_length
        return tokenizer.vocab_size

    def token_bytes(self, tokenizer: Tokenizer, sequence_length: int) -> np.ndarray:
        """UTF-8 bytes per target id, int32 [`vocab_size`].

        All are 0 if targets do not continue a text: bits per byte are then nan.
        """
        token_bytes_V = np.zeros(self.vocab_size(tokenizer, sequence_length), np.int32)
        if self.continues_text:
            token_bytes_V[: tokenizer.vocab_size] = tokenizer.token_bytes_V
        return token_bytes_V

    def check_model(self, model: Any) -> None:
        """Refuses a model of another kind.

        Raises:
            ValueError: only one of the model and the objective has an encoder, or the decoder
                sees its targets.
        """
        kind = {True: "an encoder and a decoder", False: "only a decoder"}
        has_encoder = bool(getattr(model, "has_encoder", False))
        other = "span_corruption" if has_encoder else "causal_lm"
        require(
            has_encoder == self.encoder_decoder,
            f"data.objective={kind_of(self)!r} is for a model with {kind[self.encoder_decoder]}",
            f"the model has {kind[has_encoder]}",
            f"Set data.objective, for example to {other!r}",
        )
        require(
            has_encoder or model.stack.causal,
            "the next token cannot be the objective of a model that sees it",
            f"data.objective={kind_of(self)!r}, model.stack.causal=False",
            "Set model.stack.causal=True",
        )


def check_positions(example: Example) -> None:
    """Checks that each document is contiguous, and that its positions grow by one.

    Attention kernels rely on it (`Call.contiguous`).

    Raises:
        ValueError: with the array, the document and its positions.
    """
    for side in ("", "encoder_"):
        if f"{side}positions" not in example:
            continue
        segments, positions = example[f"{side}segment_ids"], example[f"{side}positions"]
        begins = np.flatnonzero(np.diff(segments, prepend=0))
        documents = segments[begins][segments[begins] > 0]
        follows = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        wrong = segments[1:][follows & (np.diff(positions) != 1)]
        numbers, counts = np.unique(documents, return_counts=True)
        wrong = np.concatenate([wrong, numbers[counts > 1]])
        first = wrong[0] if len(wrong) else 0
        require(
            not len(wrong),
            "a document must stand in one piece, and its positions must grow by one",
            f"{side}positions {positions[segments == first][:8].tolist()} ... of document {first}",
            "Correct the objective",
        )
