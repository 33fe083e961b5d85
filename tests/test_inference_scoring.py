"""Scores of continuations: against a plain forward, in any batch, cut, and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import switch_base
from moe_jax.config import MeshConfig, from_config_dict
from moe_jax.data import open_tokenizer
from moe_jax.inference import score_continuations
from moe_jax.inference.choices import EXAMPLE, Question, choose, read_questions
from moe_jax.inference.decoding import for_inference
from moe_jax.inference.scoring import encode_pair
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, EncoderInputs
from moe_jax.training.loss_labels import SEES
from moe_jax.training.placement import state_shardings
from tests.tiny_run import quick_jit, tiny_config, tiny_state

TOKENIZER = open_tokenizer("byte")
STATE = {"moe": {"bias_E": jnp.array([[0.0, 0.3, 0.0, 0.0]])}}
# The padded lengths are 16, 16, 32 and 16.
PAIRS = [([1, 7, 9], [30, 31]), ([1], [5]), ([1, *range(20, 41)], [50, 51, 52]), ([1, 4], [9, 9])]
CLOSE = {"rtol": 1e-5}  # float32 sums in another order
ONE_LAYER = {"stack": {"repeats": 1}}
LENGTH = 32


@pytest.fixture(scope="module")
def config():
    # The capacity is so tight that its drops would show: scores are dropless.
    moe = {"capacity": {"train_factor": 0.25}, "bias": {"kind": "sign", "rate": 0.1}}
    return tiny_config({"model": {**ONE_LAYER, "tie_embeddings": False, "parts": {"moe": moe}}})


@pytest.fixture(scope="module")
def params(config):
    return tiny_state(config).params


@pytest.fixture(scope="module")
def score(config, params):
    def score(pairs=PAIRS, **settings):
        settings = {"batch_size": 1, "state": STATE, **settings}
        return score_continuations(config, params, pairs, **settings)

    return score


@pytest.fixture(scope="module")
def log_probs(config, params):
    """Returns float64 next-token log-probabilities at every position. The model sees no padding."""
    run = quick_jit(config.model.run)

    def log_probs(text):
        tokens = jnp.array([[*text, *[3] * (LENGTH - len(text))]])  # later tokens change nothing
        output = run(params, Call(tokens_BL=tokens, capacity=0.0), state=STATE)
        logits_LV = np.asarray(output.logits_BLV[0, : len(text)], np.float64)
        return logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))

    return log_probs


@pytest.fixture(scope="module")
def log_likelihood(log_probs):
    def log_likelihood(context, continuation):
        log_probs_LV = log_probs([*context, *continuation])
        first = len(context) - 1
        return sum(log_probs_LV[first + i, token] for i, token in enumerate(continuation))

    return log_likelihood


@pytest.fixture(scope="module")
def greedy(log_probs):
    def greedy(context, num_tokens, num_ids=None):
        text = list(context)
        for _ in range(num_tokens):
            text.append(int(np.argmax(log_probs(text)[-1, :num_ids])))
        return text[len(context) :]

    return greedy


def test_scores_are_sums_of_log_likelihoods_over_the_continuation(log_likelihood, score):
    for scored, pair in zip(score(), PAIRS, strict=True):
        np.testing.assert_allclose(scored.log_likelihood, log_likelihood(*pair), **CLOSE)
        assert scored.num_tokens == len(pair[1])


def test_a_likelihood_is_of_the_whole_softmax(score):
    assert score(num_ids=10)[0].log_likelihood == score()[0].log_likelihood


def test_a_score_does_not_depend_on_its_batch(score):
    together = score(batch_size=4)
    for alone in (score(), score(PAIRS[::-1], batch_size=4)[::-1]):
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, rtol=1e-6)
            assert one[1:] == other[1:]


def test_greedy_is_what_greedy_decoding_gives(greedy, score):
    answer = greedy([1, 7, 9], 4)
    other = [*answer[:3], (answer[3] + 1) % 384]
    right, all_but_the_last = score([([1, 7, 9], answer), ([1, 7, 9], other)])
    assert right.is_greedy and not all_but_the_last.is_greedy
    few = max(answer)  # decoding may no longer draw this id
    other = greedy([1, 7, 9], 4, few)
    assert other != answer and score([([1, 7, 9], other)], num_ids=few)[0].is_greedy
    assert not score([([1, 7, 9], other)])[0].is_greedy


def test_a_long_context_is_cut_from_the_left(score):
    """Eight tokens are read: the last nine of 25, without the final one."""
    context, continuation = PAIRS[2]
    [cut] = score([PAIRS[2]], context=8)
    [same] = score([(context[-6:], continuation)])
    np.testing.assert_allclose(cut.log_likelihood, same.log_likelihood, rtol=1e-6)
    [whole] = score([PAIRS[2]], context=24)
    assert whole == score([PAIRS[2]])[0] != cut


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ([([], [1])], {}, "context must have at least one token: the context of pair 0 .*bos_id"),
        ([([1], [2]), ([1], [])], {}, r"the continuation of pair 1 has none\. Leave the pair out"),
        ([([1], [384])], {}, r"0\.\.383, .*: the continuation of pair 0 has 384"),
        ([([1], [2, 3, 4])], {"context": 2}, "pair 0 has 3, context=2"),
        ([([1], [2])], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, pairs, settings, message):
    with pytest.raises(ValueError, match=message):
        score(pairs, **settings)


def test_a_model_that_looks_ahead_is_scored_in_its_window_and_marked():
    stack = {"repeats": 1, "allow_lookahead": True}
    router = {"kind": "expert_choice"}
    config = tiny_config({"model": {"stack": stack, "parts": {"moe": {"router": router}}}})
    params = tiny_state(config).params
    with pytest.raises(ValueError, match="context=None"):
        score_continuations(config, params, PAIRS[:1])
    settings = {"context": 16, "batch_size": 2}
    alone, beside = (
        score_continuations(config, params, pairs, **settings)[0]
        for pairs in ([PAIRS[0], PAIRS[0]], [PAIRS[0], PAIRS[2]])
    )
    np.testing.assert_allclose(alone.log_likelihood, beside.log_likelihood, rtol=1e-6)
    found = choose(config, params, [Question("a", ("b", "c"), 0)], batch_size=2)
    assert found["mark"] == SEES


@pytest.mark.slow
def test_an_encoder_decoder_reads_the_context_and_writes_the_continuation():
    """Scores equal those of a forward pass without padding, and so do choices."""
    smoke = switch_base.get_config("smoke")
    smoke.model.compute_dtype = "float32"
    config = from_config_dict(smoke)
    params = init_parameters(jax.random.key(3), config.model.specs())
    run = quick_jit(for_inference(config.model).run)

    def expected(context, continuation):
        tokens = jnp.array([[TOKENIZER.pad_id, *continuation[:-1]]])
        encoder = EncoderInputs(jnp.array([context]))
        logits_LV = run(params, Call(tokens_BL=tokens, encoder=encoder, capacity=0.0)).logits_BLV[0]
        chosen = jax.nn.log_softmax(logits_LV)[jnp.arange(len(continuation)), continuation]
        return float(chosen.sum()), bool((logits_LV.argmax(-1) == jnp.array(continuation)).all())

    how = {"start_token": TOKENIZER.pad_id, "batch_size": 2}
    for scored, pair in zip(score_continuations(config, params, PAIRS, **how), PAIRS, strict=True):
        likely, greedy = expected(*pair)
        np.testing.assert_allclose(scored.log_likelihood, likely, rtol=1e-4)
        assert scored[1:] == (len(pair[1]), greedy)
    [cut] = score_continuations(config, params, [PAIRS[2]], context=8, **how)
    np.testing.assert_allclose(
        cut.log_likelihood, expected(PAIRS[2][0][-8:], PAIRS[2][1])[0], rtol=1e-4
    )
    [record] = choose(config, params, [Question("ab ", ("cd", "e"), 0)])["questions"]
    read = [*TOKENIZER.encode("ab").tolist(), TOKENIZER.eos_id]
    for likely, choice in zip(record["log_likelihoods"], (" cd", " e"), strict=True):
        written = TOKENIZER.encode(choice).tolist()
        np.testing.assert_allclose(likely, expected(read, written)[0], rtol=1e-4)


@pytest.mark.slow
def test_slots_of_soft_moe_are_those_of_training():
    """The window has two groups of eight tokens. Other texts in the batch change nothing."""
    soft = {"router": {"kind": "soft"}, "group_size": 8, "capacity": {"train_factor": 1.0}}
    stack = {"repeats": 1, "allow_lookahead": True}
    config = tiny_config({"model": {"stack": stack, "parts": {"moe": soft}}})
    params = tiny_state(config).params
    settings = {"context": 16, "batch_size": 4}
    together = score_continuations(config, params, PAIRS, **settings)
    other = score_continuations(config, params, PAIRS[::-1], **settings)[::-1]
    for one, same in zip(together, other, strict=True):
        np.testing.assert_allclose(one.log_likelihood, same.log_likelihood, rtol=1e-6)
    with pytest.raises(ValueError, match=r"context=12, moe\.group_size=8"):
        score_continuations(config, params, PAIRS, context=12)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"scan_layers": True, "remat": "full"}], ids=str)
def test_scores_on_a_mesh_and_under_scan(settings):
    """Three texts in four rows are split over two devices on each axis."""
    config = tiny_config({"model": settings})
    params = tiny_state(config).params
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    placed = jax.device_put(params, state_shardings(config, mesh).params)
    alone = score_continuations(config, params, PAIRS[:3])
    for one, same in zip(alone, score_continuations(config, placed, PAIRS[:3]), strict=True):
        np.testing.assert_allclose(one.log_likelihood, same.log_likelihood, **CLOSE)
        assert one[1:] == same[1:]


def test_a_pair_is_encoded_as_a_whole_and_spaces_go_to_the_continuation():
    def ids(text):
        return TOKENIZER.encode(text).tolist()

    assert encode_pair(TOKENIZER, "a  ", "b") == ([1, *ids("a")], ids("  b"))
    assert encode_pair(TOKENIZER, "", " b") == ([1], ids(" b"))
    assert encode_pair(TOKENIZER, "a", " b", bos=False) == (ids("a"), ids(" b"))


def test_choices_by_hand(config, params, log_likelihood):
    """The accuracy of three questions, from log-likelihoods added up here."""
    questions = [
        Question("The sky is", ("blue", "an apple"), 0),
        Question("Two and two ", ("are four", "is"), 1),
        Question("", ("a", "bb"), 1),
    ]
    texts = [
        ("The sky is", " blue"), ("The sky is", " an apple"),
        ("Two and two", " are four"), ("Two and two", " is"), ("", "a"), ("", "bb"),
    ]  # fmt: skip
    likely = [log_likelihood(*encode_pair(TOKENIZER, *text)) for text in texts]
    found = choose(config, params, questions, state=STATE, batch_size=1, context=LENGTH)
    right = right_per_byte = 0
    for i, (one, said) in enumerate(zip(questions, found["questions"], strict=True)):
        own = np.array(likely[2 * i : 2 * i + 2])
        np.testing.assert_allclose(said["log_likelihoods"], own, **CLOSE)
        per_byte = own / [len(choice.encode()) for choice in one.choices]
        assert said["chosen"] == own.argmax() and said["chosen_per_byte"] == per_byte.argmax()
        right += own.argmax() == one.answer
        right_per_byte += per_byte.argmax() == one.answer
    assert found["accuracy"] == right / 3 and found["accuracy_per_byte"] == right_per_byte / 3
    assert right != right_per_byte, "short choices are not the same by bytes"
    assert found["label"] == "dropless" and found["mark"] == ""


def test_a_choice_that_is_longer_than_what_is_read_is_named(config, params):
    questions = [Question("a", ("b", "c"), 0), Question("a", ("b", "ccc"), 0)]
    with pytest.raises(ValueError, match="'ccc' of question 2 has 4, context=3"):
        choose(config, params, questions, context=3)


def test_questions_are_read_from_lines_and_bad_ones_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{EXAMPLE}\n\n" + EXAMPLE.replace("}", ', "id": 7}'))
    assert read_questions(str(path)) == [Question("The sky is", ("blue", "an apple"), 0)] * 2
    good = json.loads(EXAMPLE)
    bad = [
        {"answer": 2}, {"answer": -1}, {"answer": True}, {"answer": "0"}, {"choices": ["blue"]},
        {"choices": "blue"}, {"choices": ["a", ""]}, {"choices": ["a", 1]}, {"question": None},
    ]  # fmt: skip
    lines = [*(json.dumps(good | change) for change in bad), "{", "[]", "7"]
    for line in lines:
        path.write_text(f"{EXAMPLE}\n{line}\n")
        with pytest.raises(ValueError, match=r"questions\.jsonl line 2 is"):
            read_questions(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="is blank"):
        read_questions(str(path))
