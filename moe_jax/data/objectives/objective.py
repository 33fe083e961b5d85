"""The base class of objectives, and what goes in and out of them."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from moe_jax.config.check import require
from moe_jax.config.kinds import kind_of
from moe_jax.config.settings import Settings
from moe_jax.data.tokenizer import DocumentEncoder, Tokenizer
from moe_jax.data.windows import DocumentWindows, DomainTokens, RawWindow, Windows

Example = dict[str, np.ndarray]
# Decides all that is drawn for an example: a seed and the number of the example, below 2^64.
Key = tuple[int, int]


class Lengths(NamedTuple):
    """Sizes of an example.

    Attributes:
        window: tokens that it is made of, at most.
        decoder: L, of what is predicted.
        encoder: T, of what an encoder reads; 0 without one.
    """

    window: int
    decoder: int
    encoder: int = 0


def generator(key: Key) -> np.random.Generator:
    """Random numbers that are a function of the key alone."""
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


@dataclasses.dataclass(frozen=True)
class Objective(Settings):
    """What a model is asked to predict.

    Attributes:
        encoder_decoder: whether a batch has inputs of an encoder.
        continues_text: whether the targets are text that goes on from what the model is given, so
            that bits per byte of them mean something.
        reads_conversations: whether records are prompts with answers, in place of texts.
        file_settings: its settings that may be the path of a file, which may be moved.
    """

    family: ClassVar[str] = "objective"
    encoder_decoder: ClassVar[bool] = False
    continues_text: ClassVar[bool] = True
    reads_conversations: ClassVar[bool] = False
    file_settings: ClassVar[tuple[str, ...]] = ()

    @property
    def sees_prompt(self) -> bool:
        """Whether the tokens of a prompt see each other from both sides, in a decoder."""
        return False

    def encoder(self, tokenizer: Tokenizer) -> DocumentEncoder:
        """What makes the tokens of documents that `windows` reads: the tokenizer alone."""
        return tokenizer

    def fingerprints(self, tokenizer: Tokenizer) -> dict[str, str]:
        """Sha256 of files that it reads, by name: a run goes on with the same ones.

        Raises:
            ValueError: there is no such file, or it is of another tokenizer.
        """
        del tokenizer
        return {}

    def with_whole_paths(self) -> Self:
        """The objective with its paths from the root on, for use from another folder."""
        return self

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """What a model reads before it answers a prompt, as it was trained to: its encoder, or it.

        Raises:
            ValueError: the prompt cannot be encoded.
        """
        ids = tokenizer.encode(prompt).tolist()
        return [*ids, tokenizer.eos_id] if self.encoder_decoder else [tokenizer.bos_id, *ids]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end what a model writes."""
        return tokenizer.end_ids

    def lengths(self, sequence_length: int) -> Lengths:
        """The sizes of an example, where `data.sequence_length` is this.

        Raises:
            ValueError: examples cannot be so short.
        """
        return Lengths(window=sequence_length + 1, decoder=sequence_length)

    @property
    def settings_of_sides(self) -> tuple[str, str]:
        """The settings of how long a row is, on the encoder's side and on the decoder's."""
        return "data.sequence_length", "data.sequence_length"

    def windows(self, tokens: DomainTokens, sequence_length: int, *, keep_partial: bool) -> Windows:
        """The windows of a domain.

        Args:
            tokens: of the domain.
            sequence_length: of the data.
            keep_partial: whether tokens that fill no window at the end make a shorter one.
        """
        window = self.lengths(sequence_length).window
        return DocumentWindows(tokens, window=window, keep_partial=keep_partial)

    def arrays(self, sequence_length: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of every array of an example but its `domain`, by name."""
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
        """Makes an example of a window.

        Args:
            window: of at most `lengths(sequence_length).window` tokens.
            sequence_length: of the data.
            tokenizer: that made the tokens.
            key: of what is drawn.

        Returns:
            The arrays that `arrays(sequence_length)` lists, and `domain`, an int32 scalar. They
            keep to `check_positions`.
        """
        raise NotImplementedError

    def vocab_size(self, tokenizer: Tokenizer, sequence_length: int) -> int:
        """How many ids examples may have: the tokenizer's, and those that the objective adds.

        Raises:
            ValueError: the settings do not fit the length.
        """
        del sequence_length
        return tokenizer.vocab_size

    def token_bytes(self, tokenizer: Tokenizer, sequence_length: int) -> np.ndarray:
        """Bytes of text that each target id stands for, int32 [`vocab_size`].

        All are 0 where targets do not continue a text: bits per byte are nan then.
        """
        token_bytes_V = np.zeros(self.vocab_size(tokenizer, sequence_length), np.int32)
        if self.continues_text:
            token_bytes_V[: tokenizer.vocab_size] = tokenizer.token_bytes_V
        return token_bytes_V

    def check_model(self, model: Any) -> None:
        """Refuses a model of another kind.

        Raises:
            ValueError: it has an encoder and the objective none, or the other way round; or a
                decoder sees what it is to predict.
        """
        kind = {True: "an encoder and a decoder", False: "a decoder alone"}
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
            "the next token is no objective for a model that sees it",
            f"data.objective={kind_of(self)!r}, model.stack.causal=False",
            "Set model.stack.causal=True",
        )


def check_positions(example: Example) -> None:
    """Checks that a document stands in one piece, and that its positions grow by one.

    Kernels of attention rely on it (`Call.counts_up`).

    Raises:
        ValueError: naming the array, the document and its positions.
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
            "a document stands in one piece, and its positions grow by one",
            f"{side}positions {positions[segments == first][:8].tolist()} ... of document {first}",
            "Correct the objective",
        )
