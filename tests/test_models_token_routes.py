"""Experts per token: an engine's arrays become a record, and a record becomes such arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference import Draft, generate_with_routes
from moe_jax.inference.decoding import Serving
from moe_jax.models.routing_record import record_routing
from moe_jax.models.token_routes import load_routes, record_of_routes, routes_of
from moe_jax.part import Call
from tests.tiny_run import MLP, quick_jit, tiny_config, tiny_state

# One dense layer, then two layers that route.
CONFIG = tiny_config({"model": {"parts": {"mlp": MLP}, "stack": {"first": [["attention", "mlp"]]}}})
TEXTS = [[1, 7, 9, 30, 4], [1, 5, 8]]
TOKENS_BL = np.array([[1, 7, 9, 30, 4], [1, 5, 8, 0, 0]])
SEGMENTS_BL = np.array([[1] * 5, [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def params():
    return tiny_state(CONFIG).params


@pytest.fixture(scope="module")
def record(params):
    return record_routing(CONFIG.model, params, TOKENS_BL, segments_BL=SEGMENTS_BL)


def loss(params, replay):
    call = Call(
        tokens_BL=jnp.asarray(TOKENS_BL), segments_BL=jnp.asarray(SEGMENTS_BL), capacity=0.0
    )
    logits_BLV = CONFIG.model.run(params, call, replay=replay).logits_BLV
    return jnp.sum(jnp.square(logits_BLV) * SEGMENTS_BL[..., None])


def test_a_record_goes_there_and_back(record):
    routes = routes_of(record)
    assert [route.shape for route in routes] == [(5, 2, 2), (3, 2, 2)]
    again = record_of_routes(CONFIG.model, TEXTS, routes)
    for old, new in zip(routes, routes_of(again), strict=True):
        np.testing.assert_array_equal(old, new)


def test_what_is_replayed_is_what_was_computed(record, params):
    again = record_of_routes(CONFIG.model, TEXTS, routes_of(record))
    replayed = quick_jit(loss)(params, again.replay(CONFIG.model))
    np.testing.assert_array_equal(replayed, quick_jit(loss)(params, None))


def test_layers_without_experts_may_be_there_as_minus_one(record):
    """The form of vLLM: all three layers, and -1 for the last token, which it never runs."""
    dense = ((0, 0), (1, 0), (0, 0))
    routes = [np.pad(route, dense, constant_values=-1) for route in routes_of(record)]
    for route in routes:
        route[-1] = -1
    again = record_of_routes(CONFIG.model, TEXTS, routes)
    choices, expected = again.parts["moe"].choices, record.parts["moe"].choices
    np.testing.assert_array_equal(choices.expert_index[:, 0, :4], expected.expert_index[:, 0, :4])
    assert choices.chosen[:, 0].sum(axis=(0, 2)).tolist() == [4, 4, 4, 4, 0]
    assert again.parts["moe"].layers == (1, 2)


def test_a_router_that_has_drifted_still_learns(record, params):
    """Its replayed experts are no longer its best; its weights get gradients through the gates."""
    drifted = jax.tree.map(lambda p: p, dict(params))
    unit = drifted["stack"]["unit"]["0"]["moe"]["router"]
    drifted["stack"]["unit"]["0"]["moe"]["router"] = jax.tree.map(lambda w: -w, unit)
    replay = record_of_routes(CONFIG.model, TEXTS, routes_of(record)).replay(CONFIG.model)
    assert quick_jit(loss)(drifted, replay) != quick_jit(loss)(drifted, None)
    gradients = quick_jit(jax.grad(loss))(drifted, replay)
    gradient = gradients["stack"]["unit"]["0"]["moe"]["router"]
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.fixture(scope="module")
def written(params):
    """Two prompts continued by eight tokens each, and the experts of every token."""
    prompts = [[1, 7, 9], [5]]
    answers, routes = generate_with_routes(CONFIG, params, prompts, 8, temperature=1.0)
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], routes


def padded(texts):
    length = max(map(len, texts))
    tokens = np.array([[*text, *[0] * (length - len(text))] for text in texts])
    is_token = np.arange(length) < np.array([[len(text)] for text in texts])
    return tokens, is_token.astype(np.int32)


def test_decoding_records_the_experts_that_a_pass_over_the_text_chooses(params, written):
    texts, routes = written
    tokens, segments = padded(texts)
    expected = routes_of(record_routing(CONFIG.model, params, tokens, segments_BL=segments))
    assert [route.shape for route in routes] == [(11, 2, 2), (9, 2, 2)]
    for route, other in zip(routes, expected, strict=True):
        np.testing.assert_array_equal(route, other)


def test_a_rollout_is_replayed_by_a_trainer_whose_router_has_drifted(params, written):
    """Replay gives the writer's logits. After drift it keeps the experts, and the router learns."""
    texts, routes = written
    tokens, segments = padded(texts)
    replay = record_of_routes(CONFIG.model, texts, routes).replay(CONFIG.model)
    call = Call(tokens_BL=jnp.asarray(tokens), segments_BL=jnp.asarray(segments), capacity=0.0)

    def logits(params, replay):
        output = CONFIG.model.run(params, call, replay=replay)
        return output.logits_BLV * segments[..., None], output.aux["moe"].sums["assigned_KE"]

    run = quick_jit(logits)
    own, expected = run(params, None), run(params, replay)
    np.testing.assert_allclose(own[0], expected[0], rtol=1e-5, atol=1e-5)
    drifted = jax.tree_util.tree_map_with_path(
        lambda path, p: -p if "router" in jax.tree_util.keystr(path) else p, dict(params)
    )
    np.testing.assert_array_equal(run(drifted, replay)[1], expected[1])
    assert (run(drifted, None)[1] != expected[1]).any()
    gradients = quick_jit(jax.grad(lambda p: jnp.sum(jnp.square(logits(p, replay)[0]))))(drifted)
    router = gradients["stack"]["unit"]["0"]["moe"]["router"]
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(router))


@pytest.mark.slow
def test_with_a_draft_the_last_token_is_absent_and_the_others_are_the_same(params):
    """At temperature 0, where the texts are equal with and without a draft of three tokens."""
    prompts = [[1, 7, 9], [5]]
    draft = Draft(CONFIG, Serving(params), length=3)
    answers, routes = generate_with_routes(CONFIG, params, prompts, 10)
    again, others = generate_with_routes(CONFIG, params, prompts, 10, draft=draft, batch_size=1)
    assert again == answers
    for route, other in zip(routes, others, strict=True):
        np.testing.assert_array_equal(route[:-1], other[:-1])
        assert len(route) == len(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 8}, "a prompt of 1 tokens, num_tokens=9, context=8"),
        ({"num_tokens": 0}, "num_tokens=0"),
    ],
)
def test_texts_whose_experts_cannot_be_told_are_refused(params, settings, message):
    how = {"num_tokens": 9, **settings}
    with pytest.raises(ValueError, match=message):
        generate_with_routes(CONFIG, params, [[1]], **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda routes: routes[:1], "2 texts, 1 arrays"),
        (lambda routes: [routes[0][:4], routes[1]], r"text 0 has 5 tokens .* array \(4, 2, 2\)"),
        (lambda routes: [np.repeat(r, 2, 1) for r in routes], r"2 layers that route or all 3"),
        (lambda routes: [r + 9 * (r > 0) for r in routes], r"must lie in 0\.\.num_experts - 1"),
        (lambda routes: [0 * r for r in routes], "must not choose an expert twice"),
        (lambda routes: [0 * routes[0] - 1, routes[1]], r"none for \[layer, token\] \[0, 0\]"),
        (lambda routes: [r[..., :1] for r in routes], "2 experts of 'moe', .*text 0 has 1 for"),
        (lambda routes: [np.pad(r, ((0, 0), (0, 0), (0, 1))) for r in routes],
         r"text 0 has 0 at \[layer of the part, token, choice\] \[0, 0, 2\]"),
        (lambda routes: [np.where(r == 0, -2, r) for r in routes], r"text \d has -2 at"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(record, change, message):
    with pytest.raises(ValueError, match=message):
        record_of_routes(CONFIG.model, TEXTS, change(routes_of(record)))


@pytest.mark.parametrize(
    ("settings", "complete"),
    [
        ({}, False),  # gates are probabilities of all experts
        ({"renormalize": True}, True),
        ({"score": "softmax_over_selected"}, True),
        ({"renormalize": True, "top_p": 0.5}, False),  # over those that count
    ],
)
def test_gates_over_all_choices_need_all_of_them(record, settings, complete):
    moe = {"router": {"kind": "token_choice"} | settings}
    model = tiny_config(
        {"model": {"parts": {"mlp": MLP, "moe": moe}, "stack": {"first": [["attention", "mlp"]]}}}
    ).model
    routes = routes_of(record)
    routes[0][2, 1, 1] = -1
    if complete:
        with pytest.raises(ValueError, match=r"text 0 has -1 among .* \[layer, token\] \[1, 2\]"):
            record_of_routes(model, TEXTS, routes)
    else:
        assert record_of_routes(model, TEXTS, routes).parts["moe"].choices.chosen.sum() == 31


def test_experts_that_choose_tokens_are_replayed():
    """A token has any number of experts: here up to all four."""
    router = {"kind": "expert_choice", "predictor_loss_weight": 0.01}
    model = tiny_config(
        {"model": {"parts": {"moe": {"router": router}}, "stack": {"allow_lookahead": True}}}
    ).model
    params = jax.tree.map(  # also the predictor, which starts from 0
        lambda spec: jax.random.normal(jax.random.key(0), spec.shape), model.specs()
    )
    record = record_routing(model, params, TOKENS_BL, segments_BL=SEGMENTS_BL)
    counts = record.parts["moe"].choices.chosen.sum(axis=-1)[:, SEGMENTS_BL > 0]
    assert {int(count) for count in counts.flat} > {2}
    again = record_of_routes(model, TEXTS, routes_of(record))
    for old, new in zip(routes_of(record), routes_of(again), strict=True):
        np.testing.assert_array_equal(old, new)
    assert again.replay(model)["moe"].chosen.shape[-1] == 4


def test_columns_of_a_part_with_more_choices_are_minus_one(record):
    wider = [np.pad(r, ((0, 0), (0, 0), (0, 1)), constant_values=-1) for r in routes_of(record)]
    same, expected = record_of_routes(CONFIG.model, TEXTS, wider).parts["moe"], record.parts["moe"]
    is_token_BL = record.segments_BL > 0
    for field in ("expert_index", "chosen"):
        one, other = (getattr(part.choices, field)[:, is_token_BL] for part in (same, expected))
        np.testing.assert_array_equal(one, other)


def test_empty_texts_and_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least one token: texts \[0\] have none"):
        record_of_routes(CONFIG.model, [[]], [np.zeros((0, 2, 2), np.int32)])
    np.save(tmp_path / "a.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"must be an \.npz with tokens and routed_experts"):
        load_routes(tmp_path / "a.npy")
