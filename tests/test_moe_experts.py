"""What an expert computes, and how its parameters start."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.moe.block import moe_block
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.experts import EXPERT_WEIGHTS, Shared, ffn
from moe_jax.moe.parameters import ffn_specs, init_parameters, moe_specs
from tests import moe_oracle

# Sums of a few float32 products near 1, and an exponential or error function.
FLOAT32 = 2e-6
ACTIVATIONS = ("relu", "gelu", "swiglu", "geglu")


def make_values(activation, *, bias, hidden=6, model=4, rows=5):
    random = np.random.default_rng(0)
    specs = ffn_specs(
        model, hidden, gated=activation in ("swiglu", "geglu"), use_bias=bias, init_scale=1.0
    )
    weights = {n: random.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
    return weights, random.normal(size=(rows, model)).astype(np.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_equals_the_oracle(activation, bias):
    weights, x = make_values(activation, bias=bias)
    expected = [
        moe_oracle.ffn_row(row.astype(float), {n: w.astype(float) for n, w in weights.items()},
                           activation)
        for row in x
    ]  # fmt: skip
    y = ffn(jnp.asarray(x), weights, activation, Shared())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y / scale, np.array(expected) / scale, atol=FLOAT32)


def test_gelu_is_the_exact_one():
    # x Phi(x) at 2: 2 * 0.977249868; the tanh form gives 1.954597694.
    one = {"wi": jnp.ones((1, 1)), "wo": jnp.ones((1, 1))}
    y = ffn(jnp.full((1, 1), 2.0), one, "gelu", Shared())
    assert float(y[0, 0]) == pytest.approx(2 * 0.977249868, rel=1e-6)


def test_gate_is_activated_and_the_other_branch_is_linear():
    # x = 1: silu(1 * 3) * (1 * -2) by hand; silu(-2) * 3 would be the branches swapped.
    weights = {"wg": jnp.full((1, 1), 3.0), "wi": jnp.full((1, 1), -2.0), "wo": jnp.ones((1, 1))}
    y = ffn(jnp.ones((1, 1)), weights, "swiglu", Shared())
    assert float(y[0, 0]) == pytest.approx(-2 * 3 / (1 + math.exp(-3)), rel=1e-6)


def test_rows_are_computed_in_their_own_dtype():
    weights, x = make_values("swiglu", bias=True)
    assert ffn(jnp.asarray(x, jnp.bfloat16), weights, "swiglu", Shared()).dtype == jnp.bfloat16


def make_block(**settings):
    config = MoEConfig(**({"num_experts": 4, "expert_dim": 50} | settings))
    params = init_parameters(jax.random.key(0), moe_specs(config, 4))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 20, 4)), jnp.float32)
    return config, params, x


@functools.partial(jax.jit, static_argnames="config")
def run(params, x, config, rng=None):
    return moe_block(params, x, config, capacity_factor=0, rng=rng)[0]


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_expert_dropout_needs_a_key_and_keeps_the_mean(dispatch):
    config, params, x = make_block(expert_dropout_rate=0.4, dispatch=dispatch)
    calm_config, *_ = make_block(dispatch=dispatch)
    calm = run(params, x, calm_config)
    np.testing.assert_array_equal(run(params, x, config), calm)
    keys = jax.random.split(jax.random.key(0), 200)
    draws = np.stack([run(params, x, config, key) for key in keys])
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    np.testing.assert_array_equal(run(params, x, config, keys[0]), draws[0])
    # The mean of 200 draws, five standard errors around the output without dropout.
    errors = np.abs(draws.mean(axis=0) - calm) / (draws.std(axis=0) / 200**0.5 + 1e-6)
    assert errors.max() < 5


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_expert_dropout_gradient_is_that_of_the_units_kept(dispatch):
    # Along a line through the parameters: a backward pass with other units dropped would differ.
    config, params, x = make_block(expert_dropout_rate=0.5, dispatch=dispatch)
    params = jax.tree.map(lambda p: p * 2, params)
    rng = jax.random.key(5)

    @jax.jit
    def loss(wo):
        return jnp.sum(run(params | {"wo": wo}, x, config, rng) ** 2)

    direction = jax.random.normal(jax.random.key(6), params["wo"].shape)
    slope = float(jnp.sum(jax.grad(loss)(params["wo"]) * direction))
    # Quadratic in wo, so that the central difference is exact but for rounding.
    step = 0.5
    forward, backward = (loss(params["wo"] + s * step * direction) for s in (1, -1))
    assert slope == pytest.approx(float(forward - backward) / (2 * step), rel=1e-3)


def test_expert_dropout_leaves_the_shared_experts_alone():
    config, params, x = make_block(expert_dropout_rate=0.4, num_shared_experts=1, dispatch="einsum")
    params = {n: p if n.startswith("shared_") else 0 * p for n, p in params.items()}
    np.testing.assert_array_equal(run(params, x, config, jax.random.key(0)), run(params, x, config))


@pytest.mark.parametrize(("scale", "fan_in"), [(1.0, 64), (0.1, 64), (2.0, 16)])
def test_initial_variance_is_the_scale_over_the_fan_in(scale, fan_in):
    specs = ffn_specs(
        fan_in, 2 * fan_in, gated=True, use_bias=True, init_scale=scale, num_experts=16
    )
    params = init_parameters(jax.random.key(0), specs)
    for name, fan in (("wi", fan_in), ("wg", fan_in), ("wo", 2 * fan_in)):
        values = np.asarray(params[name])
        # At least 8,192 draws: the variance of a sample is within 5% (three standard errors).
        assert values.var() == pytest.approx(scale / fan, rel=0.05)
        assert abs(values.mean()) < 5 * (scale / fan / values.size) ** 0.5
        # Cut at two standard deviations of the normal before the cut.
        assert np.abs(values).max() <= 2 * (scale / fan) ** 0.5 / 0.8796
    assert not any(np.any(params[name]) for name in ("bi", "bg", "bo"))


def test_experts_start_independent_by_default_and_identical_on_demand():
    independent = init_parameters(jax.random.key(0), moe_specs(MoEConfig(), 32))
    alike = init_parameters(jax.random.key(0), moe_specs(MoEConfig(identical_init=True), 32))
    for name in ("wi", "wo"):
        flat = np.asarray(independent[name]).reshape(8, -1)
        correlation = np.corrcoef(flat) - np.eye(8)
        assert np.abs(correlation).max() < 0.05  # 16,384 values each
        same = np.asarray(alike[name])
        np.testing.assert_array_equal(same, np.broadcast_to(same[:1], same.shape))
        assert same[0].std() == pytest.approx(flat.std(), rel=0.05)


def test_router_starts_at_its_standard_deviation():
    config = MoEConfig(num_experts=64, router=RouterConfig(init_stddev=0.02))
    router = np.asarray(init_parameters(jax.random.key(0), moe_specs(config, 256))["router"])
    # The normal before the cut has 0.02, what is left 0.8796 of it.
    assert router.std() == pytest.approx(0.8796 * 0.02, rel=0.03)
    assert np.abs(router).max() <= 0.04


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"router", "wi", "wo"}),
        ({"activation": "swiglu"}, {"router", "wi", "wg", "wo"}),
        ({"use_bias": True}, {"router", "wi", "wo", "bi", "bo"}),
        ({"num_shared_experts": 2}, {"router", "wi", "wo", "shared_wi", "shared_wo"}),
        (
            {"num_shared_experts": 1, "shared_expert_gate": True},
            {"router", "wi", "wo", "shared_wi", "shared_wo", "shared_gate"},
        ),
        ({"num_experts": 1}, {"wi", "wo"}),
    ],
)
def test_parameters_by_name(settings, names):
    specs = moe_specs(MoEConfig(**settings), 16)
    assert set(specs) == names
    for name, spec in specs.items():
        assert len(spec.axes) == len(spec.shape)
        assert (spec.axes[0] == "expert") == (name in EXPERT_WEIGHTS)
        assert name not in EXPERT_WEIGHTS or spec.shape[0] == settings.get("num_experts", 8)


def test_shared_experts_are_one_ffn_as_wide_as_all_of_them():
    specs = moe_specs(MoEConfig(num_shared_experts=3, expert_dim=10), 16)
    assert specs["shared_wi"].shape == (16, 30)
    assert specs["shared_wo"].shape == (30, 16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_one_expert_without_router_is_the_dense_ffn_exactly(dispatch, activation):
    config = MoEConfig(
        num_experts=1, expert_dim=24, activation=activation, use_bias=True, dispatch=dispatch
    )
    random = np.random.default_rng(0)
    params = {
        n: random.normal(size=s.shape).astype(np.float32) for n, s in moe_specs(config, 16).items()
    }
    assert "router" not in params
    x = random.normal(size=(2, 32, 16)).astype(np.float32)
    dense = jax.jit(lambda p: ffn(x, {n: v[0] for n, v in p.items()}, activation, Shared()))(params)
    y, aux = jax.jit(lambda p: moe_block(p, x, config))(params)
    np.testing.assert_array_equal(y, dense)
    assert float(aux.dropped_fraction_K[0]) == 0 and float(aux.load_balance_loss) == 1


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_512_experts_work(dispatch):
    config = MoEConfig(num_experts=512, num_selected_experts=8, expert_dim=2, dispatch=dispatch)
    random = np.random.default_rng(0)
    params = {
        n: random.normal(size=s.shape).astype(np.float32) for n, s in moe_specs(config, 4).items()
    }
    x = random.normal(size=(1, 16, 4)).astype(np.float32)
    y, aux = jax.jit(lambda p: moe_block(p, x, config))(params)
    decided = moe_oracle.moe_block(params, x, config)
    scale = np.abs(decided.y_BLM).max()
    np.testing.assert_allclose(y / scale, decided.y_BLM / scale, atol=FLOAT32)
    np.testing.assert_array_equal(aux.kept_KE, decided.kept_KE)
