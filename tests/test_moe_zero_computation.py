"""Zero and copy experts equal loops over tokens and choices: values, counts and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.balance import named_losses
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import BatchPrioritized
from moe_jax.moe.routing.assignment import Sinkhorn
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.fixed import Hash
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS
from moe_jax.moe.statistics import dropped_fraction
from moe_jax.part import Call, Dims, Own
from tests.slow import slow_but
from tests.tiny_run import quick_jit

FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
LENGTH, MODEL_DIM, K = 10, 4, 2
E, ZERO, COPY = 3, 1, 2
VALID = np.arange(2 * LENGTH).reshape(2, LENGTH) < 17


def make_moe(**settings):
    settings = {
        "num_experts": E, "num_selected_experts": K, "num_zero_experts": ZERO,
        "num_copy_experts": COPY, "expert_dim": 5, "capacity": Capacity(train_factor=0.9),
        "router": TokenChoice(renormalize=True),
    } | settings  # fmt: skip
    return MoE(**settings)


def make_values(moe):
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), moe.specs(Dims(MODEL_DIM))
    )
    return params, random.normal(size=(2, LENGTH, MODEL_DIM)).astype(np.float32)


def run(params, x, moe, own=None, **told):
    """Runs the block with the capacity of training."""
    return moe_block(params, x, moe, Call(capacity=moe.capacity.train_factor, **told), own)


def decide(params, x, slots):
    """Each token's choices, [2, L, K], and which of them are kept."""
    logits = x.astype(np.float64) @ params["router"]["weight"]
    index = np.argsort(-logits, axis=-1)[..., :K]
    kept = np.zeros(index.shape, bool)
    for b in range(2):
        load = np.zeros(E + ZERO + COPY, int)
        for s, k in np.ndindex(LENGTH, K):
            expert = index[b, s, k]
            kept[b, s, k] = VALID[b, s] and (expert >= E or load[expert] < slots)
            load[expert] += VALID[b, s]
    return index, kept


def dense(params, x, index, kept):
    """The block with every expert computing every token and with fixed decisions."""
    probs = jax.nn.softmax(x @ params["router"]["weight"], axis=-1)
    chosen = jax.nn.one_hot(index, E + ZERO + COPY)
    gate = jnp.sum(probs[..., None, :] * chosen, axis=-1)
    gate = gate / gate.sum(axis=-1, keepdims=True) * kept
    hidden = jnp.maximum(jnp.einsum("bsm,emh->bseh", x, params["experts"]["wi"]), 0)
    computed = jnp.einsum("bseh,ehm->bsem", hidden, params["experts"]["wo"])
    nothing = jnp.zeros((*x.shape[:2], ZERO, MODEL_DIM))
    copies = jnp.repeat(x[:, :, None], COPY, axis=2)
    outputs = jnp.concatenate([computed, nothing, copies], axis=2)
    return jnp.einsum("bsk,bske,bsem->bsm", gate, chosen, outputs)


@pytest.mark.parametrize("way", slow_but(["gather", "ragged"], IMPLEMENTATIONS[1:]))
def test_values_gradients_and_counts(way):
    moe = make_moe(run_experts=way)
    params, x = make_values(moe)
    assert (
        params["router"]["weight"].shape == (MODEL_DIM, 6) and params["experts"]["wi"].shape[0] == E
    )
    index, kept = decide(params, x, slots=3)  # 10 tokens * 2 choices / 6 options * 0.9
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def objective(params, x):
        y, aux = run(params, x, moe, segments_BL=jnp.asarray(VALID, jnp.int32))
        return jnp.sum(y * dy), (y, aux)

    grads, (y, aux) = quick_jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(y, dense(params, x, index, kept), **FLOAT32)
    expected = jax.grad(lambda p, x: jnp.sum(dense(p, x, index, kept) * dy), argnums=(0, 1))
    for got, wanted in zip(*map(jax.tree.leaves, (grads, expected(params, x))), strict=True):
        np.testing.assert_allclose(got, wanted, **FLOAT32)

    options = np.arange(E + ZERO + COPY)
    assigned_KE = np.sum((index[..., None] == options) & VALID[..., None, None], axis=(0, 1))
    got_KE, kept_KE = aux.sums["assigned_KE"], aux.sums["kept_KE"]
    np.testing.assert_array_equal(got_KE, assigned_KE)
    np.testing.assert_array_equal(
        kept_KE, np.sum((index[..., None] == options) & kept[..., None], axis=(0, 1))
    )
    assert dropped_fraction(got_KE, kept_KE).max() > 0, "some expert is full"
    np.testing.assert_array_equal(kept_KE[:, E:], assigned_KE[:, E:])
    assert assigned_KE[:, E:].any(axis=0).all(), "every kind is chosen"

    prob_E = np.asarray(jax.nn.softmax(x @ params["router"]["weight"], axis=-1))[VALID].mean(axis=0)
    mean_prob_E = aux.sums["prob_sum_E"] / aux.sums["num_tokens"]
    np.testing.assert_allclose(mean_prob_E, prob_E, **FLOAT32)
    share_E = assigned_KE.sum(axis=0) / assigned_KE.sum()
    loss = dict(named_losses(moe.losses))["load_balance_loss"]
    sums = jax.tree.map(lambda leaf: leaf[None], aux.sums["losses"]["load_balance_loss"])
    got = loss.by_layer(sums, aux.sums["num_tokens"])
    np.testing.assert_allclose(got, 6 * share_E @ prob_E, rtol=1e-5)


def test_a_single_expert_and_a_zero_expert_have_a_router_between_them():
    moe = make_moe(
        num_experts=1, num_selected_experts=1, num_copy_experts=0, router=TokenChoice(),
        run_experts="einsum", capacity=Capacity(train_factor=0),
    )  # fmt: skip
    params, x = make_values(moe)
    y, aux = run(params, x, moe)
    prob = jax.nn.softmax(x @ params["router"]["weight"], axis=-1)
    computed = np.maximum(x @ params["experts"]["wi"][0], 0) @ params["experts"]["wo"][0]
    expected = np.where(prob[..., :1] > 0.5, prob[..., :1] * computed, 0)
    np.testing.assert_allclose(y, expected, **FLOAT32)
    assigned_KE = aux.sums["assigned_KE"]
    assert assigned_KE.sum() == 2 * LENGTH and assigned_KE.all()


def test_tokens_sure_of_an_expert_that_computes_nothing_are_not_served_first():
    """Two tokens want expert 0's one slot; the first token is surer, but of the zero expert."""
    probs = np.array([[0.25, 0.05, 0.7], [0.4, 0.5, 0.1]])
    moe = make_moe(
        num_experts=2, num_zero_experts=1, num_copy_experts=0, router=TokenChoice(),
        run_experts="einsum",
        capacity=Capacity(train_factor=0.5, queue=BatchPrioritized()),
    )  # fmt: skip
    params, _ = make_values(moe)
    params["router"]["weight"] = np.eye(MODEL_DIM, 3, dtype=np.float32)
    x = np.pad(np.log(probs), ((0, 0), (0, 1)))[None].astype(np.float32)
    aux = run(params, x, moe, record=True)[1]
    assert aux.choices.expert_index.tolist() == [[[2, 0], [1, 0]]]
    assert aux.choices.kept.tolist() == [[[True, False], [True, True]]]


def test_the_selection_bias_is_of_all_options():
    moe = make_moe(bias=SignUpdate(rate=0.1), run_experts="einsum")
    assert moe.state_specs(Dims(MODEL_DIM))["bias_E"].shape == (6,)
    params, x = make_values(moe)
    own = Own(state={"bias_E": jnp.array([0.0, 0, 0, 9, 0, 0])})
    aux = run(params, x, moe, own)[1]
    assert aux.sums["assigned_KE"][0].tolist() == [0, 0, 0, 20, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_zero_experts": -1}, r"num_zero_experts lies in \[0, inf\): num_zero_experts=-1"),
        (
            {"router": Hash()},
            r"a router in which tokens choose: num_zero_experts=1, num_copy_experts=2",
        ),
        (
            {"router": ExpertChoice()},
            r"a router in which tokens choose: .*num_copy_experts=2, router=ExpertChoice",
        ),
        ({"router": Sinkhorn()}, r"a router in which tokens choose: .*router=Sinkhorn"),
        (
            {"router": TokenChoice(groups=ExpertGroups(3, 2))},
            r"zero and copy experts: .*router\.groups=ExpertGroups\(num_groups=3",
        ),
        (
            {"num_experts": 1, "num_selected_experts": 1},
            r"a renormalised gate, or .*: .*renormalised: True",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_moe(**settings)
