"""Prefixes seen from both sides, from a training batch to generation and scores."""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference import generate_tokens, stream_anew
from moe_jax.inference.decoding import Serving
from moe_jax.inference.draft import Draft
from moe_jax.inference.scoring import score_continuations
from moe_jax.part import Call
from moe_jax.planning.workload import resolve
from moe_jax.training.loop import train
from moe_jax.training.loss import call_of_batch
from tests.tiny_run import quick_jit, tiny_config, tiny_state

PROMPTS = [[1, 7, 9, 30, 8], [1, 4]]
LENGTH = 16


@pytest.fixture(scope="module")
def config():
    objective = {"kind": "prefix_lm", "bidirectional": True}
    model = {"stack": {"repeats": 2}, "tie_embeddings": False}
    return tiny_config({"model": model, "data": {"objective": objective}})


@pytest.fixture(scope="module")
def params(config):
    """Parameters of a confident model that relies on attention more than on the last token."""
    params = dict(tiny_state(config).params)
    attention = params["stack"]["unit"]["0"]["attention"]
    attention |= {"wo": 10 * attention["wo"], "wq": 4 * attention["wq"]}
    return {**params, "head": 10 * params["head"]}


@pytest.fixture(scope="module")
def log_probs(config, params):
    """Returns next-token log-probabilities at every position of a text with a prefix."""
    run = quick_jit(config.model.run)

    def log_probs(text, prefix):
        tokens = jnp.array([[*text, *[3] * (LENGTH - len(text))]])
        marks = jnp.arange(LENGTH)[None] < prefix
        call = Call(tokens_BL=tokens, capacity=0.0, in_prefix_BL=marks)
        logits_LV = np.asarray(run(params, call).logits_BLV[0, : len(text)], np.float64)
        return logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))

    return log_probs


@pytest.fixture(scope="module")
def answers(config, params):
    return generate_tokens(config, params, PROMPTS, 4)


def test_a_batch_says_which_tokens_are_seen_from_both_sides():
    ones = jnp.ones((1, 4), jnp.int32)
    batch = {"inputs": ones, "positions": ones, "segment_ids": ones}
    assert call_of_batch(batch).in_prefix_BL is None
    marked = call_of_batch({**batch, "in_prefix": jnp.array([[1, 1, 0, 0]])})
    assert marked.in_prefix_BL.tolist() == [[True, True, False, False]]


def test_a_token_sees_all_of_its_prefix_and_nothing_else_behind_it(log_probs):
    text = log_probs([1, 7, 9, 30, 8], 3)
    other_prefix, other_target = log_probs([1, 7, 5, 30, 8], 3), log_probs([1, 7, 9, 30, 5], 3)
    assert np.abs(other_prefix[0] - text[0]).max() > 1e-3
    np.testing.assert_allclose(other_target[:4], text[:4], atol=1e-5)
    causal = log_probs([1, 7, 9, 30, 8], 0)
    assert np.abs(causal[0] - text[0]).max() > 1e-3


def test_a_prompt_is_the_prefix_of_what_is_generated(answers, log_probs):
    differ = False
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = [*prompt, *answer]
        best = log_probs(text, len(prompt))[len(prompt) - 1 : -1]
        assert answer == best.argmax(-1).tolist()
        causal = log_probs(text, 0)[len(prompt) - 1 : -1]
        differ |= answer != causal.argmax(-1).tolist()
    assert differ, "a cache that forgot the prefix would show"


def test_reading_anew_draws_the_same(config, params, answers):
    texts = collections.defaultdict(list)
    for piece in stream_anew(config, params, PROMPTS, 4, context=LENGTH):
        texts[piece.row] += piece.tokens
    assert [texts[row] for row in range(2)] == answers


@pytest.mark.slow
@pytest.mark.parametrize("both", [True, False])
def test_a_draft_reads_a_prompt_as_it_was_trained_to(config, params, answers, both):
    """A draft that sees prompts from both sides, and a causal draft whose kernel could not."""
    model = {"stack": {"repeats": 1}, "tie_embeddings": False}
    kernel = {"parts": {"attention": {"kernel": "auto" if both else "blocks"}}}
    objective = {"kind": "prefix_lm", "bidirectional": both}
    own = tiny_config({"model": model | kernel, "data": {"objective": objective}})
    draft = Draft(own, Serving(tiny_state(own).params), length=2)
    assert generate_tokens(config, params, PROMPTS, 4, draft=draft) == answers


def test_a_kernel_that_sees_no_prefix_is_refused_before_a_run_begins(config, tmp_path):
    attention = dataclasses.replace(config.model.part["attention"], kernel="blocks")
    parts = {**config.model.part, "attention": attention}
    model = dataclasses.replace(config.model, parts=parts)
    with pytest.raises(ValueError, match="blocks': it sees no prefix from both sides"):
        resolve(dataclasses.replace(config, model=model))
    with pytest.raises(ValueError, match="blocks': it sees no prefix from both sides"):
        train(dataclasses.replace(config, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert resolve(config).config.model.part["attention"].kernel == "xla"


def test_a_context_is_the_prefix_of_a_continuation_that_is_scored(config, params, log_probs):
    pairs = [(prompt, [30, 31, 5]) for prompt in PROMPTS]
    for scored, (context, continuation) in zip(
        score_continuations(config, params, pairs, batch_size=2), pairs, strict=True
    ):
        rows = log_probs([*context, *continuation], len(context))[len(context) - 1 : -1]
        expected = rows[np.arange(3), continuation].sum()
        np.testing.assert_allclose(scored.log_likelihood, expected, rtol=1e-5)
