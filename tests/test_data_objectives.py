"""Objectives of a decoder-only model, and which model accepts which objective."""

import dataclasses
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    config_dict,
    from_config_dict,
    read_config,
    to_dict,
    write_config,
)
from moe_jax.config.file import override
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.data import RawWindow, heldout_batches, objectives, open_data, tokenizers
from moe_jax.data.objectives import CausalLM, EncoderPrefixLM, PrefixLM, SpanCorruption
from moe_jax.data.objectives.objective import check_positions
from moe_jax.layers.mamba import Mamba
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.training.evaluation import DomainSums, SequenceSums
from moe_jax.training.loop import train
from moe_jax.training.loss_labels import loss_labels
from moe_jax.training.rows import evaluation_line, evaluation_row
from moe_jax.training.vocabulary import check_vocabulary
from tests.tiny_run import tiny_training

DROPLESS = loss_labels(LanguageModel())["dropless"]
TOKENIZER = tokenizers.ByteTokenizer()
OBJECTIVES = {kind: load_kind("objective", kind)() for kind in KINDS["objective"]}


def window(tokens, segment_ids, positions):
    arrays = (np.asarray(a, np.int32) for a in (tokens, segment_ids, positions))
    return RawWindow(*arrays, domain=4)


def window_of(*sizes):
    """A window of documents with these numbers of tokens, which count up from 10."""
    return window(
        np.arange(10, 10 + sum(sizes)),
        np.repeat(np.arange(1, len(sizes) + 1), sizes),
        np.concatenate([np.arange(size) for size in sizes]),
    )


def test_a_target_in_the_next_document_has_weight_zero():
    # Two documents: 10 11 12 | 20 21. The last token is only a target.
    example = objectives.causal_lm(
        window([10, 11, 12, 20, 21], [1, 1, 1, 2, 2], [0, 1, 2, 0, 1]), sequence_length=4, pad_id=0
    )
    assert example["inputs"].tolist() == [10, 11, 12, 20]
    assert example["targets"].tolist() == [11, 12, 20, 21]
    assert example["loss_weights"].tolist() == [1, 1, 0, 1]
    assert example["segment_ids"].tolist() == [1, 1, 1, 2]
    assert example["positions"].tolist() == [0, 1, 2, 0]
    assert example["domain"] == 4


def test_a_short_window_is_padded_with_segment_zero_and_weight_zero():
    example = objectives.causal_lm(
        window([10, 11, 12], [1, 1, 1], [0, 1, 2]), sequence_length=4, pad_id=9
    )
    assert example["inputs"].tolist() == [10, 11, 9, 9]
    assert example["targets"].tolist() == [11, 12, 9, 9]
    assert example["loss_weights"].tolist() == [1, 1, 0, 0]
    assert example["segment_ids"].tolist() == [1, 1, 0, 0]
    assert example["positions"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("num_tokens", [3, 5])
def test_shapes_and_types_do_not_depend_on_the_padding(num_tokens):
    ones = np.ones(num_tokens, np.int32)
    example = objectives.causal_lm(window(ones, ones, ones - 1), sequence_length=4, pad_id=0)
    weights = example.pop("loss_weights")
    domain = example.pop("domain")
    assert (weights.shape, weights.dtype) == ((4,), np.float32)
    assert (domain.shape, domain.dtype) == ((), np.int32)
    assert {(a.shape, a.dtype) for a in example.values()} == {((4,), np.dtype(np.int32))}


def prefix_lm(raw, objective, length, number=0):
    return objective.example(raw, sequence_length=length, tokenizer=TOKENIZER, key=(3, number))


def test_targets_in_the_prefix_have_weight_zero():
    half = PrefixLM(0.5, 0.5, bidirectional=True)
    # Prefixes: 10 11 12 in the first document of six tokens, 16 in the second of two.
    example = prefix_lm(window_of(6, 2), half, length=9)
    assert example["inputs"].tolist() == [10, 11, 12, 13, 14, 15, 16, 0, 0]
    assert example["targets"].tolist() == [11, 12, 13, 14, 15, 16, 17, 0, 0]
    assert example["in_prefix"].tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0]
    # Token 16 starts a document, so it is no target. Token 17 follows its prefix.
    assert example["loss_weights"].tolist() == [0, 0, 1, 1, 1, 0, 1, 0, 0]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    number=st.integers(0, 1000),
)
def test_every_document_has_one_prefix_and_something_to_predict(sizes, number):
    raw, length = window_of(*sizes), sum(sizes) + 2
    example = prefix_lm(raw, PrefixLM(bidirectional=True), length, number)
    causal = objectives.causal_lm(raw, sequence_length=length, pad_id=0)
    for name in ("inputs", "targets", "segment_ids", "positions"):
        assert np.array_equal(example[name], causal[name])
    for document, size in enumerate(sizes, 1):
        of_document = causal["segment_ids"] == document
        in_prefix = example["in_prefix"][of_document]
        weights = example["loss_weights"][of_document]
        cut = int(in_prefix.sum())
        assert in_prefix.tolist() == [1] * cut + [0] * (len(in_prefix) - cut)
        if size > 1:
            # The last token of a prefix predicts the first token after it.
            assert 1 <= cut <= size - 1
            assert weights[: size - 1].tolist() == [0] * (cut - 1) + [1] * (size - cut)
    assert not (example["loss_weights"] > causal["loss_weights"]).any()


def test_every_length_of_a_prefix_is_as_likely_as_another():
    objective = PrefixLM(bidirectional=True)
    drawn = [
        prefix_lm(window_of(5), objective, 4, number)["in_prefix"].sum() for number in range(4000)
    ]
    counts = np.bincount(drawn, minlength=5)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 1000).max() < 5 * 27.4  # 27.4: standard deviation of a count


def test_prefixes_keep_to_their_shares():
    objective = PrefixLM(0.25, 0.75, bidirectional=True)
    drawn = {prefix_lm(window_of(8), objective, 7, n)["in_prefix"].sum() for n in range(200)}
    assert drawn == {2, 3, 4, 5, 6}
    with pytest.raises(ValueError, match=r"shortest_prefix=0\.6, longest_prefix=0\.5\. Lower"):
        PrefixLM(shortest_prefix=0.6, longest_prefix=0.5)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_example_has_the_arrays_that_its_objective_lists(kind):
    objective, length = OBJECTIVES[kind], 32
    example = objective.example(
        window_of(7, 5), sequence_length=length, tokenizer=TOKENIZER, key=(0, 0)
    )
    assert example.pop("domain") == 4
    listed = objective.arrays(length)
    assert {name: (a.shape, a.dtype) for name, a in example.items()} == listed
    assert objective.encoder_decoder == ("encoder_inputs" in listed)


def test_an_objective_is_named_in_a_config_by_its_kind_alone_or_with_settings():
    for written, objective in (
        ("causal_lm", CausalLM()),
        ("prefix_lm", PrefixLM()),
        ({"kind": "prefix_lm", "longest_prefix": 0.5}, PrefixLM(longest_prefix=0.5)),
    ):
        config = from_config_dict({"data": {"objective": written}})
        assert config.data.objective == objective
        assert read_config(write_config(config), ExperimentConfig) == config
    assert DataConfig().objective == CausalLM()
    # The form of configs from when an objective was only a name.
    assert to_dict(ExperimentConfig())["data"]["objective"] == "causal_lm"
    with pytest.raises(
        ValueError, match=r"data\.objective: a kind of objective is one of \['causal"
    ):
        from_config_dict({"data": {"objective": "mlm"}})


def test_flags_name_an_objective_and_set_its_fields():
    config = config_dict(ExperimentConfig())
    override(config, "config.data.objective", "prefix_lm")
    override(config, "config.data.objective.longest_prefix", "0.5")
    assert from_config_dict(config).data.objective == PrefixLM(longest_prefix=0.5)
    with pytest.raises(ValueError, match=r"Did you mean --config\.data\.objective\.longest_prefix"):
        override(config, "config.data.objective.longest", "0.5")
    with pytest.raises(ValueError, match=r"causal_lm has no fields"):
        override(config_dict(ExperimentConfig()), "config.data.objective.longest_prefix", "0.5")


def test_a_decoder_alone_has_no_objective_of_an_encoder_and_the_other_way_round():
    decoder = LanguageModel()
    both = types.SimpleNamespace(has_encoder=True)
    for objective in OBJECTIVES.values():
        objective.check_model(both if objective.encoder_decoder else decoder)
    with pytest.raises(ValueError, match=r"'span_corruption' is for a model with an encoder and"):
        ExperimentConfig(data=DataConfig(objective=SpanCorruption()))
    with pytest.raises(ValueError, match=r"has an encoder and a decoder\. .*'span_corruption'"):
        CausalLM().check_model(both)
    sees = LanguageModel(stack=StackLayout(unit=(("attention", "moe"),), repeats=1, causal=False))
    with pytest.raises(
        ValueError, match=r"must see a bidirectional prefix.*none of \['mamba'\] does"
    ):
        PrefixLM(bidirectional=True).check_model(
            LanguageModel(parts={"mamba": Mamba()}, stack=StackLayout(unit=(("mamba",),)))
        )
    with pytest.raises(ValueError, match=r"objective='prefix_lm', model\.stack\.causal=False"):
        PrefixLM().check_model(sees)


def test_bytes_of_targets_are_counted_where_they_continue_a_text():
    for objective in (CausalLM(), PrefixLM(), EncoderPrefixLM()):
        assert np.array_equal(objective.token_bytes(TOKENIZER, 32), TOKENIZER.token_bytes_V)
    assert not SpanCorruption().token_bytes(TOKENIZER, 32).any()


def test_a_vocabulary_without_room_for_sentinels_is_refused():
    class Plain(tokenizers.ByteTokenizer):
        vocab_size, num_sentinels = 259, 0

    data = DataConfig(sequence_length=64, objective=SpanCorruption(), tokenizer="plain")

    def config(vocab_size):
        return types.SimpleNamespace(data=data, model=types.SimpleNamespace(vocab_size=vocab_size))

    check_vocabulary(config(359), Plain())
    message = (
        r"model\.vocab_size=358, 'plain' has 259, data\.objective adds 100 sentinels\. "
        r"Set model\.vocab_size=359\."
    )
    with pytest.raises(ValueError, match=message):
        check_vocabulary(config(358), Plain())


def test_bits_a_byte_are_not_said_where_targets_are_no_text():
    sums = DomainSums(("only",))
    sums.add(SequenceSums(np.array([6.0]), np.array([4.0]), np.array([0.0]), {}), np.array([0]))
    said = {"dropless": {**DROPLESS._asdict(), **sums.losses()}}
    line = evaluation_line(20, said)
    assert "1.5000 nats/token" in line and "byte" not in line and "nan" not in line
    assert evaluation_row(said) == {
        "heldout/dropless/nats_per_token": 1.5, "heldout/dropless/domain/only/nats_per_token": 1.5
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_with_prefixes_resumes_exactly(tmp_path):
    def config(num_steps):
        settings = {
            "data": {"objective": {"kind": "prefix_lm", "bidirectional": True}},
            "optimizer": {"schedule": "constant"},
            "training": {"num_steps": num_steps},
        }
        return tiny_training(settings)

    whole = train(config(6), tmp_path / "whole")
    train(config(3), tmp_path / "parts")
    assert train(config(6), tmp_path / "parts") == whole
    tokens = whole["dropless"]["tokens"]
    all_tokens = sum(
        batch["loss_weights"].sum()
        for batch in heldout_batches(
            open_data(dataclasses.replace(config(6).data, objective=CausalLM())), batch_size=4
        )
    )
    assert 0.4 < tokens / all_tokens < 0.6  # half of the targets on average


@pytest.mark.parametrize(
    ("segments", "positions", "message"),
    [
        ([1, 1, 2, 2, 0, 0], [0, 1, 0, 1, 0, 0], ""),
        ([0, 3, 3, 1, 1, 1], [9, 4, 5, 0, 1, 2], ""),  # padding anywhere; the end of a document
        ([1, 1, 1, 2, 2, 0], [0, 1, 0, 0, 1, 0], r"positions \[0, 1, 0\] \.\.\. of document 1"),
        ([1, 2, 2, 1, 1, 0], [0, 0, 1, 1, 2, 0], "in one piece.* of document 1"),
    ],
)
def test_positions_of_a_document_count_up(segments, positions, message):
    arrays = {"segment_ids": np.array(segments), "positions": np.array(positions)}
    encoder = {f"encoder_{name}": array for name, array in arrays.items()}
    for example in (arrays, arrays | encoder):
        if not message:
            check_positions(example)
            continue
        with pytest.raises(ValueError, match=message):
            check_positions(example)
