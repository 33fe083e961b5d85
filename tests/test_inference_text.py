"""Texts: greedy against a teacher-forced forward, seeds, contexts, ends, streams, errors."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import open_tokenizer, train_tokenizer
from moe_jax.data.corpora import open_corpus
from moe_jax.data.objectives.span_corruption import SpanCorruption
from moe_jax.inference import anew, continue_text, stream_text, writer
from moe_jax.inference import text as text_module
from moe_jax.inference.text import Text, stream_encoded
from moe_jax.inference.writer import Piece
from moe_jax.layers.attention import Attention
from moe_jax.models.layer import Layer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.part import Call
from tests.tiny_run import quick_jit, tiny_config, tiny_state

TOKENIZER = open_tokenizer("byte")
BIAS = {"kind": "sign", "rate": 0.1}
STATE = {"moe": {"bias_E": jnp.array([[0.0, 0.3, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0]])}}


@pytest.fixture(scope="module")
def config():
    # The capacity is so tight that its drops would show: generation is dropless.
    moe = {"capacity": {"train_factor": 0.25}, "bias": BIAS}
    return tiny_config({"model": {"tie_embeddings": False, "parts": {"moe": moe}}})


@pytest.fixture(scope="module")
def params(config):
    """Parameters of a model that writes small letters: all other logits are 0."""
    params = dict(tiny_state(config).params)
    letters = TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz")
    is_letter = np.isin(np.arange(params["head"].shape[1]), letters)
    params["head"] = jnp.where(is_letter, 40 * params["head"], 0)
    return params


def sample(params, config, prompt, **settings):
    return continue_text(params, STATE, config, prompt, **{"num_tokens": 8, **settings})


def test_greedy_is_the_argmax_of_a_teacher_forced_forward(params, config):
    text = sample(params, config, "ab", temperature=0.0)
    assert len(text) == 8 and len(set(text)) > 2
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("ab" + text).tolist()]
    call = Call(tokens_BL=jnp.array([ids]), capacity=0.0)
    output = quick_jit(config.model.run)(params, call, state=STATE)
    likeliest = np.argmax(output.logits_BLV[0], axis=-1)
    np.testing.assert_array_equal(likeliest[2:-1], ids[3:])


def test_a_model_of_spans_writes_its_sentinels_and_they_are_no_text(params, config, monkeypatch):
    """With 200 sentinels, of which the byte tokenizer reserves 125, ids go up to 384 + 75 - 1."""
    data = SimpleNamespace(objective=SpanCorruption(num_sentinels=200), sequence_length=16)
    config, asked = SimpleNamespace(model=config.model, data=data), {}

    def write(*arguments, **settings):
        asked.update(settings)
        yield Piece(0, [458, *TOKENIZER.encode("ab").tolist(), 457], True)

    monkeypatch.setattr(text_module, "stream_tokens", write)
    [piece] = stream_encoded(config, params, [[1]], 4, tokenizer=TOKENIZER, state=STATE)
    assert asked["num_ids"] == 459 and (piece.text, piece.num_tokens) == ("ab", 4)


def test_the_router_bias_is_used(params, config):
    steered = {"moe": {"bias_E": 10.0 * jax.nn.one_hot(jnp.array([1, 3]), 4)}}
    other = continue_text(params, steered, config, "ab", num_tokens=8, temperature=0.0)
    assert other != sample(params, config, "ab", temperature=0.0)


def test_equal_seeds_give_equal_texts_and_others_others(params, config):
    texts = [sample(params, config, "ab", temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 2, "every token has its own draw"


def test_a_low_temperature_is_greedy(params, config):
    greedy = sample(params, config, "ab", temperature=0.0)
    assert sample(params, config, "ab", temperature=1e-4, seed=5) == greedy


def test_of_a_long_prompt_the_last_window_is_seen(params, config):
    """16 tokens: texts with the same last 16 bytes continue alike."""
    end = "the quick brown "
    assert len(end) == config.data.sequence_length
    settings = {"temperature": 0.0, "num_tokens": 4}
    once = sample(params, config, "x" * 40 + end, **settings)
    assert once == sample(params, config, "something else" + end, **settings)
    assert len(once) == 4


@pytest.mark.parametrize(
    ("prompts", "stop", "message"),
    [
        ("ab", (), r"prompts must be a list of strings: prompts='ab'\. Pass prompts=\['ab'\]"),
        (["ab"], "END", r"stop must be a list of strings: .*Pass stop=\['END'\]"),
    ],
)
def test_one_string_is_no_list(params, config, prompts, stop, message):
    with pytest.raises(ValueError, match=message):
        next(stream_text(config, params, prompts, 2, stop=stop))


@pytest.mark.parametrize("prompt", ["", "ab", "0123456789abcde", "0123456789abcdef"])
def test_what_the_model_is_shown(params, config, monkeypatch, prompt):
    """It sees the start of a document and the prompt, cut to the last 16 tokens."""
    shown = []

    def prefill(serving, prompts, **kwargs):
        shown.append(prompts.tokens_BL[prompts.segments_BL > 0].tolist())
        assert prompts.tokens_BL.shape == (1, 16)
        return actual(serving, prompts, **kwargs)

    actual = writer.prefill
    monkeypatch.setattr(writer, "prefill", prefill)
    sample(params, config, prompt, num_tokens=1)
    assert shown == [[TOKENIZER.bos_id, *TOKENIZER.encode(prompt).tolist()][-16:]]


def test_a_text_that_outgrows_the_context_goes_on_from_its_last_half(params, config, monkeypatch):
    """Of 16 tokens, 15 are read first. The last token drawn in this context also sees the 16th."""
    shown = []

    def prefill(serving, prompts, **kwargs):
        shown.append(prompts.tokens_BL[prompts.segments_BL > 0].tolist())
        return actual(serving, prompts, **kwargs)

    actual = writer.prefill
    monkeypatch.setattr(writer, "prefill", prefill)
    text = sample(params, config, "0123456789abcd", num_tokens=12, temperature=0.0)
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("0123456789abcd" + text).tolist()]
    assert shown == [ids[:15], ids[9:17], ids[18:26]]


def test_a_text_longer_than_the_window_goes_on(params, config):
    assert len(sample(params, config, "", num_tokens=40, temperature=0.0)) == 40


def test_the_end_of_a_document_ends_the_text(params, config):
    """The head draws the end of a document in place of one letter."""
    text = sample(params, config, "ab", temperature=0.0)
    third = TOKENIZER.encode(text[2])[0]
    ends = {**params, "head": params["head"].at[:, TOKENIZER.eos_id].set(params["head"][:, third])}
    ends["head"] = ends["head"].at[:, third].set(0)
    assert sample(ends, config, "ab", temperature=0.0) == text[: text.index(text[2])]


def test_a_stop_string_ends_the_text_and_is_left_out(params, config):
    text = sample(params, config, "ab", temperature=0.0)
    stop = text[3:5]
    assert "".join(pieces_of(params, config, stop=[stop, "@"])) == text[: text.index(stop)]


def pieces_of(params, config, **settings):
    settings = {"state": STATE, "num_tokens": 8, "prompts": ["ab"], **settings}
    return [piece.text for piece in stream_text(config, params, **settings)]


class Letters:
    """A tokenizer whose ids are bytes of UTF-8."""

    vocab_size = 256

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("stop", "tokens", "shown"),
    [
        ((), ["a", "b"], ["a", "b"]),
        ((), ["caf\xc3", "\xa9!"], ["caf", "é!"]),  # half a character is held back
        (("END",), ["xE", "N", "yE"], ["x", "", "ENy"]),  # a possible stop string is held back
        (("END",), ["xE", "ND more"], ["x", ""]),
        (("b", "ab"), ["ab"], [""]),
    ],
)
def test_what_of_a_text_can_be_shown(stop, tokens, shown):
    text = Text(Letters(), stop, num_tokens=100)
    assert [text.add(list(t.encode("latin-1")), ended=False)[0] for t in tokens] == shown


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_tokens_behind_a_stop_string_do_not_count(chunk, monkeypatch):
    """A model writes whole chunks; what it wrote behind the string is no part of the answer."""
    ids, prompt = TOKENIZER.encode("xEND and more tx").tolist(), [1, 2]

    def stream(config, params, prompts, num_tokens, **settings):
        for at in range(0, len(ids), chunk):
            # Routes are of the tokens read: those of the prompt, then all but the newest.
            begin, end = (at + len(prompt) - 1) * (at > 0), at + chunk + len(prompt) - 1
            yield Piece(0, ids[at : at + chunk], False, np.arange(begin, end)[:, None, None])

    monkeypatch.setattr("moe_jax.inference.text.stream_tokens", stream)
    pieces = [*stream_encoded(tiny_config(), {}, [prompt], 16, tokenizer=TOKENIZER, stop=["END"])]
    assert "".join(piece.text for piece in pieces) == "x" and pieces[-1].ended
    tokens = [token for piece in pieces for token in piece.tokens]
    assert TOKENIZER.decode(tokens) == "xEND" and len(tokens) == 4
    assert sum(piece.num_tokens for piece in pieces) == 4
    routes = np.concatenate([piece.routes for piece in pieces])[:, 0, 0]
    read = range(len(prompt) + 4)
    assert routes.tolist() == list(read)[: len(routes)] and len(routes) >= len(read) - 1


def test_the_last_piece_keeps_nothing_back():
    text = Text(Letters(), ("END",), num_tokens=3)
    assert [text.add(list(t.encode()), ended=False)[0] for t in ("x", "EN")] == ["x", "EN"]


def test_nothing_is_added_when_nothing_is_asked_for(params, config):
    assert sample(params, config, "ab", num_tokens=0) == ""


@pytest.mark.parametrize("group_size", [8, 64])
def test_groups_do_not_matter(params, config, group_size):
    """Groups of half a window and of four windows: generation has one sequence, and is dropless."""
    moe = {"group_size": group_size, "bias": BIAS}
    other = tiny_config({"model": {"tie_embeddings": False, "parts": {"moe": moe}}})
    expected = sample(params, config, "ab", temperature=0.0)
    assert sample(params, other, "ab", temperature=0.0) == expected


def test_groups_are_of_the_window_unless_the_router_has_learned_those_of_training():
    def model_of(**moe):
        stack = {"allow_lookahead": True}
        return tiny_config({"model": {"parts": {"moe": moe}, "stack": stack}}).model

    soft = model_of(router="soft", run_experts="auto", group_size=8)
    assert anew.in_groups_of(16, soft) == soft
    # Parameters may have the shapes of another group size without belonging to it.
    same_shapes = model_of(router="soft", run_experts="auto", group_size=8, capacity={"slots": 2})
    assert anew.in_groups_of(16, same_shapes) == same_shapes
    choice = model_of(router="expert_choice", group_size=8)
    assert anew.in_groups_of(16, choice).moe_parts["moe"].group_size == 16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, r"temperature lies in \[0, inf\): temperature=-0\.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"num_tokens": -1}, "num_tokens must be at least 0: num_tokens=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"top_p": 0.0}, r"top_p lies in \(0, 1\]: top_p=0\.0"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"context": 1}, "context must be at least 2"),
        ({"stop": [""]}, "a stop string must not be empty"),
    ],
)
def test_settings_out_of_range_are_refused(params, config, wrong, message):
    with pytest.raises(ValueError, match=message):
        pieces_of(params, config, **wrong)


def test_a_model_that_is_read_anew_has_no_capacity():
    moe = {"router": "soft", "run_experts": "auto", "group_size": 8}
    soft = tiny_config({"model": {"parts": {"moe": moe}, "stack": {"allow_lookahead": True}}})
    with pytest.raises(ValueError, match=r"so that it has no capacity\. Leave it out"):
        next(stream_text(soft, None, ["ab"], 2, capacity=1.0))


def test_branches_of_whole_layers_are_regrouped_too():
    moe = MoE(num_experts=2, expert_dim=3, group_size=4)
    block = Layer(branches=(("attention", Attention(num_heads=1, head_dim=2)), ("moe", moe)))
    layout = StackLayout(unit=("block",), repeats=2)
    model = LanguageModel(vocab_size=7, model_dim=4, parts={"block": block}, stack=layout)
    assert anew.in_groups_of(16, model).moe_parts["moe"].group_size == 16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_ids_are_never_sampled(params, config, temperature):
    """The vocabulary has 512 ids for 384 byte ids, and padded ids are by far the likeliest."""
    padded = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=512))
    wider = {
        "embedding": jnp.pad(params["embedding"], ((0, 128), (0, 0))),
        "head": jnp.pad(params["head"], ((0, 0), (0, 128)), constant_values=1e4),
    }
    settings = {"temperature": temperature, "seed": 3}
    text = sample({**params, **wider}, padded, "ab", **settings)
    assert text == sample(params, config, "ab", **settings) != ""


def test_a_padded_vocabulary_of_pieces_samples_text(tmp_path):
    """Untrained, with 2,048 ids for a tokenizer of 600: most unmasked draws would be padding."""
    path = tmp_path / "pieces.model"
    train_tokenizer.train(
        open_corpus("embedded"), str(path), vocab_size=600, heldout_fraction=0.03, max_bytes=60_000
    )
    padded = tiny_config({
        "model": {"vocab_size": 2048}, "data": {"tokenizer": f"sentencepiece:{path}"}
    })  # fmt: skip
    state = tiny_state(padded)
    assert continue_text(state.params, None, padded, "The ", num_tokens=10, temperature=5.0)
