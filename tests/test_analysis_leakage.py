"""Which models see later tokens, and how much three futures of the same text change the loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis.leakage import compare_futures, score_cut
from moe_jax.data import heldout_batches, open_data, open_tokenizer
from moe_jax.training.loss import call_of_batch, target_nats
from tests.tiny_run import quick_jit, tiny_state, tiny_training

CUT = 6


def make(queue="token_major", **moe):
    """A model of tight capacity, with its parameters."""
    settings = {"bias": None, "capacity": {"queue": queue}, **moe}
    stack = {"allow_lookahead": True}
    config = tiny_training({"model": {"parts": {"moe": settings}, "stack": stack}})
    return config, tiny_state(config).params


def batch_of(config):
    batch = next(iter(heldout_batches(open_data(config.data), batch_size=4, max_batches=1)))
    return {name: jnp.asarray(value) for name, value in batch.items() if name != "domain"}


@pytest.fixture(scope="module")
def causal():
    return make()


def test_the_future_is_nothing_to_a_token_major_queue(causal):
    config, params = causal
    said = compare_futures(params, None, config, capacity=0.5, cuts=(2, 9), num_sequences=8)
    assert said.moved == 0
    assert said.teacher_forced == said.prefix_by_prefix == said.other_future
    assert said.num_targets > 8


def test_the_loss_is_that_of_a_text_that_ends_there(causal):
    """A causal dropless model gives the same loss whether padding or nothing follows a token."""
    config, params = causal
    batch = batch_of(config)
    said = score_cut(params, None, batch, CUT, model=config.model, capacity=0.0)
    cut = {name: value[:, : CUT + 1] for name, value in batch.items()}
    call = call_of_batch(cut, capacity=0.0)
    output = quick_jit(lambda params: config.model.run(params, call))(params)
    expected_B = target_nats(output.logits_BLV, cut["targets"])[:, -1]
    for nats_B in said.nats_3B:
        np.testing.assert_allclose(nats_B, expected_B, rtol=1e-5)


@pytest.mark.parametrize(
    ("queue", "kind"),
    [
        pytest.param("choice_major", "token_choice", marks=pytest.mark.slow),
        ("token_major", "expert_choice"),
    ],
)
def test_the_future_moves_what_looks_ahead(queue, kind):
    config, params = make(queue, router={"kind": kind})
    said = compare_futures(params, None, config, capacity=0.5, cuts=(2, 9), num_sequences=8)
    assert said.moved > 0.01
    assert said.prefix_by_prefix != said.teacher_forced != said.other_future


def test_bits_are_those_of_the_scored_targets(causal):
    config, params = causal
    said = compare_futures(params, None, config, capacity=0.0, cuts=(CUT,), num_sequences=4)
    batch = batch_of(config)
    nats_B = score_cut(params, None, batch, CUT, model=config.model, capacity=0.0).nats_3B[0]
    weight_B = batch["loss_weights"][:, CUT]
    num_bytes = open_tokenizer("byte").token_bytes_V[batch["targets"][:, CUT]] @ weight_B
    bits = float(nats_B @ weight_B) / num_bytes / np.log(2)
    np.testing.assert_allclose(said.teacher_forced, bits, rtol=1e-5)
    assert said.num_targets == weight_B.sum()


@pytest.mark.parametrize("number", [0, 1])
def test_one_sequence_has_no_other_future(number):
    with pytest.raises(ValueError, match=f"at least two sequences: num_sequences={number}"):
        compare_futures(None, None, tiny_training(), capacity=1.0, cuts=(2,), num_sequences=number)


@pytest.mark.parametrize(
    ("cuts", "settings", "says"),
    [
        ((15,), {}, r"from 0 to 14: got \[15\]"),
        ((), {}, "places with a token after them"),
        ((2,), {"model": {"parts": {"moe": {"group_size": 32}}}}, "moe.group_size=32"),
    ],
)
def test_what_cannot_be_asked_is_refused(cuts, settings, says):
    config = tiny_training(settings)
    with pytest.raises(ValueError, match=says):
        compare_futures(None, None, config, capacity=1.0, cuts=cuts, num_sequences=4)
