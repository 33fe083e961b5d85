"""Generation from lists of token ids: batches, samples, streams, capacities, refusals."""

import collections

import jax
import jax.numpy as jnp
import pytest

from configs import switch_base
from moe_jax.config import MeshConfig, from_config_dict
from moe_jax.inference import (
    Sampling,
    generate_tokens,
    generate_with_routes,
    stream_anew,
    stream_tokens,
    writer,
)
from moe_jax.inference.writer import CHUNK, bucket
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.placement import state_shardings
from tests.tiny_run import tiny_config, tiny_state

PROMPTS = [[1, 7, 9], [1], [1, *range(20, 41)], [1, 4]]
STATE = {"moe": {"bias_E": jnp.array([[0.0, 0.3, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0]])}}


@pytest.fixture(scope="module")
def config():
    # Training has groups of four sequences and a capacity so tight that its drops would show.
    moe = {
        "bias": {"kind": "sign", "rate": 0.1}, "capacity": {"train_factor": 0.25}, "group_size": 64
    }  # fmt: skip
    return tiny_config({"model": {"tie_embeddings": False, "parts": {"moe": moe}}})


@pytest.fixture(scope="module")
def params(config):
    """Parameters of a model that is sure of some tokens and not of others."""
    params = dict(tiny_state(config).params)
    return {**params, "head": 10 * params["head"]}


@pytest.fixture(scope="module")
def generate(config, params):
    def generate(prompts=PROMPTS, num_tokens=6, **settings):
        return generate_tokens(config, params, prompts, num_tokens, state=STATE, **settings)

    return generate


@pytest.fixture(scope="module")
def drawn(generate):
    return generate(temperature=1.5, seed=3)


def test_a_text_does_not_depend_on_its_batch(generate, drawn):
    assert len(drawn) == 4 and all(len(set(text)) > 2 for text in drawn)
    assert generate(temperature=1.5, seed=3, batch_size=1) == drawn
    assert generate(temperature=1.5, seed=3, batch_size=3) == drawn


def test_a_cache_draws_what_reading_anew_draws(config, params, drawn):
    texts = collections.defaultdict(list)
    settings = {"context": 32, "state": STATE, "temperature": 1.5, "seed": 3}
    for piece in stream_anew(config, params, PROMPTS, 6, **settings):
        texts[piece.row] += piece.tokens
    assert [texts[row] for row in range(4)] == drawn


def test_rows_that_are_not_continued_stay_in_their_places(generate, config, params):
    assert generate([[1], [2]], num_tokens=0, ended={0, 1}) == [[], []]
    assert generate([[1], [2]], num_tokens=0, num_samples=2, ended={0}) == [[]] * 4
    with pytest.raises(ValueError, match=r"ended=\{0\}\. Leave those prompts out"):
        generate_with_routes(config, params, [[1]], 2, ended={0})


def test_samples_of_a_prompt_differ_and_others_are_not_moved(generate):
    twice = generate(PROMPTS[:2], temperature=1.5, seed=3, num_samples=2)
    assert len({tuple(text) for text in twice}) == 4
    assert twice == generate(PROMPTS[:2], temperature=1.5, seed=3, num_samples=2)
    assert twice[:2] == generate(PROMPTS[:1], temperature=1.5, seed=3, num_samples=2)


def test_a_text_that_outgrows_the_context_does_not_depend_on_its_batch(generate):
    """Prompt 0 fills the context after 15 tokens, prompt 1 after one. Ended texts move no other."""
    prompts, how = [[1, 7], [1, *range(20, 35)], [1, 9]], {"temperature": 1.5, "seed": 3}
    texts = generate(prompts, 30, context=16, **how)
    assert generate(prompts, 30, context=16, batch_size=1, **how) == texts
    stop = texts[2][12]
    ended = [text[: text.index(stop)] if stop in text else text for text in texts]
    assert generate(prompts, 30, context=16, stop_tokens=[stop], **how) == ended


def test_a_text_is_no_longer_than_the_context_for_a_rotary_scaling_by_length():
    """Of a text that fills a context of 8, 8 tokens are read: not too long for short factors."""
    short, prompts = [1.0] * 4, [[1, 7, 9, 4], [1, *range(20, 35)]]
    texts = {}
    for original_length in (8, 7):
        for name, factors in (("short", short), ("long", [8.0] * 4)):
            scaling = {
                "kind": "longrope", "short_factors": short, "long_factors": factors,
                "original_length": original_length, "factor": 4.0,
            }  # fmt: skip
            rotary = {"kind": "rotary", "scaling": scaling}
            parts = {"attention": {"rotary": rotary}}
            config = tiny_config({"model": {"tie_embeddings": False, "parts": parts}})
            params = dict(tiny_state(config).params)
            params["head"] = 10 * params["head"]
            said = generate_tokens(config, params, prompts, 12, context=8)
            texts[original_length, name] = said
    assert texts[8, "long"] == texts[8, "short"]
    assert texts[7, "long"] != texts[7, "short"]


def test_a_stop_token_ends_its_text_alone(generate, drawn):
    stop = drawn[0][2]
    expected = [text[: text.index(stop)] if stop in text else text for text in drawn]
    assert generate(temperature=1.5, seed=3, stop_tokens=[stop]) == expected


def test_tokens_stream_in_chunks(config, params):
    pieces = list(stream_tokens(config, params, [[1, 7]], CHUNK + 4, state=STATE))
    assert [len(piece.tokens) for piece in pieces] == [CHUNK, 4]
    assert not any(piece.ended for piece in pieces)


def test_a_penalty_keeps_a_text_from_repeating_itself(generate):
    """The penalty is so high that no token repeats, not even from the prompt."""
    [text] = generate([[1, 7, 9]], repetition_penalty=1e6)
    assert len({1, 7, 9, *text}) == 9


def test_a_penalty_is_of_the_whole_text_beyond_the_context(generate, config, params):
    [text] = generate([[1, 7, 9]], 40, context=16, repetition_penalty=1e6)
    assert len({1, 7, 9, *text}) == 43
    settings = {"context": 4, "state": STATE, "repetition_penalty": 1e6}
    pieces = stream_anew(config, params, [[1, 7, 9]], 40, **settings)
    assert len({1, 7, 9, *(token for piece in pieces for token in piece.tokens)}) == 43


def test_a_text_read_anew_is_the_same_on_a_mesh(config, params):
    """Every device with a row reads the text."""
    settings = {"context": 16, "temperature": 0.0, "state": STATE}
    alone = list(stream_anew(config, params, [[1, 7, 9]], 4, **settings))
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    placed = jax.device_put(params, state_shardings(config, mesh).params)
    assert list(stream_anew(config, placed, [[1, 7, 9]], 4, **settings)) == alone


def test_a_stream_uses_its_mesh_and_leaves_that_of_its_reader(config, params, monkeypatch):
    meshes = []

    def write(self, prompts, num_tokens):
        for row in range(2):
            meshes.append(jax.sharding.get_abstract_mesh().shape)
            yield writer.Piece(row, [1], False)

    monkeypatch.setattr(writer.Writer, "write", write)
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    placed = jax.device_put(params, state_shardings(config, mesh).params)
    other = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(other):
        for _ in stream_tokens(config, placed, [[1], [2]], 1, state=STATE):
            assert jax.sharding.get_abstract_mesh() == other.abstract_mesh
    assert meshes == [mesh.abstract_mesh.shape] * 2


def test_random_keys_go_on_when_the_context_moves(config, params):
    """With equal logits a token depends only on its key, not on context or where reading starts."""
    equal = {**params, "head": 0 * params["head"]}
    settings = {"state": STATE, "temperature": 1.0}
    prompts = [[1], [1, *range(20, 41)]]
    whole = generate_tokens(config, equal, prompts, 43, **settings)
    assert generate_tokens(config, equal, prompts, 43, context=16, **settings) == whole
    assert all(text[15:24] != text[24:33] for text in whole)
    pieces = list(stream_anew(config, equal, prompts, 43, context=16, **settings))
    assert [token for piece in pieces for token in piece.tokens] == whole[0] + whole[1]


def test_ids_that_are_no_tokens_are_not_drawn(generate):
    texts = generate(temperature=50.0, num_ids=10)
    assert max(map(max, texts)) < 10


def test_with_a_capacity_the_batch_shares_it(generate, drawn):
    """A quarter of a slot for each of four texts is one slot per expert: choices are dropped."""
    settings = {"temperature": 1.5, "seed": 3}
    assert generate(capacity=100.0, **settings) == drawn
    assert generate(capacity=0.25, **settings) != drawn


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "a prompt must have at least one token: prompt 1 has none"),
        ([[1], [4, 384]], r"token ids must lie in 0\.\.383, .*: prompt 1 has 384"),
        ([[-1]], "prompt 0 has -1"),
        ([1, 2, 3], r"lists of token ids: prompt 0 is 1\. Pass a list of prompts"),
        ("ab", r"prompt 0 is 'a'\. .*a text to stream_text"),
    ],
)
def test_prompts_that_are_none_are_refused(generate, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(prompts)


def test_a_model_that_looks_ahead_has_no_cache():
    moe = {"router": {"kind": "expert_choice"}, "losses": {}}
    config = tiny_config({"model": {"parts": {"moe": moe}, "stack": {"allow_lookahead": True}}})
    with pytest.raises(ValueError, match=r"has no cache: \['moe'\] look at later tokens"):
        generate_tokens(config, tiny_state(config).params, [[1]], 2)


def test_few_lengths_are_compiled_for():
    lengths = {bucket(n) for n in range(1, 4097)}
    assert len(lengths) < 40
    assert all(n <= bucket(n) <= max(1.25 * n, n + 16) for n in range(1, 4097))


def test_an_encoder_reads_the_last_tokens_of_a_longer_prompt(monkeypatch):
    """It reads as many as the context has, like a decoder."""
    config = from_config_dict(switch_base.get_config("smoke"))
    read = []

    def stop(texts, rows):
        read.extend(texts)
        raise InterruptedError

    monkeypatch.setattr(writer, "encoder_inputs", stop)
    for context in (3, None):
        how = writer.Writer(None, config.model, Sampling(), context, 0.0, None, (), 0, ())
        with pytest.raises(InterruptedError):
            next(how.write([(0, [5, 6, 7, 8, 1]), (1, [9, 1])], 2))
    assert read == [[7, 8, 1], [9, 1], [5, 6, 7, 8, 1], [9, 1]]
