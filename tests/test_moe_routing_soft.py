"""Soft MoE against a loop over tokens and slots; what changes it, and what must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import build
from moe_jax.moe.balance import Importance, named_losses
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import RandomOrder
from moe_jax.moe.routing import Router
from moe_jax.moe.routing.soft import Soft
from moe_jax.moe.statistics import dropped_fraction
from moe_jax.part import Call, Dims

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
LENGTH, MODEL_DIM, E = 6, 4, 3
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)


def make_moe(**settings):
    settings = {
        "num_experts": E, "num_selected_experts": 2, "expert_dim": 5, "group_size": LENGTH,
        "capacity": Capacity(train_factor=0.5),
    } | settings  # fmt: skip
    return MoE(router=Soft(scaling_factor=1.5), **settings)


def make_values(moe, seed=0):
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), moe.specs(Dims(MODEL_DIM))
    )
    params["router"]["scale"] = np.array([3.0], np.float32)
    return params, random.normal(size=(2, LENGTH, MODEL_DIM)).astype(np.float32)


def run(params, x, moe, valid=None):
    """Runs the block with the capacity of training."""
    segments = None if valid is None else valid.astype(np.int32)
    call = Call(segments_BL=segments, capacity=moe.capacity.train_factor)
    return moe_block(params, x, moe, call)


def oracle(params, x_SM, valid_S, scaling_factor):
    """One group in float64, slot by slot: the output, and each token's weight per expert."""
    tokens = np.flatnonzero(valid_S)
    router, experts = params["router"], params["experts"]
    phi_MP = router["weight"].astype(np.float64)
    weights_SP = np.zeros((len(x_SM), phi_MP.shape[1]))
    for s, p in np.ndindex(weights_SP.shape):
        x_M, phi_M = x_SM[s].astype(np.float64), phi_MP[:, p]
        cosine = x_M @ phi_M / np.linalg.norm(x_M) / np.linalg.norm(phi_M)
        weights_SP[s, p] = np.exp(router["scale"][0] * cosine)
    slots = phi_MP.shape[1] // E
    y_SM, weight_SE = np.zeros(x_SM.shape), np.zeros((len(x_SM), E))
    for p in range(phi_MP.shape[1]):
        e, total = p // slots, weights_SP[tokens, p].sum()
        slot_M = sum(weights_SP[s, p] / total * x_SM[s] for s in tokens)
        out_M = np.maximum(slot_M @ experts["wi"][e], 0) @ experts["wo"][e]
        for s in tokens:
            share = weights_SP[s, p] / weights_SP[s].sum()
            y_SM[s] += scaling_factor * share * out_M
            weight_SE[s, e] += share
    return y_SM, weight_SE


def test_block_equals_the_oracle_and_says_what_experts_weigh():
    moe = make_moe()
    params, x = make_values(moe)
    assert params["router"]["weight"].shape == (MODEL_DIM, E * 2)  # 6 tokens * 2 / 3 experts * 0.5
    y, aux = run(params, x, moe, VALID)
    pairs = [oracle(params, *group, 1.5) for group in zip(x, VALID, strict=True)]
    np.testing.assert_allclose(y, [y_SM for y_SM, _ in pairs], **FLOAT32)

    weight_BSE = np.stack([weight_SE for _, weight_SE in pairs])
    sums = aux.sums
    mean_prob_E = sums["prob_sum_E"] / sums["num_tokens"]
    np.testing.assert_allclose(mean_prob_E, weight_BSE[VALID].mean(axis=0), **FLOAT32)
    best_BS = np.where(VALID, weight_BSE.argmax(axis=-1), E)
    best_BE = np.stack([np.bincount(best_S, minlength=E + 1)[:E] for best_S in best_BS])
    np.testing.assert_array_equal(aux.sequences["assigned_BE"], best_BE)
    np.testing.assert_array_equal(sums["assigned_KE"], best_BE.sum(axis=0, keepdims=True))
    np.testing.assert_array_equal(sums["kept_KE"], sums["assigned_KE"])
    assert sums["num_tokens"] == VALID.sum()
    assert dropped_fraction(sums["assigned_KE"], sums["kept_KE"]).tolist() == [0]


def test_padding_has_no_weight_and_a_group_of_it_no_output():
    moe = make_moe()
    params, x = make_values(moe)
    other = np.where(VALID[..., None], x, 100)
    valid = VALID.copy()
    expected, _ = run(params, x, moe, valid)
    np.testing.assert_array_equal(run(params, other, moe, valid)[0], expected)
    valid[1] = False

    def total(params, x):
        y, aux = run(params, x, moe, valid)
        return jnp.sum(y**2), (y, aux)

    grads, (y, aux) = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    np.testing.assert_array_equal(y[0], expected[0])
    assert not np.any(y[1]) and not np.any(grads[1][1])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads, aux)))


def test_every_parameter_learns_but_nothing_is_balanced():
    moe = make_moe()
    params, x = make_values(moe)

    def terms(params):
        y, aux = run(params, x, moe)
        (name, loss), _ = named_losses(moe.losses)
        assert name == "load_balance_loss"
        sums = jax.tree.map(lambda leaf: leaf[None], aux.sums["losses"][name])
        return jnp.stack([jnp.sum(y**2), loss.by_layer(sums, aux.sums["num_tokens"])[0]])

    grads = jax.jacrev(terms)(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.abs(grad[0]).max() > 1e-3, path
        assert not np.any(grad[1]), path


def test_evaluation_has_the_slots_of_training_and_order_does_not_matter():
    moe = make_moe()
    params, x = make_values(moe)
    y, _ = run(params, x, moe)
    np.testing.assert_array_equal(moe_block(params, x, moe, Call(capacity=0.0))[0], y)
    turned, _ = run(params, x[:, ::-1], moe)
    np.testing.assert_allclose(turned[:, ::-1], y, **FLOAT32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 1, "num_selected_experts": 1}, r"two experts or more.*num_experts=1"),
        ({"group_size": 0}, r"Soft MoE needs group_size.*group_size=0.*group_size to data"),
        ({"capacity": Capacity(train_factor=0)}, r"needs group_size.*train_factor=0"),
        (
            {"capacity": Capacity(queue=RandomOrder(), eval_factor=0)},
            r"has no queue: .*=RandomOrder",
        ),
        ({"run_experts": "gather"}, r"one way to run its experts, .*: run_experts='gather'"),
        ({"exchange": "explicit"}, r"one way to run its experts, .*exchange='explicit'"),
        ({"gate_on_input": True}, r"one way to run its experts, .*gate_on_input=True"),
        ({"losses": (Importance(weight=0.1),)}, r"importance_loss needs a router whose prob"),
        ({"bias": SignUpdate(rate=0.1)}, r"needs a router that selects"),
        ({"eval_num_selected_experts": 3}, r"the same slots in training and in evaluation"),
        ({"num_zero_experts": 1}, r"zero and copy experts need a router in which tokens choose"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_moe(**settings)


def test_fields_of_choices_are_refused():
    with pytest.raises(ValueError, match=r"r has the fields \[.*\]: r\.projection\."):
        build(Router, {"kind": "soft", "projection": "linear"}, "r")


def test_it_looks_ahead_always():
    assert make_moe().looks_ahead(training=True) and make_moe().looks_ahead(training=False)
