"""BASE and Sinkhorn: assignments against SciPy and NumPy, and the routers that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moe_jax.config import build
from moe_jax.moe.balance import Load
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Router, RouterInputs, auction
from moe_jax.moe.routing.assignment import SHARE_TOLERANCE, Base, Sinkhorn, sinkhorn_potentials
from moe_jax.moe.routing.auction import balanced_assignment
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.noise import Learned
from moe_jax.part import Call, Dims
from tests.tiny_run import quick_jit

TOKENS, E, MODEL_DIM = 30, 4, 5
RANDOM = np.random.default_rng(0)
AFFINITIES = {
    "normal": RANDOM.normal(size=(TOKENS, E)),
    "small": 1e-4 * RANDOM.normal(size=(TOKENS, E)),
    "all want one": 0.1 * RANDOM.normal(size=(TOKENS, E)) + [5, 0, 0, 0],
    "all want the same two": 0.1 * RANDOM.normal(size=(TOKENS, E)) + [5, 5, 0, 0],
    "few kinds of token": np.repeat(RANDOM.normal(size=(3, E)), TOKENS // 3, axis=0),
    # Integers: the bound is below 1, so the sum is exactly the best.
    "integers": RANDOM.integers(0, 10, size=(TOKENS, E)),
    "equal": np.zeros((TOKENS, E)),
    "large offsets": RANDOM.normal(size=(TOKENS, E)) + 100 * RANDOM.normal(size=(TOKENS, 1)),
}
assign = quick_jit(balanced_assignment)


@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("num_valid", [TOKENS, 29, 16, 3])
def test_the_auction_is_balanced_and_nearly_as_good_as_the_best(name, num_valid):
    affinity = AFFINITIES[name].astype(np.float32)
    valid = np.arange(TOKENS) % 16 < num_valid if num_valid == 16 else np.arange(TOKENS) < num_valid
    num_valid, affinity_VE = int(valid.sum()), affinity[valid].astype(np.float64)
    expert = np.asarray(assign(affinity, valid))
    assert not expert[~valid].any() and expert.min() >= 0
    places = -(-num_valid // E)
    assert np.bincount(expert[valid], minlength=E).max() <= places

    by_place = np.repeat(affinity_VE, places, axis=1)
    best = by_place[linear_sum_assignment(by_place, maximize=True)].sum()
    got = affinity_VE[np.arange(num_valid), expert[valid]].sum()
    spread = (affinity_VE.max(axis=1) - affinity_VE.min(axis=1)).max()
    bound = num_valid * spread * auction.STEPS[-1]
    assert best - bound - 1e-5 * np.abs(affinity_VE).sum() <= got
    if name == "integers":
        assert bound < 1 and got == best


def test_an_auction_cut_short_or_of_no_numbers_is_balanced_all_the_same(monkeypatch):
    valid = np.arange(TOKENS) != 7
    nothing = np.full((TOKENS, E), np.nan, np.float32)
    expert = np.asarray(assign(nothing, valid))
    assert sorted(np.bincount(expert[valid])) == [5, 8, 8, 8]
    monkeypatch.setattr(auction, "MAX_ROUNDS", 1)
    crowded = AFFINITIES["all want one"].astype(np.float32)
    expert = np.asarray(jax.jit(lambda *a: balanced_assignment(*a))(crowded, valid))
    assert np.bincount(expert[valid]).max() <= 8 and expert[7] == 0


def sinkhorn_plan(logits_SE):
    """Rows and columns scaled in turn, in the usual form and in float64."""
    plan = np.exp(np.asarray(logits_SE, np.float64))
    for _ in range(2000):
        plan *= len(plan) / E / plan.sum(axis=0)
        plan /= plan.sum(axis=1, keepdims=True)
    return plan


@pytest.mark.parametrize("name", ["normal", "all want one", "all want the same two"])
def test_potentials_balance_the_plan_of_the_tokens_that_are_no_padding(name):
    logits = AFFINITIES[name].astype(np.float32)
    valid = np.arange(TOKENS) % 5 != 2
    potentials = np.asarray(sinkhorn_potentials(logits, valid))
    expected = sinkhorn_plan(logits[valid])
    plan = np.asarray(jax.nn.softmax(logits + potentials, axis=-1))[valid]
    np.testing.assert_allclose(plan.sum(axis=0) * E / valid.sum(), 1, atol=1.1 * SHARE_TOLERANCE)
    np.testing.assert_allclose(plan, expected, atol=SHARE_TOLERANCE)


def make_moe(router, num_selected=1, **settings):
    settings = {"num_experts": E, "expert_dim": 6} | settings
    return MoE(num_selected_experts=num_selected, router=router, **settings)


def route(logits_SE, router, *, training, valid=None, num_selected=1):
    tokens = len(logits_SE)
    valid = np.ones((1, tokens), bool) if valid is None else valid[None]
    rng = jax.random.key(0) if training else None
    options = make_moe(router, num_selected).options(tokens, training)
    places = jnp.zeros((1, tokens), jnp.int32)
    inputs = RouterInputs(options, jnp.asarray(valid), places, rng=rng)
    return router.route({"weight": jnp.eye(E)}, jnp.asarray(logits_SE, jnp.float32)[None], inputs)


@pytest.mark.parametrize("kind", [Sinkhorn, Base])
def test_a_bfloat16_router_has_the_assignment_of_its_logits_in_float32(kind):
    """Half the tokens have logits near 300, next to which bfloat16 loses the search's steps."""
    random = np.random.default_rng(5)
    logits = random.normal(size=(TOKENS, E)) + np.where(np.arange(TOKENS) % 2, 300, 0)[:, None]
    logits = np.asarray(jnp.asarray(logits + [3, 0, 0, 0], jnp.bfloat16), np.float32)
    by_dtype = {}
    for dtype in ("float32", "bfloat16"):
        routing = route(logits, kind(dtype=dtype), training=True)
        assert routing.logits_GSE.dtype == routing.gate_GSK.dtype == dtype
        by_dtype[dtype] = np.asarray(routing.expert_index_GSK)
    np.testing.assert_array_equal(by_dtype["bfloat16"], by_dtype["float32"])
    assert np.bincount(by_dtype["bfloat16"].reshape(-1), minlength=E).max() <= 12


def test_base_assigns_in_training_and_takes_the_best_in_evaluation():
    router = Base(scaling_factor=2.0)
    logits = AFFINITIES["all want one"]
    valid = np.arange(TOKENS) < 26
    for training in (True, False):
        routing = route(logits, router, training=training, valid=valid)
        expert = np.asarray(routing.expert_index_GSK)[0, :, 0]
        if training:
            assert np.bincount(expert[valid]).max() == 7
        else:
            np.testing.assert_array_equal(expert, logits.argmax(axis=1))
        gate = 2 / (1 + np.exp(-logits[np.arange(TOKENS), expert]))
        np.testing.assert_allclose(routing.gate_GSK[0, :, 0], gate, rtol=1e-5)
        np.testing.assert_allclose(routing.probs_GSE.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("num_selected", [1, 2])
def test_sinkhorn_takes_the_most_of_the_plan_in_training_and_the_best_in_evaluation(num_selected):
    router = Sinkhorn(score=Sigmoid())
    logits = AFFINITIES["all want the same two"]
    plan = sinkhorn_plan(logits)
    for training, worth in ((True, plan), (False, logits)):
        routing = route(logits, router, training=training, num_selected=num_selected)
        index = np.asarray(routing.expert_index_GSK)[0]
        np.testing.assert_array_equal(index, np.argsort(-worth, axis=1)[:, :num_selected])
        scores = 1 / (1 + np.exp(-np.take_along_axis(logits, index, axis=1)))
        np.testing.assert_allclose(routing.gate_GSK[0], scores, rtol=1e-5)
    assert np.bincount(index[:, 0], minlength=E).max() >= 12, "evaluation does not balance"
    chosen = np.argsort(-plan, axis=1)[:, :num_selected]
    load = np.bincount(chosen.reshape(-1), minlength=E) / TOKENS / num_selected * E
    assert load.max() < 1.5, "training nearly does"


@pytest.mark.parametrize("kind", [Sinkhorn, Base])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_learns_from_its_gates_and_a_group_of_padding_does_no_harm(kind, dtype):
    moe = make_moe(kind(dtype=dtype), run_experts="einsum", capacity=Capacity(train_factor=0))
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), moe.specs(Dims(MODEL_DIM))
    )
    x = random.normal(size=(2, 6, MODEL_DIM)).astype(np.float32)
    valid = np.array([[True] * 6, [False] * 6])

    def total(params):
        call = Call(segments_BL=valid.astype(np.int32), rng=jax.random.key(0))
        y, aux = moe_block(params, x, moe, call)
        return jnp.sum(y**2), (y, aux)

    grads, (y, aux) = quick_jit(jax.grad(total, has_aux=True))(params)
    assert np.abs(grads["router"]["weight"]).max() > 1e-3
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads, y, aux)))
    assert not np.any(y[1]) and aux.sums["assigned_KE"].sum() == 6
    if kind is Base:
        assert aux.sums["assigned_KE"].max() == 2


def test_only_training_looks_ahead():
    for router in (Sinkhorn(), Base()):
        moe = make_moe(router)
        assert moe.looks_ahead(training=True) and not moe.looks_ahead(training=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_moe(Base(), 2), r"needs one expert per token: .*num_selected_experts=2"),
        (lambda: make_moe(Sinkhorn(renormalize=True)), r"a renormalised gate"),
        (
            lambda: make_moe(Sinkhorn(noise=(Learned(),)), losses=(Load(weight=0.1),)),
            r"the load loss .* takes the K best .*: router=Sinkhorn\(",
        ),
        (
            lambda: build(Router, {"kind": "base", "score": "sigmoid"}, "config.router"),
            r"config\.router has the fields \[.*\]: config\.router\.score\. Remove the field",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
