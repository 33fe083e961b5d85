"""Expert choice, by hand-worked tables, by its invariants and with every dispatcher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import CapacityConfig, MoEConfig, RouterConfig
from moe_jax.moe.block import moe_block
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.parameters import moe_specs
from moe_jax.moe.routing import RouterInputs, route_tokens

FLOAT32 = 5e-6
LENGTH, MODEL_DIM = 6, 4

# Four tokens, three experts A, B, C. Best two tokens of A: 0 (.6), 1 (.5); of B: 2 (.5), 3 (.4),
# before 0 (.3); of C: 1 (.4), 3 (.4).
PROBS = np.array([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3], [0.2, 0.4, 0.4]], np.float32)


def make_config(max_experts=0, factor=1.0, **settings):
    router = RouterConfig(kind="expert_choice", max_experts=max_experts)
    capacity = CapacityConfig(train_factor=factor)
    settings = {"num_experts": 3, "expert_dim": 5, "dispatch": "einsum"} | settings
    return MoEConfig(allow_noncausal_routing=True, router=router, capacity=capacity, **settings)


def route_probs(probs, slots, max_experts=0, valid=None):
    shape = (1, len(probs))
    valid = jnp.ones(shape, jnp.bool_) if valid is None else jnp.asarray(valid)[None]
    inputs = RouterInputs(None, None, valid, slots, jnp.zeros(shape, jnp.int32), None, None)
    params = {"router": jnp.eye(probs.shape[1])}
    config = make_config(max_experts, num_experts=probs.shape[1])
    return route_tokens(jnp.log(jnp.asarray(probs))[None], params, config, inputs)


def taken(routing):
    """Experts of each token with their gates."""
    parts = (routing.expert_index_GSK, routing.gate_GSK, routing.chosen_GSK)
    rows = zip(*(np.asarray(part[0]) for part in parts), strict=True)
    return [{int(e): round(float(g), 5) for e, g, c in zip(*row, strict=True) if c} for row in rows]


def test_every_expert_takes_its_best_tokens():
    assert taken(route_probs(PROBS, 2)) == [{0: 0.6}, {0: 0.5, 2: 0.4}, {1: 0.5}, {1: 0.4, 2: 0.4}]
    # One slot: C's tie of tokens 1 and 3 goes to the earlier.
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


def make_values(config, seed=0):
    random = np.random.default_rng(seed)
    specs = moe_specs(config, MODEL_DIM)
    params = {n: random.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
    return params, random.normal(size=(2, LENGTH, MODEL_DIM)).astype(np.float32)


def oracle(params, x_SM, slots):
    """A group, expert by expert, in float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    logits = x_SM.astype(np.float64) @ params["router"]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = np.zeros(x_SM.shape)
    for e in range(probs.shape[1]):
        for s in np.argsort(-probs[:, e], kind="stable")[:slots]:
            hidden = np.maximum(x_SM[s] @ params["wi"][e], 0)
            y[s] += probs[s, e] * hidden @ params["wo"][e]
    return y


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_block_equals_the_oracle_and_is_balanced(dispatch, factor):
    config = make_config(factor=factor, num_selected_experts=2, dispatch=dispatch)
    slots = {0.5: 2, 1.5: 6}[factor]  # 6 tokens * 2 choices * factor / 3 experts
    params, x = make_values(config)
    y, aux = jax.jit(lambda p, x: moe_block(p, x, config))(params, x)
    for got, x_SM in zip(y, x, strict=True):
        np.testing.assert_allclose(got, oracle(params, x_SM, slots), rtol=FLOAT32, atol=FLOAT32)
    assert aux.assigned_KE.sum(axis=0).tolist() == [2 * slots] * 3
    assert aux.max_violation == 0 and not np.any(aux.dropped_fraction_K)


def test_dispatchers_agree_in_every_gradient_and_the_router_learns():
    grads = []
    for dispatch in DISPATCHERS:
        config = make_config(max_experts=2, num_selected_experts=2, dispatch=dispatch)
        params, x = make_values(config)
        loss = jax.jit(jax.grad(lambda p, x, c=config: jnp.sum(moe_block(p, x, c)[0] ** 2)))
        grads.append(loss(params, x))
    assert np.abs(grads[0]["router"]).max() > 0.01
    for other in grads[1:]:
        for name, grad in grads[0].items():
            np.testing.assert_allclose(other[name], grad, rtol=1e-4, atol=1e-4, err_msg=name)


def test_evaluation_without_a_capacity_takes_that_of_training():
    config = make_config(num_selected_experts=2)
    params, x = make_values(config)
    dropless, _ = moe_block(params, x, config, capacity_factor=0)
    np.testing.assert_array_equal(dropless, moe_block(params, x, config)[0])


@pytest.mark.parametrize("factor", [0, None])
def test_the_probe_finds_the_leak(factor):
    config = make_config(num_selected_experts=1)
    params, x = make_values(config)
    run = jax.jit(lambda x: moe_block(params, x, config, capacity_factor=factor)[0])
    moved = []
    for seed in range(8):
        other = x.copy()
        other[:, 4:] = 2 * np.random.default_rng(seed).normal(size=(2, 2, MODEL_DIM))
        moved.append(np.abs(run(other) - run(x))[:, :4].max())
    assert max(moved) > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"router": RouterConfig(kind="expert_choice")},
            r"experts of a token must not depend on later tokens: router\.kind='expert_choice'",
        ),
        (
            {
                "router": RouterConfig(kind="expert_choice"),
                "capacity": CapacityConfig(train_factor=0, eval_factor=0),
                "allow_noncausal_routing": True,
            },
            r"expert choice needs a capacity: capacity\.train_factor=0",
        ),
        (
            {
                "router": RouterConfig(kind="expert_choice", max_experts=9),
                "allow_noncausal_routing": True,
            },
            r"max_experts is at most moe\.num_experts: max_experts=9, num_experts=8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


def test_fields_of_the_other_families_are_refused():
    with pytest.raises(ValueError, match=r"'expert_choice' does not use router\.top_p: top_p=0\.5"):
        RouterConfig(kind="expert_choice", top_p=0.5)
    with pytest.raises(ValueError, match=r"max_experts is of router\.kind='expert_choice'"):
        RouterConfig(max_experts=2)
