"""Experts by token: the arrays of an engine become a record, and a record such arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.routing_record import record_routing
from moe_jax.models.token_routes import record_of_routes, routes_of
from moe_jax.part import Call
from tests.tiny_run import MLP, quick_jit, tiny_config, tiny_state

# A dense layer, then two that route.
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
    """The form of vLLM: all three layers, and the last token, which it never runs, absent."""
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
    """Its experts are no longer its best, and its weights have gradients through the gates."""
    drifted = jax.tree.map(lambda p: p, dict(params))
    unit = drifted["stack"]["unit"]["0"]["moe"]["router"]
    drifted["stack"]["unit"]["0"]["moe"]["router"] = jax.tree.map(lambda w: -w, unit)
    replay = record_of_routes(CONFIG.model, TEXTS, routes_of(record)).replay(CONFIG.model)
    assert quick_jit(loss)(drifted, replay) != quick_jit(loss)(drifted, None)
    gradients = quick_jit(jax.grad(loss))(drifted, replay)
    gradient = gradients["stack"]["unit"]["0"]["moe"]["router"]
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda routes: routes[:1], "2 texts, 1 arrays"),
        (lambda routes: [routes[0][:4], routes[1]], r"text 0 has 5 tokens .* array \(4, 2, 2\)"),
        (lambda routes: [np.repeat(r, 2, 1) for r in routes], r"2 layers that route or all 3"),
        (lambda routes: [r + 9 * (r > 0) for r in routes], r"must lie in 0\.\.num_experts - 1"),
        (lambda routes: [0 * r for r in routes], "must not choose an expert twice"),
        (lambda routes: [0 * routes[0] - 1, routes[1]], r"none for \[layer, token\] \[0, 0\]"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(record, change, message):
    with pytest.raises(ValueError, match=message):
        record_of_routes(CONFIG.model, TEXTS, change(routes_of(record)))
