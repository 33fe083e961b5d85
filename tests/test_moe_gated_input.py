"""Gates on expert inputs: by hand, and against loops over tokens and choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.soft import Soft
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS
from moe_jax.part import Call, Dims
from tests.slow import slow_but

FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
LENGTH, MODEL_DIM, E, K, SLOTS = 8, 4, 4, 2, 3
VALID = np.arange(2 * LENGTH).reshape(2, LENGTH) < 14


def test_a_token_of_llama_4_by_hand():
    """Two numbers per token: the first is 2 or 4, the second a logit for odds 3 : 1."""
    moe = MoE(
        num_experts=2, expert_dim=1, use_bias=True, run_experts="einsum", shared_expert_dim=1,
        router=TokenChoice(score=Sigmoid()), gate_on_input=True,
    )  # fmt: skip
    params = {
        "router": {"weight": np.array([[0, 0], [1, -1]])},
        "experts": {
            "wi": np.array([[[1], [0]], [[0], [0]]]), "bi": np.array([[-1], [0]]),
            "wo": np.array([[[10, 0]], [[0, 0]]]), "bo": np.array([[0.5, 0], [9, 9]]),
        },
        "shared": {
            "wi": np.array([[1], [0]]), "bi": np.zeros(1),
            "wo": np.array([[0, 1]]), "bo": np.zeros(2),
        },
    }  # fmt: skip
    params = jax.tree.map(lambda value: value.astype(np.float32), params)
    x = np.array([[[2, np.log(3)], [4, np.log(3)]]], np.float32)
    y, aux = moe_block(params, x, moe, Call(capacity=1.0))
    # The gated token is 3/4 of 2, so the expert gives 10 relu(1.5 - 1) + 0.5. The shared expert
    # gets the ungated token. The second token finds the expert full, and must not get its bias.
    np.testing.assert_allclose(y, [[[5.5, 2], [0, 4]]], rtol=1e-6)
    assert aux.sums["kept_KE"].tolist() == [[1, 0]]


def make_block(way):
    moe = MoE(
        num_experts=E, num_selected_experts=K, expert_dim=5, activation=SwiGLU(), use_bias=True,
        run_experts=way, capacity=Capacity(train_factor=0.75), gate_on_input=True,
        router=TokenChoice(score=Sigmoid(), scaling_factor=1.5),
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: random.normal(size=s.shape).astype(np.float32), moe.specs(Dims(MODEL_DIM))
    )
    x, dy = random.normal(size=(2, 2, LENGTH, MODEL_DIM)).astype(np.float32)
    return moe, params, x, dy


def expert(x, w, e, np=np):
    gate, inner = x @ w["wg"][e] + w["bg"][e], x @ w["wi"][e] + w["bi"][e]
    return gate / (1 + np.exp(-gate)) * inner @ w["wo"][e] + w["bo"][e]


def loops(params, x):
    """Output, choices and kept choices, token by token in float64."""
    params = jax.tree.map(lambda value: value.astype(np.float64), params)
    w, router = params["experts"], params["router"]["weight"]
    y, index = np.zeros(x.shape), np.zeros((2, LENGTH, K), int)
    kept = np.zeros(index.shape, bool)
    for b in range(2):
        load = np.zeros(E, int)
        for s in range(LENGTH):
            token = x[b, s].astype(np.float64)
            logits = token @ router
            index[b, s] = np.argsort(-logits)[:K]
            for k, e in enumerate(index[b, s]):
                kept[b, s, k] = VALID[b, s] and load[e] < SLOTS
                load[e] += VALID[b, s]
                if kept[b, s, k]:
                    y[b, s] += expert(1.5 / (1 + np.exp(-logits[e])) * token, w, e)
    return y, index, kept


def dense(params, x, index, kept):
    """The same, differentiable: every expert computes every token, and the decisions are fixed."""
    gates = 1.5 * jax.nn.sigmoid(x @ params["router"]["weight"])
    y = 0
    for e in range(E):
        is_used = jnp.any((index == e) & kept, axis=-1)[..., None]
        y += is_used * expert(gates[..., e, None] * x, params["experts"], e, jnp)
    return y


@pytest.mark.parametrize(
    "way", slow_but(["einsum", "ragged"], [w for w in IMPLEMENTATIONS if w != "auto"])
)
def test_values_and_gradients(way):
    moe, params, x, dy = make_block(way)
    expected_y, index, kept = loops(params, x)
    assert 0 < kept.sum() < K * VALID.sum()

    call = Call(segments_BL=jnp.asarray(VALID, jnp.int32), capacity=0.75)

    def objective(params, x):
        y, aux = moe_block(params, x, moe, call)
        return jnp.sum(y * dy), (y, aux)

    grads, (y, aux) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(y, expected_y, **FLOAT32)
    assert aux.sums["kept_KE"].sum() == kept.sum()
    by_dense = jax.grad(lambda p, x: jnp.sum(dense(p, x, index, kept) * dy), argnums=(0, 1))
    expected = by_dense(params, x)
    assert np.abs(expected[0]["router"]["weight"]).max() > 0.1
    for got, wanted in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(got, wanted, **FLOAT32)


def test_where_there_is_no_gate_of_a_choice_it_is_refused():
    with pytest.raises(ValueError, match=r"one way to run its experts, .*gate_on_input=True\."):
        MoE(router=Soft(), group_size=LENGTH, gate_on_input=True)
