"""What an expert computes, and how its parameters start."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.moe.activations import ClampedSwiGLU, SwiGLU, gelu
from moe_jax.moe.block import moe_block
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS
from moe_jax.parameters import SAME_WEIGHTS, ffn_specs, init_parameters
from moe_jax.part import Call, Dims
from tests import moe_oracle
from tests.slow import slow_but

# Sums of a few float32 products near 1, and an exponential or error function.
FLOAT32 = 2e-6
ACTIVATIONS = {kind: load_kind("activation", kind)() for kind in KINDS["activation"]}
RUN = [way for way in IMPLEMENTATIONS if way != "auto"]


def make_values(activation, *, bias, hidden=6, model=4, rows=5):
    random = np.random.default_rng(0)
    specs = ffn_specs(
        model, hidden, "dense_ffn", gated=activation.gated, use_bias=bias, init_scale=1.0
    )
    weights = {n: random.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
    return weights, random.normal(size=(rows, model)).astype(np.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_equals_the_oracle(kind, bias):
    activation = ACTIVATIONS[kind]
    weights, x = make_values(activation, bias=bias)
    assert ("wg" in weights) == activation.gated
    expected = [
        moe_oracle.ffn_row(row.astype(float), {n: w.astype(float) for n, w in weights.items()},
                           activation)
        for row in x
    ]  # fmt: skip
    y = FeedForward(activation)(jnp.asarray(x), weights, SAME_WEIGHTS)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y / scale, np.array(expected) / scale, atol=FLOAT32)


def test_the_slope_of_gelu():
    # The derivative of x Phi(x) is Phi(x) + x phi(x), here at 0, 1 and -1.
    slopes = jax.vmap(jax.grad(gelu))(jnp.array([0.0, 1.0, -1.0]))
    np.testing.assert_allclose(slopes, [0.5, 1.083315471, -0.083315471], atol=1e-7)


# x Phi(x) at 2 is 2 * 0.977249868.
@pytest.mark.parametrize(("kind", "value"), [("gelu", 2 * 0.977249868), ("gelu_tanh", 1.954597694)])
def test_gelu_is_the_exact_one_unless_it_is_named_tanh(kind, value):
    one = {"wi": jnp.ones((1, 1)), "wo": jnp.ones((1, 1))}
    y = FeedForward(ACTIVATIONS[kind])(jnp.full((1, 1), 2.0), one, SAME_WEIGHTS)
    assert float(y[0, 0]) == pytest.approx(value, rel=1e-6)


def test_gate_is_activated_and_the_other_branch_is_linear():
    # x = 1: silu(1 * 3) * (1 * -2). Swapped branches would give silu(-2) * 3.
    weights = {"wg": jnp.full((1, 1), 3.0), "wi": jnp.full((1, 1), -2.0), "wo": jnp.ones((1, 1))}
    y = FeedForward(SwiGLU())(jnp.ones((1, 1)), weights, SAME_WEIGHTS)
    assert float(y[0, 0]) == pytest.approx(-2 * 3 / (1 + math.exp(-3)), rel=1e-6)


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [
        # sigmoid(1.702) is .845796.
        (1.0, 0.5, 1.5 * 0.845796),
        (9.0, 0.5, 1.5 * 2.0 / (1 + math.exp(-3.404))),  # the gate is clamped at 2 ...
        (-9.0, 0.5, 1.5 * -9.0 / (1 + math.exp(15.318))),  # ... from above only
        (1.0, 9.0, 3 * 0.845796),
        (1.0, -9.0, -0.845796),
    ],
)
def test_a_clamped_gate_by_hand(gate, up, expected):
    weights = {"wg": jnp.full((1, 1), gate), "wi": jnp.full((1, 1), up), "wo": jnp.ones((1, 1))}
    y = FeedForward(ClampedSwiGLU(limit=2.0))(jnp.ones((1, 1)), weights, SAME_WEIGHTS)
    assert float(y[0, 0]) == pytest.approx(expected, rel=1e-5)


def test_rows_are_computed_in_their_own_dtype():
    weights, x = make_values(SwiGLU(), bias=True)
    y = FeedForward(SwiGLU())(jnp.asarray(x, jnp.bfloat16), weights, SAME_WEIGHTS)
    assert y.dtype == jnp.bfloat16


def make_block(**settings):
    moe = MoE(**({"num_experts": 4, "expert_dim": 50} | settings))
    params = init_parameters(jax.random.key(0), moe.specs(Dims(4)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 20, 4)), jnp.float32)
    return moe, params, x


@functools.partial(jax.jit, static_argnames="moe")
def run(params, x, moe, rng=None):
    return moe_block(params, x, moe, Call(capacity=0.0, rng=rng))[0]


@pytest.mark.parametrize("way", slow_but(["ragged"], RUN))
def test_expert_dropout_needs_a_key_and_keeps_the_mean(way):
    moe, params, x = make_block(expert_dropout_rate=0.4, run_experts=way)
    calm_moe, *_ = make_block(run_experts=way)
    calm = run(params, x, calm_moe)
    np.testing.assert_array_equal(run(params, x, moe), calm)
    keys = jax.random.split(jax.random.key(0), 200)
    draws = np.stack([run(params, x, moe, key) for key in keys])
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    np.testing.assert_array_equal(run(params, x, moe, keys[0]), draws[0])
    # The mean of 200 draws is within five standard errors of the output without dropout.
    errors = np.abs(draws.mean(axis=0) - calm) / (draws.std(axis=0) / 200**0.5 + 1e-6)
    assert errors.max() < 5


@pytest.mark.parametrize("way", slow_but(["einsum", "gather"], RUN))
def test_expert_dropout_gradient_is_that_of_the_units_kept(way):
    # A central difference along a line: a backward pass that drops other units would differ.
    moe, params, x = make_block(expert_dropout_rate=0.5, run_experts=way)
    params = jax.tree.map(lambda p: p * 2, params)
    rng = jax.random.key(5)

    @jax.jit
    def loss(wo):
        experts = params["experts"] | {"wo": wo}
        return jnp.sum(run(params | {"experts": experts}, x, moe, rng) ** 2)

    start = params["experts"]["wo"]
    direction = jax.random.normal(jax.random.key(6), start.shape)
    slope = float(jnp.sum(jax.grad(loss)(start) * direction))
    # The loss is quadratic in wo, so the central difference is exact up to rounding.
    step = 0.5
    forward, backward = (loss(start + s * step * direction) for s in (1, -1))
    assert slope == pytest.approx(float(forward - backward) / (2 * step), rel=1e-3)


def test_expert_dropout_leaves_the_shared_expert_alone():
    moe, params, x = make_block(expert_dropout_rate=0.4, shared_expert_dim=50, run_experts="einsum")
    params = {n: p if n == "shared" else jax.tree.map(jnp.zeros_like, p) for n, p in params.items()}
    np.testing.assert_array_equal(run(params, x, moe, jax.random.key(0)), run(params, x, moe))


@pytest.mark.parametrize(("scale", "fan_in"), [(1.0, 64), (0.1, 64), (2.0, 16)])
def test_initial_variance_is_the_scale_over_the_fan_in(scale, fan_in):
    specs = ffn_specs(
        fan_in, 2 * fan_in, "experts", gated=True, use_bias=True, init_scale=scale, num_experts=16
    )
    params = init_parameters(jax.random.key(0), specs)
    for name, fan in (("wi", fan_in), ("wg", fan_in), ("wo", 2 * fan_in)):
        values = np.asarray(params[name])
        # At least 8,192 draws: the sample variance is within 5% (three standard errors).
        assert values.var() == pytest.approx(scale / fan, rel=0.05)
        assert abs(values.mean()) < 5 * (scale / fan / values.size) ** 0.5
        # Truncated at two standard deviations of the untruncated normal.
        assert np.abs(values).max() <= 2 * (scale / fan) ** 0.5 / 0.8796
    assert not any(np.any(params[name]) for name in ("bi", "bg", "bo"))


def test_experts_start_independent_by_default_and_identical_on_demand():
    independent, alike = (
        init_parameters(jax.random.key(0), moe.specs(Dims(32)))["experts"]
        for moe in (MoE(), MoE(identical_init=True))
    )
    for name in ("wi", "wo"):
        flat = np.asarray(independent[name]).reshape(8, -1)
        correlation = np.corrcoef(flat) - np.eye(8)
        assert np.abs(correlation).max() < 0.05  # 16,384 values each
        same = np.asarray(alike[name])
        np.testing.assert_array_equal(same, np.broadcast_to(same[:1], same.shape))
        assert same[0].std() == pytest.approx(flat.std(), rel=0.05)


def test_router_starts_at_its_standard_deviation():
    moe = MoE(num_experts=64, router=TokenChoice(init_stddev=0.02))
    params = init_parameters(jax.random.key(0), moe.specs(Dims(256)))
    router = np.asarray(params["router"]["weight"])
    # The untruncated normal has deviation 0.02; truncation leaves 0.8796 of it.
    assert router.std() == pytest.approx(0.8796 * 0.02, rel=0.03)
    assert np.abs(router).max() <= 0.04


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"router/weight", "experts/wi", "experts/wo"}),
        ({"activation": SwiGLU()}, {"router/weight", "experts/wi", "experts/wg", "experts/wo"}),
        (
            {"use_bias": True},
            {"router/weight", "experts/wi", "experts/wo", "experts/bi", "experts/bo"},
        ),
        (
            {"shared_expert_dim": 24},
            {"router/weight", "experts/wi", "experts/wo", "shared/wi", "shared/wo"},
        ),
        (
            {"shared_expert_dim": 24, "shared_expert_gate": True},
            {"router/weight", "experts/wi", "experts/wo", "shared/wi", "shared/wo", "shared/gate"},
        ),
        ({"num_experts": 1}, {"experts/wi", "experts/wo"}),
    ],
)
def test_parameters_by_name(settings, names):
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): spec
        for path, spec in jax.tree.leaves_with_path(MoE(**settings).specs(Dims(16)))
    }
    assert set(specs) == names
    for name, spec in specs.items():
        assert len(spec.axes) == len(spec.shape)
        of_experts = name.startswith("experts/")
        assert (spec.axes[0] == "expert") == of_experts == (spec.num_stacked == 1)
        assert not of_experts or spec.shape[0] == settings.get("num_experts", 8)


def test_a_shared_expert_has_any_width():
    specs = MoE(shared_expert_dim=31, expert_dim=10).specs(Dims(16))
    assert specs["shared"]["wi"].shape == (16, 31)
    assert specs["shared"]["wo"].shape == (31, 16)


@pytest.mark.parametrize("kind", slow_but(["relu", "swiglu"], ACTIVATIONS))
@pytest.mark.parametrize("way", RUN)
def test_one_expert_without_router_is_the_dense_ffn_exactly(way, kind):
    activation = ACTIVATIONS[kind]
    moe = MoE(num_experts=1, expert_dim=24, activation=activation, use_bias=True, run_experts=way)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: random.normal(size=s.shape).astype(np.float32), moe.specs(Dims(16))
    )
    assert set(params) == {"experts"}
    x = random.normal(size=(2, 32, 16)).astype(np.float32)
    one = jax.tree.map(lambda v: v[0], params["experts"])
    dense = jax.jit(lambda w: FeedForward(activation)(x, w, SAME_WEIGHTS))(one)
    y, aux = jax.jit(lambda p: moe_block(p, x, moe, Call(capacity=1.25)))(params)
    np.testing.assert_array_equal(y, dense)
    np.testing.assert_array_equal(aux.sums["kept_KE"], aux.sums["assigned_KE"])
    metrics = moe.metrics(jax.tree.map(lambda a: a[None], aux))
    assert float(metrics["load_balance_loss"][0]) == 1


@pytest.mark.parametrize("way", RUN)
def test_512_experts_work(way):
    moe = MoE(num_experts=512, num_selected_experts=8, expert_dim=2, run_experts=way)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: random.normal(size=s.shape).astype(np.float32), moe.specs(Dims(4))
    )
    x = random.normal(size=(1, 16, 4)).astype(np.float32)
    y, aux = jax.jit(lambda p: moe_block(p, x, moe, Call(capacity=1.25)))(params)
    decided = moe_oracle.moe_block(params, x, moe)
    scale = np.abs(decided.y_BLM).max()
    np.testing.assert_allclose(y / scale, decided.y_BLM / scale, atol=FLOAT32)
    np.testing.assert_array_equal(aux.sums["kept_KE"], decided.kept_KE)
