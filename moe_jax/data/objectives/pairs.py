"""Encoder-decoder objectives: pairs of encoder inputs and decoder targets, several per row."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from moe_jax.data.objectives.objective import (
    Example,
    Key,
    Lengths,
    Objective,
    generator,
)
from moe_jax.data.objectives.prefix_lm import PrefixLengths
from moe_jax.data.packed_windows import PackedText
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.windows import DomainTokens, JoinedText, RawWindow, Windows


class Pair(NamedTuple):
    """Encoder inputs and decoder targets, int32; `pack_pairs` may add the `eos_id` of both."""

    inputs: np.ndarray
    targets: np.ndarray


def pack_pairs(
    pairs: Sequence[Pair], *, lengths: Lengths, pad_id: int, eos_id: int | None, domain: int
) -> Example:
    """Puts pairs into a row, one after the other.

    Decoder inputs are the targets shifted right by one within their pair, starting with `pad_id`,
    as in T5. Both sides end with `eos_id`, a target like any other.

    Args:
        pairs: pairs that fit into the row.
        lengths: lengths of the row.
        pad_id: begins the decoder inputs of a pair, and fills the row.
        eos_id: ends every pair on both sides; None: the pairs already have their ends.
        domain: domain of the text.

    Returns:
        `encoder_inputs`, `encoder_segment_ids`, `encoder_positions`: int32 [T]; `inputs`,
        `targets`, `segment_ids`, `positions`: int32 [L]; `loss_weights`: float32 [L], 1 for every
        target except padding; `domain`: int32 scalar. A pair has the same segment number on
        both sides, from 1 on; 0 is padding.
    """
    ends = np.array([] if eos_id is None else [eos_id], np.int32)
    read = [np.append(pair.inputs, ends) for pair in pairs]
    written = [np.append(pair.targets, ends) for pair in pairs]
    shifted = [np.insert(targets[:-1], 0, pad_id) for targets in written]
    encoder, decoder = (
        {
            "segment_ids": row_of([np.full(len(a), n) for n, a in enumerate(side, 1)], length, 0),
            "positions": row_of([np.arange(len(a)) for a in side], length, 0),
        }
        for side, length in ((read, lengths.encoder), (written, lengths.decoder))
    )
    return {
        "encoder_inputs": row_of(read, lengths.encoder, pad_id),
        **{f"encoder_{name}": array for name, array in encoder.items()},
        "inputs": row_of(shifted, lengths.decoder, pad_id),
        "targets": row_of(written, lengths.decoder, pad_id),
        **decoder,
        "loss_weights": (decoder["segment_ids"] > 0).astype(np.float32),
        "domain": np.array(domain, np.int32),
    }


def row_of(arrays: Sequence[np.ndarray], length: int, filler: int) -> np.ndarray:
    """The arrays one after the other, padded with `filler`, int32 [length]."""
    row = np.full(length, filler, np.int32)
    joined = np.concatenate(arrays)
    row[: len(joined)] = joined
    return row


@dataclasses.dataclass(frozen=True)
class Pairs(Objective):
    """Predict a part of a text from another part, in an encoder-decoder.

    A window is text of documents without their `bos_id` and `eos_id`. It is cut from the joined
    documents or, if `packed`, from a single document: short pieces then share a row, and no pair
    mixes two documents.
    """

    encoder_decoder: ClassVar[bool] = True

    packed: bool = False  # several pieces of documents per row; else windows of joined documents

    def windows(self, tokens: DomainTokens, sequence_length: int, *, keep_partial: bool) -> Windows:
        """See `Objective`; a row of packed pieces may always be partly empty."""
        lengths = self.lengths(sequence_length)
        if not self.packed:
            return JoinedText(tokens, window=lengths.window, keep_partial=keep_partial)
        return PackedText(
            tokens,
            window=lengths.window,
            limits=(lengths.encoder, lengths.decoder),
            pair_lengths=self.pair_lengths,
        )

    def pair(self, tokens_N: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> Pair:
        """Cuts a text into encoder inputs and decoder targets."""
        raise NotImplementedError

    def pair_lengths(self, num_tokens: int) -> tuple[int, int]:
        """Most tokens on the encoder's side and on the decoder's, including `eos_id`."""
        raise NotImplementedError

    def example(
        self, window: RawWindow, *, sequence_length: int, tokenizer: Tokenizer, key: Key
    ) -> Example:
        """See `Objective`; `pack_pairs` describes the arrays."""
        rng = generator(key)
        starts = np.flatnonzero(np.diff(window.segment_ids)) + 1
        pieces = np.split(window.tokens, starts)
        return pack_pairs(
            [self.pair(tokens_N, tokenizer, rng) for tokens_N in pieces],
            lengths=self.lengths(sequence_length),
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            domain=window.domain,
        )


@dataclasses.dataclass(frozen=True)
class EncoderPrefixLM(PrefixLengths, Pairs):
    """Predict what follows a prefix of random length, which an encoder reads."""

    packed: bool = True  # several pieces of documents per row; else windows of joined documents

    def lengths(self, sequence_length: int) -> Lengths:
        """Both sides are as long as the window: one side may have all but one of its tokens."""
        return Lengths(window=sequence_length, decoder=sequence_length, encoder=sequence_length)

    def pair_lengths(self, num_tokens: int) -> tuple[int, int]:
        """See `Pairs`: either side has at most all but one of the tokens."""
        return num_tokens, num_tokens

    def pair(self, tokens_N: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> Pair:
        """See `Pairs`."""
        cut = self.draw_prefix(len(tokens_N), rng)
        return Pair(tokens_N[:cut], tokens_N[cut:])
