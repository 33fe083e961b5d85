"""Norms by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.norms import LayerNorm, RMSNorm

X = np.array([[3.0, -1.0, 1.0, 5.0]], np.float32)
SCALE, BIAS = np.array([1.0, 2.0, -1.0, 0.5], np.float32), np.full(4, 0.25, np.float32)
# The mean is 2, the mean square 9, and the variance 5.
ROOT, CENTERED = X / 3, (X - 2) / 5**0.5


@pytest.mark.parametrize(
    ("norm", "names", "expected"),
    [
        (RMSNorm(1e-12), {"scale"}, ROOT * SCALE),
        (RMSNorm(1e-12, use_scale=False), set(), ROOT),
        (LayerNorm(1e-12), {"scale", "bias"}, CENTERED * SCALE + BIAS),
        (LayerNorm(1e-12, use_bias=False), {"scale"}, CENTERED * SCALE),
        (LayerNorm(1e-12, use_scale=False), {"bias"}, CENTERED + BIAS),
        (LayerNorm(1e-12, use_scale=False, use_bias=False), set(), CENTERED),
        (RMSNorm(7.0, use_scale=False), set(), X / 4),
        (LayerNorm(4.0, use_bias=False), {"scale"}, (X - 2) / 3 * SCALE),
    ],
)
def test_norms(norm, names, expected):
    specs = norm.specs(4)
    assert set(specs) == names
    params = {"scale": SCALE, "bias": BIAS}
    y = norm.apply({name: params[name] for name in names}, jnp.asarray(X))
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()])
def test_a_norm_computes_in_float32_and_rounds_once(norm):
    random = np.random.default_rng(0)
    params = {name: np.float32(random.normal(size=64)) for name in norm.specs(64)}
    x = jnp.asarray(random.normal(size=(8, 64)), jnp.bfloat16)
    exact = norm.apply(params, x.astype(jnp.float32))
    np.testing.assert_array_equal(norm.apply(params, x), exact.astype(jnp.bfloat16), strict=True)


def test_the_dim_of_a_norm_may_have_a_name():
    axes = jax.tree.map(lambda spec: spec.axes, LayerNorm().specs(4, "attention", "heads"))
    assert axes == {"scale": ("heads",), "bias": ("heads",)}
