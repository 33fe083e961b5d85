"""Expert choice by hand-worked tables, by invariants, and with every way to run experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import build
from moe_jax.moe.balance import max_violation
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity, assign_slots
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import ChoiceMajor, RandomOrder
from moe_jax.moe.routing import Options, Router, RouterInputs
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS
from moe_jax.moe.statistics import dropped_fraction
from moe_jax.part import Call, Dims

FLOAT32 = 5e-6
LENGTH, MODEL_DIM = 6, 4

# Four tokens, experts A, B and C. The best two tokens of A are 0 (.6) and 1 (.5); of B, 2 (.5) and
# 3 (.4), before 0 (.3); of C, 1 (.4) and 3 (.4).
PROBS = np.array([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3], [0.2, 0.4, 0.4]], np.float32)


def make_moe(max_experts=0, factor=1.0, predictor=0.0, **settings):
    router = ExpertChoice(max_experts=max_experts, predictor_loss_weight=predictor)
    capacity = Capacity(train_factor=factor)
    settings = {"num_experts": 3, "expert_dim": 5, "run_experts": "einsum"} | settings
    return MoE(router=router, capacity=capacity, **settings)


def make_inputs(num_experts, slots, valid):
    options = Options(num_experts, num_experts, 1, slots)
    return RouterInputs(options, valid, jnp.zeros(valid.shape, jnp.int32))


def route_probs(probs, slots, max_experts=0, valid=None):
    valid = jnp.ones((1, len(probs)), jnp.bool_) if valid is None else jnp.asarray(valid)[None]
    params = {"weight": jnp.eye(probs.shape[1])}
    inputs = make_inputs(probs.shape[1], slots, valid)
    router = ExpertChoice(max_experts=max_experts)
    return router.route(params, jnp.log(jnp.asarray(probs))[None], inputs)


def taken(routing):
    """Each token's experts and their gates."""
    parts = (routing.expert_index_GSK, routing.gate_GSK, routing.chosen_GSK)
    rows = zip(*(np.asarray(part[0]) for part in parts), strict=True)
    return [{int(e): round(float(g), 5) for e, g, c in zip(*row, strict=True) if c} for row in rows]


def test_every_expert_takes_its_best_tokens():
    assert taken(route_probs(PROBS, 2)) == [{0: 0.6}, {0: 0.5, 2: 0.4}, {1: 0.5}, {1: 0.4, 2: 0.4}]
    # One slot: tokens 1 and 3 tie for C, and the earlier one wins.
    assert taken(route_probs(PROBS, 1)) == [{0: 0.6}, {2: 0.4}, {1: 0.5}, {}]
    assert [len(row) for row in taken(route_probs(PROBS, 4))] == [3, 3, 3, 3]


def test_a_token_keeps_its_best_experts_under_a_limit():
    assert taken(route_probs(PROBS, 2, max_experts=1)) == [{0: 0.6}, {0: 0.5}, {1: 0.5}, {1: 0.4}]


def test_padding_is_not_taken_and_leaves_its_place_to_others():
    valid = [False, True, True, True]
    expected = [{}, {0: 0.5, 2: 0.4}, {0: 0.2, 1: 0.5}, {1: 0.4, 2: 0.4}]
    got = taken(route_probs(PROBS, 2, valid=valid))
    assert got == expected  # A's second: tokens 2 and 3 tie at .2
    assert taken(route_probs(PROBS, 3, valid=[True, False, False, False]))[1:] == [{}, {}, {}]


def make_values(moe, seed=0):
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), moe.specs(Dims(MODEL_DIM))
    )
    return params, random.normal(size=(2, LENGTH, MODEL_DIM)).astype(np.float32)


def run(params, x, moe, factor=None, **told):
    """Runs the block, by default with the capacity of training."""
    factor = moe.capacity.train_factor if factor is None else factor
    return moe_block(params, x, moe, Call(capacity=factor, **told))


def oracle(params, x_SM, slots):
    """One group, expert by expert, in float64."""
    params = jax.tree.map(lambda value: np.asarray(value, np.float64), params)
    logits, experts = x_SM.astype(np.float64) @ params["router"]["weight"], params["experts"]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = np.zeros(x_SM.shape)
    for e in range(probs.shape[1]):
        for s in np.argsort(-probs[:, e], kind="stable")[:slots]:
            hidden = np.maximum(x_SM[s] @ experts["wi"][e], 0)
            y[s] += probs[s, e] * hidden @ experts["wo"][e]
    return y


@pytest.mark.parametrize("way", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("factor", [0.5, pytest.param(1.5, marks=pytest.mark.slow)])
def test_block_equals_the_oracle_and_is_balanced(way, factor):
    moe = make_moe(factor=factor, num_selected_experts=2, run_experts=way)
    slots = {0.5: 2, 1.5: 6}[factor]  # 6 tokens * 2 choices * factor / 3 experts
    params, x = make_values(moe)
    y, aux = jax.jit(lambda p, x: run(p, x, moe))(params, x)
    for got, x_SM in zip(y, x, strict=True):
        np.testing.assert_allclose(got, oracle(params, x_SM, slots), rtol=FLOAT32, atol=FLOAT32)
    assigned_KE, kept_KE = aux.sums["assigned_KE"], aux.sums["kept_KE"]
    assert assigned_KE.sum(axis=0).tolist() == [2 * slots] * 3
    assert max_violation(assigned_KE.sum(axis=0)) == 0
    assert not np.any(dropped_fraction(assigned_KE, kept_KE))


def test_ways_agree_in_every_gradient_and_the_router_learns():
    grads = []
    for way in IMPLEMENTATIONS[1:]:
        moe = make_moe(max_experts=2, num_selected_experts=2, run_experts=way)
        params, x = make_values(moe)
        loss = jax.jit(jax.grad(lambda p, x, m=moe: jnp.sum(run(p, x, m)[0] ** 2)))
        grads.append(loss(params, x))
    assert np.abs(grads[0]["router"]["weight"]).max() > 0.01
    for other in grads[1:]:
        for (path, grad), got in zip(
            jax.tree.leaves_with_path(grads[0]), jax.tree.leaves(other), strict=True
        ):
            np.testing.assert_allclose(got, grad, rtol=1e-4, atol=1e-4, err_msg=str(path))


def test_every_evaluation_has_the_slots_of_training():
    moe = make_moe(num_selected_experts=2)
    params, x = make_values(moe)
    assert moe.capacity.train_factor < moe.capacity.eval_factor and not moe.has_capacity
    expected = moe_block(params, x, moe, Call(rng=jax.random.key(0)))[0]
    for call in (Call(), Call(capacity=0.0)):
        np.testing.assert_array_equal(moe_block(params, x, moe, call)[0], expected)
    other = moe_block(params, x, moe, Call(capacity=moe.capacity.eval_factor))[1]
    assert other.sums["assigned_KE"].sum() == 3 * 2 * LENGTH, "every expert takes every token"


def test_a_predictor_in_evaluation_has_the_capacity_of_evaluation():
    moe = make_moe(predictor=1.0)
    assert moe.has_capacity and moe.capacity_factor(training=False) == moe.capacity.eval_factor


# A predictor's logits for the tokens of `PROBS`: A takes all, B takes 0 and 2, C takes none.
FORETOLD = np.array([[1, 2, -1], [1, -2, -1], [1, 1, -3], [1, -1, 0]], np.float32)


@pytest.mark.parametrize(
    ("max_experts", "slots", "expected"),
    [
        (0, 4, [{0: 0.6, 1: 0.3}, {0: 0.5}, {0: 0.2, 1: 0.5}, {0: 0.2}]),
        (1, 4, [{0: 0.6}, {0: 0.5}, {1: 0.5}, {0: 0.2}]),  # the best by the router's own scores
        (0, 2, [{0: 0.6, 1: 0.3}, {0: 0.5}, {1: 0.5}, {}]),  # first come, first served
    ],
)
def test_evaluation_takes_the_experts_that_the_predictor_foretells(max_experts, slots, expected):
    moe = make_moe(max_experts, predictor=1.0)
    # A token holds its log probabilities, which the router reads, and a one-hot index, which the
    # predictor reads.
    x = jnp.asarray(np.hstack([np.log(PROBS), np.eye(4)]), jnp.float32)[None]
    params = {
        "weight": jnp.eye(7, 3),
        "predictor": {
            "weight": jnp.concatenate([jnp.zeros((3, 3)), FORETOLD - 1]),
            "bias": jnp.ones(3),
        },
    }
    valid = jnp.ones((1, 4), jnp.bool_)
    inputs = make_inputs(3, slots, valid)
    routing = moe.router.route(params, x, inputs)
    kept = assign_slots(routing, moe.capacity.queue, inputs.options, valid).kept_GSK
    assert taken(routing._replace(chosen_GSK=kept)) == expected
    nobody = inputs._replace(valid_GS=~valid)
    assert taken(moe.router.route(params, x, nobody)) == [{}] * 4


def test_a_single_expert_takes_every_token_of_an_evaluation_without_a_capacity():
    moe = make_moe(factor=0.5, num_experts=1)
    params, x = make_values(moe)[:2]
    kept = [run(params, x, moe, factor)[1].sums["kept_KE"] for factor in (0.5, 0.0)]
    assert [int(count.sum()) for count in kept] == [LENGTH, 2 * LENGTH]


def test_the_predictor_learns_from_what_experts_take_and_nothing_else_learns_from_it():
    moe = make_moe(predictor=1.0, factor=0.5, num_selected_experts=2)
    params, x = make_values(moe)
    valid = np.ones((2, LENGTH), bool)
    valid[1, 3:] = False

    def loss(params, x, rng):
        aux = run(params, x, moe, segments_BL=valid.astype(np.int32), rng=rng)[1]
        return aux.sums["router_loss"] / aux.sums["num_tokens"]

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, x, jax.random.key(0))
    assert loss(params, x, None) == 0  # in evaluation experts take nothing that could be its target

    router = params["router"]
    logits = x @ router["weight"]
    logits[~valid] = -np.inf
    probs = jax.nn.softmax(logits, axis=-1)
    is_taken = np.zeros((2, LENGTH, 3))
    for b, e in np.ndindex(2, 3):
        is_taken[b, np.argsort(-probs[b, valid[b], e])[:2], e] = 1
    foretold = x @ router["predictor"]["weight"] + router["predictor"]["bias"]
    prob = 1 / (1 + np.exp(-foretold))
    nats = -np.log(np.where(is_taken, prob, 1 - prob))[valid]
    np.testing.assert_allclose(value, nats.mean(), rtol=FLOAT32)
    error = np.where(valid[..., None], prob - is_taken, 0) / nats.size
    expected = jax.tree.map(np.zeros_like, params)
    expected["router"]["predictor"] = {
        "weight": np.einsum("bsm,bse->me", x, error),
        "bias": error.sum(axis=(0, 1)),
    }
    for (path, grad), wanted in zip(
        jax.tree.leaves_with_path(grads[0]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-6, err_msg=str(path))
    assert not np.any(grads[1])


@pytest.mark.parametrize("factor", [0, None])
def test_the_probe_finds_the_leak(factor):
    moe = make_moe(num_selected_experts=1)
    params, x = make_values(moe)
    output = jax.jit(lambda x: run(params, x, moe, factor)[0])
    moved = []
    for seed in range(8):
        other = x.copy()
        other[:, 4:] = 2 * np.random.default_rng(seed).normal(size=(2, 2, MODEL_DIM))
        moved.append(np.abs(output(other) - output(x))[:, :4].max())
    assert max(moved) > 1e-2


def test_it_looks_ahead_unless_a_predictor_stands_in():
    assert make_moe().looks_ahead(training=True) and make_moe().looks_ahead(training=False)
    foretold = make_moe(predictor=1.0)
    assert foretold.looks_ahead(training=True) and not foretold.looks_ahead(training=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"router": ExpertChoice(), "capacity": Capacity(train_factor=0, eval_factor=0)},
            r"expert choice needs a capacity, .*: capacity\.train_factor=0",
        ),
        (
            {"router": ExpertChoice(), "capacity": Capacity(queue=RandomOrder(), eval_factor=0)},
            r"cannot use a random queue, .*: capacity\.queue=RandomOrder",
        ),
        (
            {"router": ExpertChoice(max_experts=9)},
            r"max_experts must be at most num_experts: max_experts=9, num_experts=8",
        ),
        (
            {
                "router": ExpertChoice(predictor_loss_weight=1.0),
                "capacity": Capacity(queue=ChoiceMajor()),
            },
            r"needs a causal queue too: .*queue=ChoiceMajor\(\), capacity\.eval_factor=2\.0\.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoE(**settings)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("expert_choice", "top_p"),
        ("token_choice", "max_experts"),
        ("token_choice", "predictor_loss_weight"),
    ],
)
def test_fields_of_the_other_families_are_refused(kind, name):
    with pytest.raises(ValueError, match=rf"r has the fields \[.*\]: r\.{name}\."):
        build(Router, {"kind": kind, name: 2}, "r")
