"""Speculative decoding: the rule by enumeration, shares of drawn texts, equal greedy texts."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.inference import Draft, Sampling, generate_tokens, speculative, writer
from moe_jax.inference.decoding import Serving
from moe_jax.inference.sampling import probabilities
from moe_jax.inference.speculative import rule
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.part import Call
from tests.tiny_run import MLP, quick_jit, tiny_config, tiny_state

PROMPTS = [[1, 7, 9], [1], [1, *range(20, 41)], [1, 4]]
TOKENS = 20
MODULES = {"layer": ("attention", "moe")}


def made(model=None, seed=0, sharper=10):
    """A config and parameters that are sure of some tokens and not of others."""
    one_layer = {"stack": {"repeats": 1}, "tie_embeddings": False}
    config = tiny_config({"model": {**one_layer, **(model or {})}})
    state = tiny_state(config, seed)
    return config, {**state.params, "head": sharper * state.params["head"]}


def disturbed(target, length=3, noise=0.3, state=None):
    """A draft that often agrees: the model with a perturbed head."""
    config, params = target
    head = params["head"]
    moved = head + noise * jnp.std(head) * jax.random.normal(jax.random.key(1), head.shape)
    return Draft(config, Serving({**params, "head": moved}, state), length)


# ---- the rule, on three tokens


def distributions(shape, seed):
    """Distributions, some with tokens of probability 0, like those after top-k."""
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.ones(shape[-1]), shape[:-1]) * (random.random(shape) > 0.3)
    probs[..., 0] += 0.05
    return (probs / probs.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_a_text_has_the_distribution_of_the_model_whatever_the_draft_proposes(seed):
    """Enumerates all proposals, acceptances and replacement draws of three tokens each.

    In both models, each of three tokens depends on those before it.
    """
    ids, length = range(3), 2
    p = {n: distributions((3,) * n + (3,), seed * 9 + n) for n in range(3)}  # by previous tokens
    q = {n: distributions((3,) * n + (3,), seed * 9 + n + 4) for n in range(2)}
    outcomes = collections.Counter()
    for proposed in itertools.product(ids, repeat=length):
        draft = [q[n][proposed[:n]] for n in range(length)]
        chance = np.prod([draft[n][proposed[n]] for n in range(length)])
        if not chance:
            continue
        target = [p[n][proposed[:n]] for n in range(length + 1)]
        accept, instead = (
            np.asarray(a[0], np.float64)
            for a in rule(*(jnp.array([a]) for a in (target, draft, proposed)))
        )
        for accepted in range(length + 1):
            here = chance * np.prod(accept[:accepted])
            here *= 1 - accept[accepted] if accepted < length else 1
            for last in ids:
                text = (*proposed[:accepted], last)
                # Later passes draw the remaining tokens from the model, by the same rule.
                for rest in itertools.product(ids, repeat=length + 1 - len(text)):
                    whole = text + rest
                    later = np.prod([p[n][whole[:n]][whole[n]] for n in range(len(text), 3)])
                    outcomes[whole] += here * instead[accepted][last] * later
    expected = {
        text: np.prod([p[n][text[:n]][text[n]] for n in range(3)])
        for text in itertools.product(ids, repeat=3)
    }
    np.testing.assert_allclose(
        [outcomes[text] for text in expected], list(expected.values()), atol=1e-6
    )


def test_the_rule_by_hand():
    """With p = (.5, .5, 0) and q = (.25, .25, .5), token 0 is always accepted, token 2 never."""
    p, q = [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]
    accept, instead = rule(
        jnp.array([[p, p], [p, p]]), jnp.array([[q], [q]]), jnp.array([[0], [2]])
    )
    assert accept.tolist() == [[1.0], [0.0]]
    np.testing.assert_allclose(instead, [[p, p], [p, p]])
    # With p = (.2, .8) and q = (.8, .2), token 0 is accepted in a quarter of the cases. Otherwise
    # token 1 replaces it.
    accept, instead = rule(
        jnp.array([[[0.2, 0.8]] * 2]), jnp.array([[[0.8, 0.2]]]), jnp.array([[0]])
    )
    np.testing.assert_allclose(accept, [[0.25]])
    np.testing.assert_allclose(instead[0, 0], [0, 1], atol=1e-6)


def test_at_a_temperature_of_0_only_the_likeliest_is_accepted():
    logits = jnp.array([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]])
    target = jnp.stack([probabilities(one, None, Sampling()) for one in logits[0][:, None]], axis=1)
    for proposed, accepted in (([1], 1.0), ([2], 0.0)):
        draft = jax.nn.one_hot(jnp.array([proposed]), 3)
        accept, instead = rule(target, draft, jnp.array([proposed]))
        assert accept.item() == accepted
        assert instead[0, 1].tolist() == [1, 0, 0]
        assert accepted or instead[0, 0].tolist() == [0, 1, 0]


# ---- whole texts


@pytest.fixture(scope="module")
def target():
    return made()


@pytest.fixture(scope="module")
def greedy(target):
    return generate_tokens(*target, PROMPTS, TOKENS)


def test_greedy_texts_are_those_without_a_draft(target, greedy):
    draft = disturbed(target)
    assert generate_tokens(*target, PROMPTS, TOKENS, draft=draft) == greedy
    assert 0.2 < draft.acceptance_rate < 0.95
    assert draft.proposed == 3 * draft.passes
    # The first token of a text is drawn after its prompt, before any pass.
    np.testing.assert_allclose(draft.tokens_per_pass * draft.passes, len(PROMPTS) * (TOKENS - 1))


@pytest.mark.slow
def test_tokens_that_a_text_does_not_get_are_not_counted(target, greedy):
    """With a perfect draft, the last pass and the end of a text still discard tokens."""
    draft = Draft(target[0], Serving(target[1]), length=3)
    assert generate_tokens(*target, PROMPTS, 2, draft=draft) == [text[:2] for text in greedy]
    assert (draft.passes, draft.proposed, draft.accepted, draft.added) == (4, 12, 4, 4)
    assert draft.tokens_per_pass == 1
    stop = next(token for token in greedy[0] if greedy[0].index(token) == 6)
    draft = Draft(target[0], Serving(target[1]), length=3)
    [text] = generate_tokens(*target, PROMPTS[:1], TOKENS, draft=draft, stop_tokens=[stop])
    assert text == greedy[0][:6], "one behind the prompt, four of a pass, one of the next"
    assert (draft.passes, draft.accepted, draft.added) == (2, 4, 5)


def test_counts_by_hand():
    """One whole pass, two that the end of a text cuts, one refused at once, one past the end."""
    draft = Draft(length=4)
    draft.count(np.array([[5, 5, 5, 1, 0]]), np.array([[5, 1, 4, 1, 0]]))
    assert (draft.passes, draft.proposed, draft.accepted, draft.added) == (4, 16, 4 + 1 + 4, 11)
    assert draft.tokens_per_pass == 11 / 4 and draft.acceptance_rate == 9 / 16


@pytest.mark.slow
def test_a_model_that_drafts_for_itself_is_always_right(target, greedy):
    """Four tokens per pass: the 19 tokens after the first one take five passes."""
    draft = Draft(target[0], Serving(target[1]), length=3)
    assert generate_tokens(*target, PROMPTS, TOKENS, draft=draft) == greedy
    assert draft.acceptance_rate == 1.0 and draft.passes == 4 * 5


@pytest.mark.slow
def test_a_text_does_not_depend_on_its_batch(target):
    """Four rows accept different numbers of tokens. Batch sizes and early ends change no text."""
    how = {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3}
    together = generate_tokens(*target, PROMPTS, TOKENS, draft=disturbed(target), **how)
    assert len({tuple(text) for text in together}) == 4
    one_by_one = {"draft": disturbed(target), "batch_size": 1, **how}
    assert generate_tokens(*target, PROMPTS[:2], TOKENS, **one_by_one) == together[:2]
    stop = together[0][6]
    expected = [text[: text.index(stop)] if stop in text else text for text in together]
    how |= {"stop_tokens": [stop], "draft": disturbed(target)}
    assert generate_tokens(*target, PROMPTS, TOKENS, **how) == expected


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1e6])
def test_a_text_that_outgrows_the_context_goes_on_from_its_last_half(target, penalty):
    how = {"context": 24, "repetition_penalty": penalty}
    plain = generate_tokens(*target, PROMPTS, 40, **how)
    assert generate_tokens(*target, PROMPTS, 40, draft=disturbed(target), **how) == plain
    one_by_one = {"draft": disturbed(target), "batch_size": 1, **how}
    assert generate_tokens(*target, PROMPTS[:2], 40, **one_by_one) == plain[:2]


@pytest.mark.slow
def test_random_keys_go_on_when_the_context_moves(target):
    """With equal logits every proposal is accepted, and a token depends only on its key.

    A text is read again after 16 tokens, then after every nine. Passes draw the last eight of nine.
    """
    config, params = target
    params = {**params, "head": 0 * params["head"]}
    draft = Draft(config, Serving(params), length=3)
    how = {"context": 16, "temperature": 1.0, "draft": draft}
    [text] = generate_tokens(config, params, [[1]], 43, **how)
    assert len({tuple(text[start + 1 : start + 9]) for start in (16, 25, 34)}) == 3
    assert len({text[16], text[25], text[34]}) == 3


# ---- frequencies of texts


THREE = {"vocab_size": 3}
PROMPT = [1, 2]


def expected_shares(config, params, sampling):
    """The probability of each text of three tokens, from the model alone."""
    texts = list(itertools.product(range(3), repeat=3))
    run = quick_jit(lambda tokens: config.model.run(params, Call(tokens_BL=tokens, capacity=0.0)))
    tokens = jnp.array([[*PROMPT, *text] for text in texts])
    logits = run(tokens).logits_BLV
    shares = 1.0
    for i in range(3):
        seen = jax.nn.one_hot(tokens[:, : 2 + i], 3).any(axis=1)
        probs = np.asarray(probabilities(logits[:, 1 + i], seen, sampling))
        shares = shares * probs[np.arange(len(texts)), np.array(texts)[:, i]]
    return dict(zip(texts, shares, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 2, "repetition_penalty": 1.5},
        {"min_p": 0.2, "repetition_penalty": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["model", "modules"])
def test_texts_come_as_often_as_without_a_draft(kind, settings):
    """Shares of 8,000 samples agree within 5 standard deviations. Impossible texts never come."""
    samples = 8000
    modules = {"multi_token": {"depth": 1, **MODULES}} if kind == "modules" else {}
    config, params = made({**THREE, **modules}, sharper=0.25)
    draft = Draft(length=2)
    if kind == "model":
        draft = disturbed((config, params), length=2, noise=1.0)
    settings = {"temperature": 1.0, **settings}
    texts = generate_tokens(
        config, params, [PROMPT], 3, num_samples=samples, batch_size=samples, draft=draft,
        **settings,
    )  # fmt: skip
    counts = collections.Counter(map(tuple, texts))
    expected = expected_shares(config, params, Sampling(**settings))
    for text, p in expected.items():
        share, deviation = counts[text] / samples, (p * (1 - p) / samples) ** 0.5
        assert abs(share - p) <= 5 * deviation, (text, share, p)
    assert 0.05 < draft.acceptance_rate < 0.99


# ---- kinds of caches and drafts


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 4])
def test_modules_of_the_model_draft_for_it(length):
    """Of two modules, length 1 uses one. Length 4 applies the last one again."""
    config, params = made({"multi_token": {"depth": 2, **MODULES}})
    draft = Draft(length=length)
    plain = generate_tokens(config, params, PROMPTS, TOKENS)
    assert generate_tokens(config, params, PROMPTS, TOKENS, draft=draft) == plain
    assert draft.proposed == length * draft.passes


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2])
def test_modules_propose_what_they_predict_in_training(length):
    """Five ids, so that proposals are often right. Accepted tokens are counted by hand.

    On the whole text, modules predict the same as in a training pass. With the token to read at
    place `at`, module m predicts from place at - 1 the token at + m.
    """
    config, params = made({"vocab_size": 5, "multi_token": {"depth": 2, **MODULES}}, seed=7)
    tokens, draft = 40, Draft(length=length)
    answers = generate_tokens(config, params, FIVE_PROMPTS, tokens, draft=draft)
    passes, accepted = passes_by_hand(config, params, answers, length)
    assert draft.passes == passes
    assert draft.accepted == accepted
    assert draft.added == len(FIVE_PROMPTS) * (tokens - 1)
    assert 0.1 < accepted / (passes * length) < 0.9


FIVE_PROMPTS = [[1, 2, 4], [3]]  # over five ids


@functools.partial(quick_jit, static_argnames=("model", "multi_token"))
def read_whole(model, params, texts_BL, state, multi_token=False):
    """The model's likeliest next tokens, [B, L], and those that its modules predict."""
    call = Call(tokens_BL=texts_BL, capacity=0.0)
    output = model.run(params, call, state=state, multi_token=multi_token)
    return output.logits_BLV.argmax(-1), [one_BLV.argmax(-1) for one_BLV in output.later_BLV]


def padded(prompts, answers):
    """Whole texts, padded to one length."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, texts))
    return jnp.array([text + [0] * (longest - len(text)) for text in texts])


def is_greedy(config, params, answers, state):
    """Whether answers to `PROMPTS` are greedy, by one pass over the whole texts."""
    texts_BL = padded(PROMPTS, answers)
    following_BL, _ = read_whole(config.model, params, texts_BL, state)
    return all(
        following_BL[row, len(prompt) - 1 :][: len(answer)].tolist() == answer
        for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    )


def passes_by_hand(config, params, answers, length, state=None):
    """The number of passes and of accepted tokens for answers to `FIVE_PROMPTS`."""
    texts_BL = padded(FIVE_PROMPTS, answers)
    _, later = read_whole(config.model, params, texts_BL, state, multi_token=True)
    passes = accepted = 0
    for row, (prompt, answer) in enumerate(zip(FIVE_PROMPTS, answers, strict=True)):
        text, predicted = prompt + answer, [tokens_BL[row].tolist() for tokens_BL in later]
        at = len(prompt)
        while at < len(text) - 1:
            right = 0
            for m in range(1, length + 1):
                # Proposals past the end of the text are unknown here.
                if at + m >= len(text) or predicted[m - 1][at - 1] != text[at + m]:
                    break
                right += 1
            passes, accepted, at = passes + 1, accepted + right, at + 1 + right
    return passes, accepted


@pytest.mark.parametrize("vocab_size", [16, pytest.param(384, marks=pytest.mark.slow)])
def test_ids_that_are_no_tokens_are_not_proposed_nor_drawn(vocab_size):
    """The tokenizer has 10 tokens, the model 384 ids, and the draft fewer or as many.

    All tokens are about equally likely, so nearly all proposals among the ten are accepted.
    """
    dense = {"parts": {"attention": None, "moe": None, "mlp": MLP},
             "stack": {"unit": [["mlp"]], "repeats": 1}}  # fmt: skip
    config, params = made({**dense, "vocab_size": vocab_size}, seed=1, sharper=1)
    draft = Draft(config, Serving(params), length=2)
    settings = {"temperature": 50.0, "num_ids": 10, "draft": draft}
    texts = generate_tokens(*made(dense), [[1, 7, 9], [1]], TOKENS, **settings)
    assert len(set(texts[0])) > 5 and max(map(max, texts)) < 10
    assert draft.acceptance_rate > 0.9


# A block with selection biases.
SELECTING = {"bias": {"kind": "sign", "rate": 0.1}, "run_experts": "einsum"}
BIAS_E = jnp.array([[1.0, 0.0, 0.5, 0.0]])


def test_a_model_and_its_draft_choose_experts_by_their_biases():
    """A state space model reads accepted tokens again, with the biases too."""
    parts = {"attention": None, "mamba": {"kind": "mamba", "state_dim": 4}, "moe": SELECTING}
    stack = {"unit": [["mamba", "moe"]], "repeats": 1}
    target = config, params = made({"parts": parts, "stack": stack})
    state = {"moe": {"bias_E": BIAS_E}}
    draft = disturbed(target, state=state)
    answers = generate_tokens(*target, PROMPTS, TOKENS, state=state, draft=draft)
    assert is_greedy(*target, answers, state)
    assert not is_greedy(*target, answers, {"moe": {"bias_E": 0 * BIAS_E}})
    assert 0.1 < draft.acceptance_rate < 0.99
    # The model as its own draft is right only with its biases.
    draft = Draft(config, Serving(params, state), length=3)
    assert generate_tokens(*target, PROMPTS, TOKENS, state=state, draft=draft) == answers
    assert draft.acceptance_rate == 1


def test_modules_choose_experts_by_their_biases():
    modules = {"multi_token": {"depth": 1, **MODULES}, "parts": {"moe": SELECTING}}
    target = made({"vocab_size": 5, **modules}, seed=4)
    state = {"moe": {"bias_E": BIAS_E}, "multi_token_moe": {"bias_E": BIAS_E}}
    draft = Draft(length=1)
    answers = generate_tokens(*target, FIVE_PROMPTS, 40, state=state, draft=draft)
    found = draft.passes, draft.accepted
    assert found == passes_by_hand(*target, answers, 1, state)
    without = state | {"multi_token_moe": {"bias_E": 0 * BIAS_E}}
    assert found != passes_by_hand(*target, answers, 1, without)


WINDOWED = {"parts": {"attention": {"window": 4}}}
LATENT = {
    "parts": {"attention": {"kind": "latent_attention", "num_heads": 2, "kv_rank": 8,
                            "nope_dim": 8, "rope_dim": 4, "value_dim": 8}},
}  # fmt: skip
MAMBA = {"parts": {"mamba": {"kind": "mamba", "state_dim": 4}},
         "stack": {"unit": [["mamba", "moe"], ["attention", "moe"]]}}  # fmt: skip
BIASED = {
    "parts": {"attention": {"rotary": None, "position_bias": "position"},
              "position": {"kind": "relative_positions", "num_heads": 2}},
    "stack": {"shared": ["position"]},
}  # fmt: skip
BIGRAMS = {"parts": {"moe": {"router": {"kind": "hash", "by": "bigram"}, "losses": {},
                             "num_selected_experts": 1}}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", [WINDOWED, LATENT, MAMBA, BIASED, BIGRAMS, {"scan_layers": True}],
                         ids=["ring", "latent", "mamba", "biases", "bigrams", "scan"])  # fmt: skip
def test_every_cache_takes_tokens_back(model):
    """A ring of twelve slots, relative positions per row, a state that is read again."""
    target = made(model)
    plain = generate_tokens(*target, PROMPTS, TOKENS)
    draft = disturbed(target, length=4)
    assert generate_tokens(*target, PROMPTS, TOKENS, draft=draft) == plain
    assert 0.1 < draft.acceptance_rate < 0.99


@pytest.mark.slow
def test_a_smaller_model_with_a_wider_vocabulary_drafts():
    """The draft has one dense layer, unrelated weights, and 400 ids, 384 of them the model's."""
    dense = {"stack": {"unit": [["attention", "mlp"]], "repeats": 1}, "vocab_size": 400,
             "parts": {"moe": None, "mlp": MLP}}  # fmt: skip
    config, params = made(dense, seed=1)
    target = made()
    draft = Draft(config, Serving(params), length=2)
    plain = generate_tokens(*target, PROMPTS, TOKENS)
    assert generate_tokens(*target, PROMPTS, TOKENS, draft=draft) == plain


def test_on_a_mesh_every_process_can_read_the_first_tokens(monkeypatch):
    config, params = made({"multi_token": {"depth": 1, **MODULES}})
    placed = on_mesh(config, params)
    shardings = []

    def begin(*arguments, **settings):
        texts, _ = speculative.begin(*arguments, **settings)
        shardings.append(texts.next_B.sharding)
        raise InterruptedError  # spares a longer compilation

    monkeypatch.setattr(writer, "begin", begin)
    with pytest.raises(InterruptedError):
        generate_tokens(config, placed, PROMPTS[:3], 8, draft=Draft(length=2))
    assert shardings[0].num_devices == 8 and shardings[0].is_fully_replicated


def on_mesh(config, params):
    """Parameters on eight devices: tokens over four, experts over two, heads over two."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    return jax.tree.map(
        lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)),
        config.model.specs(), params,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "modules"])
def test_on_a_mesh_texts_are_those_of_one_device(kind):
    """Three rows do not divide over the devices, so one row is padding."""
    modules = {"multi_token": {"depth": 1, **MODULES}} if kind == "modules" else {}
    config, params = made(modules)
    placed = on_mesh(config, params)

    def draft(params):
        return Draft(length=2) if kind == "modules" else disturbed((config, params), length=2)

    texts = generate_tokens(config, params, PROMPTS[:3], 8, draft=draft(params))
    assert generate_tokens(config, placed, PROMPTS[:3], 8, draft=draft(placed)) == texts


@pytest.mark.parametrize(
    ("model", "draft", "settings", "message"),
    [
        ({}, lambda target: Draft(), {}, r"it has none, multi_token=None"),
        ({}, lambda target: Draft(length=0), {}, r"1 to 8 tokens, .*: length=0"),
        ({}, lambda target: Draft(length=9), {}, r"1 to 8 tokens, .*: length=9\. Use 1 to 8"),
        ({}, lambda target: Draft(target[0]), {}, r": trained=None\. Pass both"),
        ({}, lambda target: Draft(trained=Serving(target[1])), {}, r": config=None\. Pass both"),
        ({}, disturbed, {"capacity": 1.0}, r"experts must be dropless, .*: capacity=1\.0"),
        ({"multi_token": {"depth": 2, **MODULES}}, lambda target: Draft(length=8), {},
         r"length \+ min\(length, depth\) of at most 9: length=8, depth=2"),
        ({}, lambda target: Draft(tiny_config({"model": {"vocab_size": 300}}), target[1]), {},
         r"must know all tokens of the model: vocab_size=300, the model has 384 ids"),
    ],
)  # fmt: skip
def test_drafts_that_do_not_fit_are_refused(model, draft, settings, message):
    target = made(model)
    with pytest.raises(ValueError, match=message):
        generate_tokens(*target, [[1]], 2, draft=draft(target), **settings)
