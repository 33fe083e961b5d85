"""Span corruption and its pairs: T5's definition, and the window restored from a pair."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import RawWindow, tokenizers
from moe_jax.data.objectives import EncoderPrefixLM, Lengths, SpanCorruption
from moe_jax.data.objectives.objective import generator
from moe_jax.data.objectives.pairs import Pair, pack_pairs
from moe_jax.data.objectives.span_corruption import noise_mask, replace_spans, span_counts

TOKENIZER = tokenizers.ByteTokenizer()
EOS = TOKENIZER.eos_id
FIRST = 383  # the first sentinel
# T5 treats a density of one half as a special case.
DENSITIES = st.floats(0.05, 0.9).filter(lambda density: density != 0.5)
MEANS = st.floats(1, 20)


def test_spans_become_sentinels_counted_down():
    # The example of test_noise_span_to_unique_sentinel in t5/data/preprocessors_test.py.
    tokens, mask = np.arange(10, 16), np.array([True, True, False, False, True, False])
    assert replace_spans(tokens, mask, 999).tolist() == [999, 12, 13, 998, 15]
    assert replace_spans(tokens, ~mask, 999).tolist() == [10, 11, 999, 14, 998]


@pytest.mark.parametrize(
    ("length", "density", "mean", "window", "decoder"),
    [(512, 0.15, 3.0, 568, 114), (1024, 0.15, 20.0, 1193, 189)],  # T5's and ByT5's
)
def test_lengths_are_those_of_t5(length, density, mean, window, decoder):
    objective = SpanCorruption(noise_density=density, mean_noise_span_length=mean)
    assert objective.lengths(length) == Lengths(window, decoder, length)


@given(length=st.integers(16, 700), density=DENSITIES, mean=MEANS)
@settings(max_examples=50)
def test_the_window_is_the_longest_that_fits(length, density, mean):
    objective = SpanCorruption(noise_density=density, mean_noise_span_length=mean)
    window = objective.lengths(length).window
    assert objective.pair_lengths(window)[0] <= length
    assert objective.pair_lengths(window + 1)[0] > length


def test_half_of_the_tokens_as_noise_makes_both_sides_as_long():
    even = SpanCorruption(noise_density=0.5).lengths(512)
    # 767 tokens would have 384 of noise in 128 spans. T5 takes one less, for 512 on both sides.
    assert even == Lengths(766, 512, 512)


def spans_of(mask):
    return [(value, len(list(run))) for value, run in itertools.groupby(mask.tolist())]


@given(num_tokens=st.integers(2, 600), density=DENSITIES, mean=MEANS, number=st.integers(0, 99))
def test_a_mask_has_exactly_the_noise_of_the_definition(num_tokens, density, mean, number):
    mask = noise_mask(num_tokens, density, mean, generator((0, number)))
    noise = min(max(round(num_tokens * density), 1), num_tokens - 1)
    spans = min(max(round(noise / mean), 1), num_tokens - noise)
    assert mask.sum() == noise
    runs = spans_of(mask)
    assert [value for value, _ in runs] == [False, True] * spans


@pytest.mark.parametrize(("num_tokens", "noise", "spans"), [(568, 85, 28), (10, 2, 1), (30, 4, 1)])
def test_noise_is_rounded_half_to_even(num_tokens, noise, spans):
    # 568 * 0.15 = 85.2 and 85 / 3 = 28.3; 10 * 0.15 = 1.5; 30 * 0.15 = 4.5.
    assert span_counts(num_tokens, 0.15, 3.0) == (noise, spans)


def test_all_masks_of_these_numbers_are_equally_likely():
    # Two spans cover 3 of 8 tokens: 2 ways to cut the noise, 4 to cut the text.
    drawn = collections.Counter(
        tuple(noise_mask(8, 0.4, 1.5, generator((1, number))).tolist()) for number in range(8000)
    )
    assert len(drawn) == 8
    deviation = math.sqrt(8000 * (1 / 8) * (7 / 8))
    assert max(abs(count - 1000) for count in drawn.values()) < 5 * deviation


def test_spans_are_three_tokens_on_average_and_of_many_lengths():
    masks = [noise_mask(568, 0.15, 3.0, generator((2, number))) for number in range(200)]
    lengths = [length for mask in masks for value, length in spans_of(mask) if value]
    assert np.mean(lengths) == 85 / 28
    assert {1, 2, 3, 4, 5, 6, 7, 8} <= set(lengths)
    assert np.mean([mask.mean() for mask in masks]) == pytest.approx(85 / 568)


def window(*sizes):
    """Texts of these lengths. Every token is unique and differs from all other ids."""
    return RawWindow(
        np.arange(1000, 1000 + sum(sizes), dtype=np.int32),
        np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
        np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        domain=2,
    )


def example_of(objective, raw, length, number=0):
    return objective.example(raw, sequence_length=length, tokenizer=TOKENIZER, key=(5, number))


def pieces_of(example):
    """Inputs and targets by segment, without end tokens; checks shift and positions."""
    pieces = []
    for segment in range(1, example["segment_ids"].max() + 1):
        of_encoder = example["encoder_segment_ids"] == segment
        of_decoder = example["segment_ids"] == segment
        read, written = example["encoder_inputs"][of_encoder], example["targets"][of_decoder]
        assert read[-1] == written[-1] == EOS
        shifted = example["inputs"][of_decoder]
        assert shifted.tolist() == [TOKENIZER.pad_id, *written[:-1]]
        assert example["positions"][of_decoder].tolist() == list(range(len(written)))
        assert example["encoder_positions"][of_encoder].tolist() == list(range(len(read)))
        pieces.append((read[:-1].tolist(), written[:-1].tolist()))
    return pieces


def restored(read, written):
    """The original text: targets replace the sentinels of the input."""
    spans = {}
    for token in written:
        if token <= FIRST:
            assert token not in spans
            spans[token], last = [], token
        else:
            spans[last].append(token)
    assert list(spans) == [FIRST - n for n in range(len(spans))]
    assert [token for token in read if token <= FIRST] == list(spans)
    return [token for read_token in read for token in spans.get(read_token, [read_token])]


@given(size=st.integers(2, 150), density=DENSITIES, mean=MEANS, number=st.integers(0, 10**6))
def test_inputs_and_targets_together_are_the_window(size, density, mean, number):
    objective = SpanCorruption(noise_density=density, mean_noise_span_length=mean)
    raw = window(size)
    length = max(objective.pair_lengths(size)[0], 16)
    example = example_of(objective, raw, length, number)
    ((read, written),) = pieces_of(example)
    assert restored(read, written) == raw.tokens.tolist()
    assert (len(read) + 1, len(written) + 1) == objective.pair_lengths(size)


def test_a_span_that_is_lost_is_found():
    example = example_of(SpanCorruption(), window(120), 128)
    ((read, written),) = pieces_of(example)
    assert restored(read, written) == window(120).tokens.tolist()
    assert restored(read, written[:-1]) != window(120).tokens.tolist()
    with pytest.raises((AssertionError, KeyError)):
        restored(read, [FIRST - 1, *written[1:]])


def test_a_whole_window_fills_the_encoder_and_the_decoder():
    objective = SpanCorruption()
    example = example_of(objective, window(568), 512)
    assert (example["encoder_segment_ids"] == 1).all() and (example["segment_ids"] == 1).all()
    assert example["loss_weights"].tolist() == [1] * 114


def test_a_single_token_is_read_and_not_noise():
    example = example_of(SpanCorruption(), window(1), 16)
    assert pieces_of(example) == [([1000], [FIRST])]


@given(sizes=st.lists(st.integers(2, 12), min_size=1, max_size=6), number=st.integers(0, 999))
def test_packed_texts_are_pairs_of_their_own_on_both_sides(sizes, number):
    objective, raw = SpanCorruption(packed=True), window(*sizes)
    example = example_of(objective, raw, 128, number)
    pieces = pieces_of(example)
    texts = [raw.tokens[raw.segment_ids == n].tolist() for n in range(1, len(sizes) + 1)]
    assert [restored(read, written) for read, written in pieces] == texts
    assert example["loss_weights"].tolist() == (example["segment_ids"] > 0).tolist()


@given(size=st.integers(1, 40), number=st.integers(0, 999))
def test_a_prefix_and_the_rest_are_the_window(size, number):
    raw = window(size)
    ((read, written),) = pieces_of(example_of(EncoderPrefixLM(), raw, 40, number))
    assert read + written == raw.tokens.tolist()
    assert len(written) >= 1 and (len(read) >= 1 or size == 1)


def test_a_row_of_pairs_by_hand():
    example = pack_pairs(
        [Pair(np.array([7, 8]), np.array([9])), Pair(np.array([5]), np.array([6, 4]))],
        lengths=Lengths(0, decoder=6, encoder=7), pad_id=0, eos_id=1, domain=3,
    )  # fmt: skip
    assert {name: array.tolist() for name, array in example.items()} == {
        "encoder_inputs": [7, 8, 1, 5, 1, 0, 0],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 0, 0],
        "encoder_positions": [0, 1, 2, 0, 1, 0, 0],
        "inputs": [0, 9, 0, 6, 4, 0],
        "targets": [9, 1, 6, 4, 1, 0],
        "segment_ids": [1, 1, 2, 2, 2, 0],
        "positions": [0, 1, 0, 1, 2, 0],
        "loss_weights": [1, 1, 1, 1, 1, 0],
        "domain": 3,
    }


class Plain(tokenizers.ByteTokenizer):
    """A tokenizer of 259 ids without sentinels."""

    vocab_size = 259
    num_sentinels = 0


def test_sentinels_are_the_tokenizers_own_or_come_after_its_ids():
    objective = SpanCorruption()
    # The byte tokenizer reserves 125 of its 384 ids for sentinels, more than 100.
    assert objective.vocab_size(TOKENIZER, 512) == 384
    assert SpanCorruption(num_sentinels=130).vocab_size(TOKENIZER, 512) == 389
    assert objective.vocab_size(Plain(), 512) == 359
    assert objective.first_sentinel(Plain()) == 358


def test_more_spans_than_sentinels_are_refused():
    message = (
        r"every span of noise in a window needs a sentinel of its own: 227 spans at "
        r"data\.sequence_length=4096, 125 sentinels\. Set data\.objective\.num_sentinels=227\."
    )
    with pytest.raises(ValueError, match=message):
        SpanCorruption().vocab_size(TOKENIZER, 4096)
    assert SpanCorruption(num_sentinels=227).vocab_size(TOKENIZER, 4096) == 259 + 227
    with pytest.raises(ValueError, match=r"needs data\.sequence_length of at least 3"):
        SpanCorruption().lengths(2)
