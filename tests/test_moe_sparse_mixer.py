"""SparseMixer: choices and gates by hand, draws by frequency, gradients by the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Choices, Options, RouterInputs
from moe_jax.moe.routing.sparse_mixer import SparseMixer, next_choice
from moe_jax.part import Call, Dims
from tests.tiny_run import quick_jit

FLOAT32 = 1e-6
# With jitter .1 an expert of logit l is close to the best, b, if b - l <= .2 max(|l|, b).
ROUTER = SparseMixer(jitter=0.1)
LOGITS = np.array(
    [
        [2.0, 1.7, 1.6, 0.5],  # close to 2: 1.7 and 1.6, at most .4 below
        [2.0, 1.5, 1.3, 1.1],  # none is close to 2; 1.3 is close to 1.5 (.2 * 1.5 = .3), 1.1 is not
        [-2.0, -2.3, -2.6, -9.0],  # .3 / 2.3 and .6 / 2.6: the second is close, the third is not
    ],
    np.float32,
)


def route(logits, router=ROUTER, **arguments):
    """Routes one group of tokens that are their own logits to two experts."""
    x = jnp.asarray(logits)[None]
    num_experts = x.shape[-1]
    options = Options(num_experts, num_experts, 2, x.shape[1])
    valid, positions = jnp.ones(x.shape[:2], jnp.bool_), jnp.zeros(x.shape[:2], jnp.int32)
    inputs = RouterInputs(options, valid, positions, **arguments)
    return router.route({"weight": jnp.eye(num_experts)}, x, inputs)


def softmax(*logits):
    e = np.exp(np.array(logits))
    return e / e.sum()


def test_evaluation_by_hand():
    routing = route(LOGITS)
    assert routing.expert_index_GSK[0].tolist() == [[0, 1], [0, 1], [0, 1]]
    # A softmax over the best and those close to it; then likewise without the first choice.
    expected = [
        [softmax(2.0, 1.7, 1.6)[0], softmax(1.7, 1.6)[0]],
        [1.0, softmax(1.5, 1.3)[0]],
        # -2.6 is close to -2.3: .3 / 2.6.
        [softmax(-2.0, -2.3)[0], softmax(-2.3, -2.6)[0]],
    ]
    np.testing.assert_allclose(routing.gate_GSK[0], expected, rtol=FLOAT32)
    np.testing.assert_allclose(routing.probs_GSE[0, 0], softmax(*LOGITS[0]), rtol=1e-5)
    assert routing.chosen_GSK.all()


@pytest.mark.slow
def test_draws_stay_close_to_the_best_and_most_others_have_a_third_of_their_gate():
    number = 6000
    routing = route(np.tile(LOGITS[:1], (number, 1)), rng=jax.random.key(0))
    first, second = np.asarray(routing.expert_index_GSK[0]).T
    gate = np.asarray(routing.gate_GSK[0, :, 0])
    probs = softmax(2.0, 1.7, 1.6)
    deviation = 4 * 0.5 / number**0.5
    share = np.bincount(first, minlength=4) / number
    np.testing.assert_allclose(share, [*probs, 0], atol=deviation)
    assert (second < 3).all() and (first != second).all()
    np.testing.assert_allclose(gate[first == 0], probs[0], rtol=FLOAT32)
    for expert in (1, 2):
        drawn = gate[first == expert]
        whole = np.isclose(drawn, probs[expert])
        np.testing.assert_allclose(drawn[~whole], 0.3333 * probs[expert], rtol=FLOAT32)
        assert np.mean(whole) == pytest.approx(0.25, abs=4 * 0.5 / len(drawn) ** 0.5)


def test_the_gradient_is_that_of_the_whole_gate_whatever_was_cut():
    logits = jnp.asarray(np.tile(LOGITS[:1], (200, 1)))[None]
    left = jnp.ones(logits.shape, jnp.bool_).at[..., 1].set(False)  # expert 1 was chosen first
    dy = jnp.asarray(np.random.default_rng(0).normal(size=(1, 200)).astype(np.float32))

    def weighted(logits):
        index, gate = next_choice(logits, left, 0.1, jax.random.key(1))
        return jnp.sum(gate * dy), (index, gate)

    gradient, (index, gate) = jax.grad(weighted, has_aux=True)(logits)
    probs = np.zeros(4)
    probs[[0, 2]] = softmax(2.0, 1.6)
    chosen = np.eye(4)[np.asarray(index[0])]
    whole = chosen @ probs
    assert len(np.unique(np.round(gate[0] / whole, 3))) == 2  # both kinds of gates occur
    expected = (np.asarray(dy[0]) * whole)[:, None] * (chosen - probs)
    np.testing.assert_allclose(gradient[0], expected, atol=FLOAT32)


def test_a_replayed_expert_has_a_gate_also_far_from_the_best():
    replay = Choices(jnp.array([[[3, 0]]]), jnp.ones((1, 1, 2), jnp.bool_))
    routing = route(LOGITS[:1], replay=replay)
    assert routing.expert_index_GSK.tolist() == [[[3, 0]]]
    expected = [softmax(2.0, 1.7, 1.6, 0.5)[3], softmax(2.0, 1.7, 1.6)[0]]
    np.testing.assert_allclose(routing.gate_GSK[0, 0], expected, rtol=FLOAT32)


@pytest.mark.parametrize("rng", [None, jax.random.key(0)])
def test_logits_of_zero_are_all_close(rng):
    with jax.debug_nans(True):
        routing = route(np.zeros((1, 4), np.float32), rng=rng)
    assert np.all(np.isfinite(routing.gate_GSK))
    first, second = routing.expert_index_GSK[0, 0]
    assert first != second


def test_the_router_learns_in_training_and_without_jitter_is_refused():
    moe = MoE(num_experts=4, num_selected_experts=2, expert_dim=4, router=SparseMixer(jitter=0.4))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.normal(size=s.shape), moe.specs(Dims(3)))
    x = jnp.asarray(random.normal(size=(2, 5, 3)), jnp.float32)
    call = Call(rng=jax.random.key(0)).with_defaults(x)

    def total(router):
        y_BLM, _ = moe_block({**params, "router": router}, x, moe, call)
        return jnp.sum(y_BLM**2)

    assert np.abs(quick_jit(jax.grad(total))(params["router"])["weight"]).max() > 0.1
    with pytest.raises(ValueError, match=r"every gate is 1.*jitter=0\.0"):
        MoE(num_selected_experts=2, router=SparseMixer(jitter=0.0))
