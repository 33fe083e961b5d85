"""Span corruption, as in `t5.data.preprocessors` (Raffel et al., arXiv:1910.10683, 3.1.4)."""

import dataclasses
from typing import ClassVar

import numpy as np

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.data.objectives.objective import Lengths
from moe_jax.data.objectives.pairs import Pair, Pairs
from moe_jax.data.tokenizer import Tokenizer


def span_counts(num_tokens: int, density: float, mean_length: float) -> tuple[int, int]:
    """The numbers of noise tokens and spans of a text, which depend only on its length.

    They equal T5's, except that T5's float32 can differ by a token from 13,000 tokens on.

    Args:
        num_tokens: tokens of the text, at least 1.
        density: share of noise tokens, in (0, 1).
        mean_length: mean tokens per noise span, at least 1.

    Returns:
        The numbers of noise tokens and noise spans, rounded half to even, at least 1 each, with a
        text token before each span; (0, 0) for a single token.
    """
    if num_tokens == 1:
        return 0, 0
    noise = min(max(round(num_tokens * density), 1), num_tokens - 1)
    spans = max(round(noise / mean_length), 1)
    return noise, min(spans, num_tokens - noise)


def random_segments(num_items: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Random lengths of at least 1 with the sum `num_items`; all such lists are equally likely.

    Returns:
        int [num_segments].
    """
    begins = np.arange(num_items - 1) < num_segments - 1
    cuts = np.flatnonzero(rng.permutation(begins)) + 1
    return np.diff(cuts, prepend=0, append=num_items)


def noise_mask(
    num_tokens: int, density: float, mean_length: float, rng: np.random.Generator
) -> np.ndarray:
    """A random mask of the noise tokens; T5's `random_spans_noise_mask`.

    Text and noise alternate, text first, in equally many spans. All masks with the numbers of
    `span_counts` are equally likely.

    Returns:
        bool [num_tokens].
    """
    noise, spans = span_counts(num_tokens, density, mean_length)
    if not noise:
        return np.zeros(num_tokens, bool)
    of_noise = random_segments(noise, spans, rng)
    of_text = random_segments(num_tokens - noise, spans, rng)
    lengths = np.stack([of_text, of_noise], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def replace_spans(tokens_N: np.ndarray, mask_N: np.ndarray, sentinel: int) -> np.ndarray:
    """Replaces each run of masked tokens by a sentinel; T5's `noise_span_to_unique_sentinel`.

    Args:
        tokens_N: int32, the text.
        mask_N: bool, the tokens to replace.
        sentinel: id for the first run; the id for each later run is one less.

    Returns:
        int32, the remaining tokens and the sentinels.
    """
    first_N = mask_N & ~np.concatenate([[False], mask_N[:-1]])
    marked_N = np.where(first_N, sentinel + 1 - np.cumsum(first_N), tokens_N)
    return marked_N[~mask_N | first_N].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Pairs):
    """Predict random spans of a text, each replaced by its own sentinel.

    For "a b c d e f" with noise at "c" and "e f", the encoder reads "a b S0 d S1 eos" and the
    decoder writes "S0 c S1 e f eos".
    """

    continues_text: ClassVar[bool] = False

    noise_density: float = setting(0.15, above=0, below=1)  # share of noise tokens
    mean_noise_span_length: float = setting(3.0, at_least=1)  # tokens
    num_sentinels: int = setting(100, at_least=1)  # ids on top of the vocabulary, counted down

    def counts(self, num_tokens: int) -> tuple[int, int]:
        """See `span_counts`."""
        return span_counts(num_tokens, self.noise_density, self.mean_noise_span_length)

    def lengths(self, sequence_length: int) -> Lengths:
        """The longest window that fits an encoder of `sequence_length`: `random_spans_helper`.

        An encoder of 512 tokens reads a window of 568, and the decoder writes 114.
        """
        window = sequence_length - 1
        while self.pair_lengths(window + 1)[0] <= sequence_length:
            window += 1
        encoder, decoder = self.pair_lengths(window)
        if self.noise_density == 0.5 and decoder > encoder:
            window -= 1  # as in T5, for a decoder as long as the encoder
        require(
            window >= 2,
            "span corruption needs data.sequence_length of at least 3",
            f"data.sequence_length={sequence_length}",
            "Raise it",
        )
        return Lengths(window, self.pair_lengths(window)[1], sequence_length)

    def pair_lengths(self, num_tokens: int) -> tuple[int, int]:
        """See `Pairs`; these lengths are exact."""
        noise, spans = self.counts(num_tokens)
        return num_tokens - noise + spans + 1, noise + max(spans, 1) + 1

    def pair(self, tokens_N: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> Pair:
        """See `Pairs`."""
        density, mean_length = self.noise_density, self.mean_noise_span_length
        mask_N = noise_mask(len(tokens_N), density, mean_length, rng)
        first = self.first_sentinel(tokenizer)
        return Pair(replace_spans(tokens_N, mask_N, first), replace_spans(tokens_N, ~mask_N, first))

    def first_sentinel(self, tokenizer: Tokenizer) -> int:
        """The id of the first sentinel, the highest of all ids.

        Sentinels that a tokenizer reserves at the end of its vocabulary count towards
        `num_sentinels`; the others follow the vocabulary.
        """
        more = max(self.num_sentinels - tokenizer.num_sentinels, 0)
        return tokenizer.vocab_size + more - 1

    def vocab_size(self, tokenizer: Tokenizer, sequence_length: int) -> int:
        """See `Objective`."""
        spans = self.counts(self.lengths(sequence_length).window)[1]
        have = max(self.num_sentinels, tokenizer.num_sentinels)
        require(
            spans <= have,
            "every span of noise in a window needs a sentinel of its own",
            f"{spans} spans at data.sequence_length={sequence_length}, {have} sentinels",
            f"Set data.objective.num_sentinels={spans}",
        )
        return self.first_sentinel(tokenizer) + 1
