"""Updates of the selection bias: by sign, by error and by quantile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.balance import max_violation
from moe_jax.moe.bias import (
    ErrorUpdate,
    QuantileUpdate,
    SignUpdate,
    count_needed_biases,
    histogram_range,
    quantile_bias,
)
from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Options, RouterInputs
from moe_jax.moe.routing.logits import Sigmoid, Softmax
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.part import Call, Dims, Own
from tests.tiny_run import quick_jit

count = quick_jit(count_needed_biases, static_argnums=2)
solve = quick_jit(quantile_bias, static_argnums=2)


SIGN = SignUpdate()


def update(counts, rate=0.001, bias=None, how=SIGN):
    counts = jnp.asarray(counts, jnp.int32)
    bias = jnp.zeros(counts.shape, jnp.float32) if bias is None else bias
    return how.update(bias, counts, {}, rate, 1)


def test_a_block_counts_its_choices_exactly_whatever_the_dtype_of_its_router():
    """All 301 tokens choose one expert; bfloat16 has no 301."""
    router = TokenChoice(dtype="bfloat16")
    moe = MoE(num_experts=4, num_selected_experts=1, expert_dim=8, router=router, bias=SIGN)
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), moe.specs(Dims(8)))
    state = jax.tree.map(lambda spec: jnp.zeros(spec.shape), moe.state_specs(Dims(8)))
    call = Call(capacity=0.0, record=False)
    _, aux = moe_block(params, jnp.ones((1, 301, 8)), moe, call, own=Own(state=state))
    loss = aux.sums["losses"]["load_balance_loss"]
    counts = {
        "assigned": aux.sums["assigned_KE"],
        "kept": aux.sums["kept_KE"],
        "of sequences": aux.sequences["assigned_BE"],
        "of the loss": jnp.atleast_2d(loss["counted_KE"]),
    }
    for name, of_experts in counts.items():
        assert of_experts.dtype == jnp.int32, name
        np.testing.assert_array_equal(of_experts, [[301, 0, 0, 0]], err_msg=name)


@pytest.mark.parametrize(
    ("counts", "signs"),
    [
        ([1, 2, 3], [1, 0, -1]),  # mean 2
        ([2, 2, 2], [0, 0, 0]),
        ([0, 0, 4], [1, 1, -1]),  # mean 4/3
        ([1, 1, 2], [1, 1, -1]),  # mean 4/3: 1 is below, 2 above
        ([0, 0, 0], [0, 0, 0]),
        # One token above or below a mean of 40,840; bfloat16 steps by 256 here.
        ([40_840, 40_841, 40_839, 40_840], [0, -1, 1, 0]),
        # Above 2^24 = 16,777,216 float32 steps by 2, and would read three equal counts.
        ([2**24, 2**24 + 1, 2**24 - 1], [0, -1, 1]),
        ([2**24 + 1, 2**24 + 1, 2**24 + 2], [1, 1, -1]),
        # The sum of four is near the end of int32.
        ([2**29 - 1, 2**29, 2**29 - 2, 2**29 - 1], [0, -1, 1, 0]),
    ],
)
def test_bias_steps_towards_the_mean_by_the_exact_sign(counts, signs):
    np.testing.assert_array_equal(update(counts), np.float32(0.001) * np.array(signs, np.float32))


def test_bias_update_is_a_step_from_the_old_bias_layer_by_layer():
    bias = jnp.array([[0.5, -0.5], [0.0, 0.25]])
    np.testing.assert_array_equal(
        update([[3, 1], [5, 5]], rate=0.125, bias=bias), [[0.375, -0.375], [0.0, 0.25]]
    )


def test_bias_balances_a_router_that_prefers_one_expert():
    # 64 tokens whose scores favour expert 0; loss-free balancing evens out the load.
    scores = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) / 4
    scores[:, 0] += 0.5
    bias, loads = jnp.zeros(4), []
    for _ in range(300):
        counts = np.bincount(np.argmax(scores + np.asarray(bias), axis=1), minlength=4)
        loads.append(counts)
        bias = update(counts, rate=0.01, bias=bias)
    violations = [float(max_violation(jnp.asarray(c))) for c in (loads[0], loads[-1])]
    assert violations[0] > 1.5 and violations[1] < 0.25


def test_bias_steps_by_the_error_relative_to_the_mean_load():
    steps = update([[1, 2, 3], [0, 0, 6], [4, 4, 4], [0, 0, 0]], rate=0.5, how=ErrorUpdate())
    np.testing.assert_allclose(
        steps, [[0.25, 0, -0.25], [0.5, 0.5, -1], [0, 0, 0], [0, 0, 0]], atol=1e-7
    )
    # A batch a hundred times as large gives the same step.
    np.testing.assert_allclose(update([100, 200, 300], rate=0.5, how=ErrorUpdate()), steps[0])


def test_centred_steps_leave_the_sum_of_the_biases():
    counts = [0, 0, 4]  # signs 1, 1, -1 with mean 1/3
    centered = SignUpdate(centered=True)
    np.testing.assert_allclose(update(counts, rate=3.0, how=centered), [2, 2, -4], rtol=1e-6)
    start = jnp.array([0.25, -0.5, 0.25])
    moved = update(counts, rate=0.1, bias=start, how=centered)
    assert float(jnp.sum(moved)) == pytest.approx(0, abs=1e-7) and moved[2] < 0.25


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [  # at steps 0, 2, 4, 7, 8 and 9 of 10; the last two are frozen
        ("constant", [1, 1, 1, 1, 0, 0]),
        ("linear", [1, 0.75, 0.5, 0.125, 0, 0]),
        ("cosine", [1, (1 + 2**-0.5) / 2, 0.5, (1 + np.cos(np.pi * 7 / 8)) / 2, 0, 0]),
    ],
)
def test_rate_over_the_steps_of_a_run(schedule, rates):
    falling = SignUpdate(rate=0.5, schedule=schedule, frozen_fraction=0.2)
    got = [falling.rate_at(jnp.int32(step), 10) for step in (0, 2, 4, 7, 8, 9)]
    np.testing.assert_allclose(got, 0.5 * np.array(rates), atol=1e-7)
    always = SignUpdate(rate=0.5)
    assert [float(always.rate_at(jnp.int32(step), 10)) for step in (0, 9)] == [0.5, 0.5]


def test_needed_biases_by_hand():
    """Three tokens and padding, one of two experts selected; bins are 3/1000 wide."""
    scores = jnp.array([[[0.9, 0.2], [0.8, 0.7], [0.6, 0.1], [0.5, 0.5]]])
    bias, valid = jnp.array([-0.5, 0.5]), jnp.array([[True, True, True, False]])
    # Sums: .4 .7, .3 1.2, .1 .6. The second best are .4, .3 and .1, all of expert 0.
    needed = np.array([[-0.5, -0.5, -0.5], [0.2, -0.4, 0.0]])
    counts = np.asarray(count(scores, bias, 1, valid))
    low, width = histogram_range(bias)
    assert low == -1.5 and width == pytest.approx(3 / 1000)
    centres = -1.5 + (np.arange(1000) + 0.5) * 3 / 1000
    for row, values in zip(counts, needed, strict=True):
        found = np.repeat(centres, row)
        np.testing.assert_allclose(found, np.sort(values), atol=0.0016)
    # The quantile is at half of the three tokens, 1.5. For expert 0 it is -0.5. For expert 1, where
    # tokens need -0.4, 0.0 and 0.2, it falls in the bin of 0.0.
    bias = solve(bias, jnp.asarray(counts), 1)
    np.testing.assert_allclose(bias, [-0.25, 0.25], atol=0.003)


def select(scores, bias, num_selected):
    """Number of tokens per expert that have it among their best."""
    best = np.argsort(-(scores + np.asarray(bias)), axis=-1)[..., :num_selected]
    return np.bincount(best.ravel(), minlength=scores.shape[-1])


def test_quantile_is_the_order_statistic_up_to_a_bin():
    random = np.random.default_rng(0)
    scores = random.uniform(size=(400, 8)).astype(np.float32)
    bias = random.uniform(-0.2, 0.2, 8).astype(np.float32)
    counts = count(scores[None], bias, 2, np.ones((1, 400), bool))
    got = solve(bias, counts, 2)
    sums = scores + bias
    needed = np.sort(sums, axis=1)[:, -3][:, None] - scores
    exact = np.sort(needed, axis=0)[99]  # 2 / 8 of 400 tokens
    width = (np.ptp(bias) + 2) / 1000
    np.testing.assert_allclose(got, exact - exact.mean(), atol=2 * width)


def test_quantiles_balance_a_router_that_prefers_one_expert():
    scores = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32)
    scores = np.asarray(jax.nn.sigmoid(scores + np.linspace(0, 3, 8, dtype=np.float32)))
    bias, violations = jnp.zeros(8), []
    for _ in range(12):
        violations.append(float(max_violation(jnp.asarray(select(scores, bias, 2)))))
        counts = count(scores[None], bias, 2, np.ones((1, 512), bool))
        bias = solve(bias, counts, 2)
    assert violations[0] > 1.5 and violations[1] < 0.6 and violations[-1] < 0.1


def test_parts_of_a_batch_count_what_the_whole_counts():
    """Over microbatches, and over groups: what moves the bias is a sum over tokens."""
    moe = MoE(
        num_experts=4, num_selected_experts=2, expert_dim=3, run_experts="einsum",
        router=TokenChoice(score=Sigmoid()), bias=QuantileUpdate(),
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: random.normal(size=spec.shape), moe.specs(Dims(4)))
    x = jnp.asarray(random.normal(size=(4, 6, 4)), jnp.float32)
    valid, bias = jnp.asarray(random.uniform(size=(4, 6)) < 0.7), jnp.array([0.1, 0, -0.2, 0.3])

    @functools.partial(jax.jit, static_argnames="training")
    def say(x, valid, training=True):
        rng = jax.random.key(0) if training else None
        call = Call(segments_BL=valid.astype(jnp.int32), rng=rng)
        return moe_block(params, x, moe, call, Own(state={"bias_E": bias}))[1].sums

    whole = say(x, valid)
    first, second = (say(x[i : i + 2], valid[i : i + 2]) for i in (0, 2))
    summed = jax.tree.map(jnp.add, first, second)
    counts = summed["bias"]["needed_EQ"]
    np.testing.assert_array_equal(counts, whole["bias"]["needed_EQ"])
    np.testing.assert_array_equal(counts.sum(axis=1), [valid.sum()] * 4)
    layers = jax.tree.map(lambda leaf: leaf[None], summed)
    state = moe.next_state({"bias_E": bias[None]}, layers, jnp.int32(0), 10)
    np.testing.assert_allclose(state["bias_E"][0], solve(bias, counts, 2), atol=1e-6)
    bias = solve(bias, counts, 2)
    assert float(jnp.sum(bias)) == pytest.approx(0, abs=1e-6) and jnp.ptp(bias) > 0.01
    assert say(x, valid, training=False)["bias"] == {}
    np.testing.assert_array_equal(solve(bias, 0 * counts, 2), bias)


def test_the_quantile_reads_the_scores_that_the_router_selects_by():
    """Only the `Routing` is read: other scores in it give other counts."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 5, 4)), jnp.float32)
    valid, bias = jnp.arange(5) < jnp.array([[5], [3]]), jnp.array([0.1, 0, -0.2, 0.3])
    inputs = RouterInputs(Options(4, 4, 2, 5), valid, jnp.zeros((2, 5), jnp.int32), bias_E=bias)
    routing = TokenChoice(score=Sigmoid()).route({"weight": jnp.eye(4)}, x, inputs)
    np.testing.assert_allclose(routing.scores_GSE, 1 / (1 + np.exp(-x)), rtol=1e-6)
    measured = QuantileUpdate().measure(routing, bias, valid)["needed_EQ"]
    np.testing.assert_array_equal(measured, count_needed_biases(routing.scores_GSE, bias, 2, valid))
    turned = routing._replace(scores_GSE=routing.scores_GSE[..., ::-1])
    other = QuantileUpdate().measure(turned, bias, valid)["needed_EQ"]
    np.testing.assert_array_equal(other, count_needed_biases(turned.scores_GSE, bias, 2, valid))
    assert np.any(other != measured)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": TokenChoice(score=Softmax())}, r"too coarse for a softmax"),
        (
            {"router": TokenChoice(score=Sigmoid(), groups=ExpertGroups(2, 1))},
            r"too coarse for a softmax",
        ),
        (
            {"num_selected_experts": 4},
            r"an expert that is not selected: num_selected_experts=4",
        ),
    ],
)
def test_what_the_quantile_cannot_count_is_refused(settings, message):
    settings = {"num_selected_experts": 2, "router": TokenChoice(score=Sigmoid())} | settings
    with pytest.raises(ValueError, match=message):
        MoE(num_experts=4, bias=QuantileUpdate(), **settings)
