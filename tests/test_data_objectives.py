"""The causal language-modelling objective, worked by hand."""

import numpy as np
import pytest

from moe_jax.data import objectives


def window(tokens, segment_ids, positions):
    arrays = (np.asarray(a, np.int32) for a in (tokens, segment_ids, positions))
    return objectives.RawWindow(*arrays, domain=4)


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


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"one of \['causal_lm'\]: got 'causal'"):
        objectives.get_objective("causal")
