"""The selection bias by its arithmetic: by sign, by error, by the quantile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import BalanceConfig, MoEConfig, RouterConfig
from moe_jax.moe.balance import max_violation
from moe_jax.moe.bias import (
    count_needed_biases,
    histogram_range,
    quantile_bias,
    update_rate,
    update_router_bias,
)
from moe_jax.moe.block import moe_block
from moe_jax.moe.parameters import moe_specs
from moe_jax.moe.statistics import merge_aux
from tests.tiny_run import quick_jit

count = quick_jit(count_needed_biases, static_argnums=2)
solve = quick_jit(quantile_bias, static_argnums=2)


def update(counts, rate=0.001, bias=None, **how):
    counts = jnp.asarray(counts, jnp.int32)
    bias = jnp.zeros(counts.shape, jnp.float32) if bias is None else bias
    return update_router_bias(bias, counts, rate, **how)


@pytest.mark.parametrize(
    ("counts", "signs"),
    [
        ([1, 2, 3], [1, 0, -1]),  # mean 2
        ([2, 2, 2], [0, 0, 0]),
        ([0, 0, 4], [1, 1, -1]),  # mean 4/3
        ([1, 1, 2], [1, 1, -1]),  # mean 4/3: 1 is below, 2 above
        ([0, 0, 0], [0, 0, 0]),
        # One token more or less than the mean of 40,840 counts; bfloat16 steps by 256 here.
        ([40_840, 40_841, 40_839, 40_840], [0, -1, 1, 0]),
        # float32 steps by 2 beyond 2^24 = 16,777,216, and would see three equal counts.
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
    # 64 tokens whose scores favour expert 0; loss-free balancing evens the choices out.
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
    steps = update([[1, 2, 3], [0, 0, 6], [4, 4, 4], [0, 0, 0]], rate=0.5, by="error")
    np.testing.assert_allclose(
        steps, [[0.25, 0, -0.25], [0.5, 0.5, -1], [0, 0, 0], [0, 0, 0]], atol=1e-7
    )
    # A batch a hundred times as large makes the same step.
    np.testing.assert_allclose(update([100, 200, 300], rate=0.5, by="error"), steps[0])


def test_centred_steps_leave_the_sum_of_the_biases():
    counts = [0, 0, 4]  # signs 1, 1, -1 of mean 1/3
    np.testing.assert_allclose(update(counts, rate=3.0, centered=True), [2, 2, -4], rtol=1e-6)
    start = jnp.array([0.25, -0.5, 0.25])
    moved = update(counts, rate=0.1, bias=start, centered=True)
    assert float(jnp.sum(moved)) == pytest.approx(0, abs=1e-7) and moved[2] < 0.25


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [  # at steps 0, 2, 4, 7, 8, 9 of 10, of which the last two are frozen
        ("constant", [1, 1, 1, 1, 0, 0]),
        ("linear", [1, 0.75, 0.5, 0.125, 0, 0]),
        ("cosine", [1, (1 + 2**-0.5) / 2, 0.5, (1 + np.cos(np.pi * 7 / 8)) / 2, 0, 0]),
    ],
)
def test_rate_over_the_steps_of_a_run(schedule, rates):
    config = BalanceConfig(
        bias_update_rate=0.5, bias_update_schedule=schedule, bias_frozen_fraction=0.2
    )
    got = [update_rate(config, jnp.int32(step), 10) for step in (0, 2, 4, 7, 8, 9)]
    np.testing.assert_allclose(got, 0.5 * np.array(rates), atol=1e-7)
    always = BalanceConfig(bias_update_rate=0.5)
    assert [float(update_rate(always, jnp.int32(step), 10)) for step in (0, 9)] == [0.5, 0.5]


def test_needed_biases_by_hand():
    """Three tokens, two experts of which one is selected, and padding; bins are 3/1000 wide."""
    scores = jnp.array([[[0.9, 0.2], [0.8, 0.7], [0.6, 0.1], [0.5, 0.5]]])
    bias, valid = jnp.array([-0.5, 0.5]), jnp.array([[True, True, True, False]])
    # Sums .4 .7, .3 1.2, .1 .6: the second best are .4, .3 and .1, all of expert 0.
    needed = np.array([[-0.5, -0.5, -0.5], [0.2, -0.4, 0.0]])
    counts = np.asarray(count(scores, bias, 1, valid))
    low, width = histogram_range(bias)
    assert low == -1.5 and width == pytest.approx(3 / 1000)
    centres = -1.5 + (np.arange(1000) + 0.5) * 3 / 1000
    for row, values in zip(counts, needed, strict=True):
        found = np.repeat(centres, row)
        np.testing.assert_allclose(found, np.sort(values), atol=0.0016)
    # Half of the three tokens: 1.5 of them need at most -0.5 with expert 0, and with expert 1, of
    # whose tokens one needs -0.4 and one 0.0, the quantile is within the bin of 0.0.
    bias = solve(bias, jnp.asarray(counts), 1)
    np.testing.assert_allclose(bias, [-0.25, 0.25], atol=0.003)


def select(scores, bias, num_selected):
    """How many tokens have each expert among their best."""
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
    config = MoEConfig(
        num_experts=4, num_selected_experts=2, expert_dim=3, dispatch="einsum",
        router=RouterConfig(score="sigmoid"),
        balance=BalanceConfig(bias_update="quantile", bias_update_rate=1.0),
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = {n: random.normal(size=s.shape) for n, s in moe_specs(config, 4).items()}
    x = jnp.asarray(random.normal(size=(4, 6, 4)), jnp.float32)
    valid, bias = jnp.asarray(random.uniform(size=(4, 6)) < 0.7), jnp.array([0.1, 0, -0.2, 0.3])

    @functools.partial(jax.jit, static_argnames="training")
    def say(x, valid, training=True):
        rng = jax.random.key(0) if training else None
        return moe_block(params, x, config, valid_BL=valid, bias_E=bias, rng=rng)[1]

    whole = say(x, valid)
    parts = jax.tree.map(
        lambda *a: jnp.stack(a), *(say(x[i : i + 2], valid[i : i + 2]) for i in (0, 2))
    )
    counts = merge_aux(parts, config).needed_bias_EQ
    np.testing.assert_array_equal(counts, whole.needed_bias_EQ)
    np.testing.assert_array_equal(counts.sum(axis=1), [valid.sum()] * 4)
    bias = solve(bias, counts, 2)
    assert float(jnp.sum(bias)) == pytest.approx(0, abs=1e-6) and jnp.ptp(bias) > 0.01
    assert say(x, valid, training=False).needed_bias_EQ is None
    np.testing.assert_array_equal(solve(bias, 0 * counts, 2), bias)
