"""Rotary positions, and how their frequencies are scaled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Yarn,
    document_lengths,
)

FLOAT32 = 1e-5


def test_scores_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 3, 8)).astype(np.float32)

    def score(query_position, key_position):
        turned = [
            Rotary().rotate(jnp.asarray(x), jnp.array([[p]]))
            for x, p in ((q, query_position), (k, key_position))
        ]
        return np.asarray(jnp.sum(turned[0] * turned[1], axis=-1))

    for distance in (0, 1, 5):
        near = score(distance, 0)
        # Around some thousand radians, float32 angles are spaced 2e-4 apart.
        np.testing.assert_allclose(score(3000 + distance, 3000), near, atol=5e-3)
        np.testing.assert_allclose(score(7 + distance, 7), near, atol=FLOAT32)
    assert np.abs(score(5, 0) - score(0, 5)).max() > 0.1


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 8)), jnp.float32)
    turned = Rotary().rotate(x, jnp.array([[0, 11]]))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=FLOAT32
    )
    assert Rotary().rotate(x.astype(jnp.bfloat16), jnp.array([[0, 11]])).dtype == jnp.bfloat16


def frequencies(rotary, dim, length=2):
    """Angles at position 1 of a document with `length` tokens, and the lengths of rotated pairs."""
    x = np.zeros((1, 2, 1, dim), np.float32)
    x[..., : dim // 2] = 1  # the pairs (1, 0) become (cos, sin)
    turned = rotary.rotate(jnp.asarray(x), jnp.array([[1, length - 1]]))
    cos, sin = np.split(np.asarray(turned)[0, 0, 0], 2)
    return np.arctan2(sin, cos), np.hypot(cos, sin)


def test_pairs_are_halves_or_neighbours():
    # Position 1, base 4, four dims: angles 1 and 1/2.
    a, b = 1.0, 0.5
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    one = jnp.array([[1]])

    def turned(first, second, angle):
        z = complex(first, second) * complex(math.cos(angle), math.sin(angle))
        return z.real, z.imag

    (p, r), (q, s) = turned(1, 3, a), turned(2, 4, b)
    np.testing.assert_allclose(Rotary(base=4.0).rotate(x, one).ravel(), [p, q, r, s], rtol=1e-6)
    (p, q), (r, s) = turned(1, 2, a), turned(3, 4, b)
    neighbours = Rotary(base=4.0, interleaved=True).rotate(x, one)
    np.testing.assert_allclose(neighbours.ravel(), [p, q, r, s], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dim", [None, 6])
def test_neighbours_turn_alike_by_a_matrix(monkeypatch, dtype, dim):
    """On a TPU a matrix rotates them, with the same outputs and gradients."""
    rotary = Rotary(base=100.0, dim=dim, interleaved=True)
    x, dy = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 5, 3, 8)), dtype)
    turn = functools.partial(rotary.rotate, positions_BL=jnp.arange(10).reshape(2, 5))
    expected, vjp = jax.vjp(turn, x)
    (expected_dx,) = vjp(dy)
    monkeypatch.setattr("moe_jax.layers.rotary.platform", lambda: "tpu")
    assert "dot_general" in str(jax.make_jaxpr(turn)(x))
    turned, vjp = jax.vjp(turn, x)
    assert turned.dtype == expected.dtype
    np.testing.assert_array_equal(turned, expected)
    # In bfloat16 both terms of a gradient are rounded before the addition.
    rounding = 3 * float(jnp.finfo(dtype).eps) * np.abs(dy).max()
    np.testing.assert_allclose(vjp(dy)[0], expected_dx, atol=rounding)
    assert np.abs(turned - x).max() > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_first_dims_turn_and_the_rest_pass(interleaved):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 1, 6)), jnp.float32)
    positions = jnp.array([[0, 1, 2], [5, 6, 7]])
    whole = Rotary(interleaved=interleaved)
    part = Rotary(interleaved=interleaved, dim=4)
    turned = part.rotate(x, positions)
    np.testing.assert_array_equal(turned[..., :4], whole.rotate(x[..., :4], positions))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])


@pytest.mark.parametrize(
    ("rotary", "head_dim", "message"),
    [
        (Rotary(), 5, "need an even head_dim: head_dim=5"),
        (Rotary(dim=6), 4, r"must be at most head_dim: rotary\.dim=6, head_dim=4\. Lower it"),
        (
            Rotary(scaling=LongRope(short_factors=(1.0,), long_factors=(1.0, 2.0))),
            4,
            "must have one factor per turning pair: 1 and 2, 2 pairs",
        ),
    ],
)
def test_a_head_that_cannot_turn_is_refused(rotary, head_dim, message):
    with pytest.raises(ValueError, match=message):
        rotary.check_head_dim(head_dim)


def test_the_setting_of_latent_attention_is_named():
    with pytest.raises(ValueError, match=r"an even rope_dim: rope_dim=3\. Use an even number"):
        LatentAttention(rope_dim=3)
    with pytest.raises(ValueError, match=r"an even rotary\.dim: rotary\.dim=3\. Use"):
        Rotary(dim=3)


# Frequencies (radians at position 1) and the factor on cosines and sines: 8 dims, base 10000, 64
# tokens of pre-training, from transformers 5.24. `test_against_transformers` recomputes them.
YARN = {"factor": 4.0, "original_length": 64, "fast_turns": 8.0, "slow_turns": 0.5}
HUGGING_FACE_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 8.0, "beta_slow": 0.5,
}  # fmt: skip
LLAMA3 = {"factor": 4.0, "low_turns": 0.5, "high_turns": 6.0, "original_length": 64}
LONG = {
    "short_factors": (1.0, 1.5, 2.0, 4.0), "long_factors": (1.0, 3.0, 8.0, 16.0), "factor": 4.0,
    "original_length": 64,
}  # fmt: skip
HUGGING_FACE_LONG = {
    "rope_type": "longrope", "short_factor": list(LONG["short_factors"]),
    "long_factor": list(LONG["long_factors"]), "factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALINGS = {
    "linear": (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}, None),
    "llama3": (
        Llama3Scaling(**LLAMA3),
        {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 6.0,
            "original_max_position_embeddings": 64,
        },
        None,
    ),
    "yarn": (Yarn(**YARN), HUGGING_FACE_YARN, None),
    "yarn, not truncated": (
        Yarn(**YARN, truncate=False), {**HUGGING_FACE_YARN, "truncate": False}, None,
    ),
    "yarn, attention factor": (
        Yarn(**YARN, attention_factor=1.3), {**HUGGING_FACE_YARN, "attention_factor": 1.3}, None,
    ),
    "yarn, mscale": (
        Yarn(**YARN, mscale=0.5, mscale_all_dim=0.8),
        {**HUGGING_FACE_YARN, "mscale": 0.5, "mscale_all_dim": 0.8},
        None,
    ),
    "yarn, one mscale": (Yarn(**YARN, mscale=0.5), {**HUGGING_FACE_YARN, "mscale": 0.5}, None),
    "yarn, as Kimi K2": (
        Yarn(**YARN | {"fast_turns": 1.0, "slow_turns": 1.0}, mscale=1.0, mscale_all_dim=1.0),
        {**HUGGING_FACE_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1, "mscale_all_dim": 1},
        None,
    ),
    "yarn, factor 1": (
        Yarn(**YARN | {"factor": 1.0}), {**HUGGING_FACE_YARN, "factor": 1.0}, None,
    ),
    "longrope, short": (LongRope(**LONG), HUGGING_FACE_LONG, 64),
    "longrope, long": (LongRope(**LONG), HUGGING_FACE_LONG, 65),
    "longrope, attention factor": (
        LongRope(**LONG, attention_factor=0.9), {**HUGGING_FACE_LONG, "attention_factor": 0.9}, 64,
    ),
    "dynamic, short": (
        DynamicScaling(4.0, original_length=64), {"rope_type": "dynamic", "factor": 4.0}, 60,
    ),
    "dynamic, long": (
        DynamicScaling(4.0, original_length=64), {"rope_type": "dynamic", "factor": 4.0}, 100,
    ),
}  # fmt: skip
EXPECTED = {
    "linear": ([0.25, 0.025, 0.0024999999, 0.00025000001], 1),
    "llama3": ([1, 0.032071706, 0.0024999999, 0.00025000001], 1),
    "yarn": ([1, 0.0625, 0.0024999999, 0.00025000001], 1.1386294),
    "yarn, not truncated": ([1, 0.044248302, 0.0024999999, 0.00025000001], 1.1386294),
    "yarn, attention factor": ([1, 0.0625, 0.0024999999, 0.00025000001], 1.3),
    "yarn, mscale": ([1, 0.0625, 0.0024999999, 0.00025000001], 0.96256306),
    "yarn, one mscale": ([1, 0.0625, 0.0024999999, 0.00025000001], 1.1386294),
    "yarn, as Kimi K2": ([1, 0.1, 0.0025, 0.00025], 1),
    "yarn, factor 1": ([1, 0.1, 0.0099999998, 0.001], 1),
    "longrope, short": ([1, 0.06666667, 0.0049999999, 0.00025000001], 1.1547005),
    "longrope, long": ([1, 0.033333335, 0.00125, 6.2500003e-05], 1.1547005),
    "longrope, attention factor": ([1, 0.06666667, 0.0049999999, 0.00025000001], 0.9),
    "dynamic, short": ([1, 0.1, 0.0099999998, 0.001], 1),
    "dynamic, long": ([1, 0.067510642, 0.0045576864, 0.0003076923], 1),
}


def close_to(scaling, length, expected):
    angles, factors = frequencies(Rotary(scaling=scaling), 8, length or 2)
    np.testing.assert_allclose(angles, expected[0], rtol=FLOAT32)
    np.testing.assert_allclose(factors, expected[1], rtol=FLOAT32)


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies(name):
    scaling, _, length = SCALINGS[name]
    close_to(scaling, length, EXPECTED[name])


@pytest.mark.parametrize("name", SCALINGS)
def test_against_transformers(name):
    pytest.importorskip("torch")
    config_of = pytest.importorskip("transformers").LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, parameters, length = SCALINGS[name]
    config = config_of(
        hidden_size=8, num_attention_heads=1, head_dim=8,
        max_position_embeddings=64 if "dynamic" in name else 256,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
    )  # fmt: skip
    inverse, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=length)
    close_to(scaling, length, (inverse.numpy(), factor))
    np.testing.assert_allclose(inverse, EXPECTED[name][0], rtol=FLOAT32)
    assert factor == pytest.approx(EXPECTED[name][1], rel=FLOAT32)


def test_a_long_document_may_have_a_factor_of_its_own():
    scaling = LongRope(original_length=6, attention_factor=1.5, long_attention_factor=0.5)
    for length, factor in ((6, 1.5), (7, 0.5)):
        _, factors = frequencies(Rotary(scaling=scaling), 4, length)
        np.testing.assert_allclose(factors, factor, rtol=FLOAT32)
    alike = LongRope(original_length=6, attention_factor=1.5)
    np.testing.assert_allclose(frequencies(Rotary(scaling=alike), 4, 7)[1], 1.5, rtol=FLOAT32)


def test_softmax_factors():
    """m(s) = 0.1 s ln(factor) + 1; DeepSeek multiplies its scale by m(mscale_all_dim) squared."""
    deepseek = Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    assert Rotary(scaling=deepseek).softmax_factor == pytest.approx(1.368888**2, rel=1e-5)
    assert deepseek.cos_sin_factor == 1.0
    assert Yarn(factor=40.0).softmax_factor == Rotary().softmax_factor == 1.0
    assert LinearScaling(4.0).softmax_factor == 1.0


def test_lengths_are_of_documents():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]])
    assert document_lengths(positions, segments).tolist() == [[3, 3, 3, 2, 2, 1], [1, 1] + [4] * 4]
    assert document_lengths(positions, None).tolist() == [[3] * 6, [4] * 6]


@pytest.mark.parametrize(
    "scaling",
    [
        DynamicScaling(2.0, original_length=3),
        LongRope(short_factors=(1.0, 2.0), long_factors=(3.0, 5.0), original_length=3),
    ],
)
def test_the_length_of_one_document_is_nothing_to_another(scaling):
    """Three tokens keep their frequencies next to five, which exceed the pre-training length."""
    rotary = Rotary(base=10.0, scaling=scaling)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 2, 4)), jnp.float32)
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]])
    packed = rotary.rotate(x, positions, segments)
    np.testing.assert_array_equal(packed[:, :3], rotary.rotate(x[:, :3], positions[:, :3]))
    np.testing.assert_array_equal(packed[:, 3:], rotary.rotate(x[:, 3:], positions[:, 3:]))
    assert np.abs(packed - rotary.rotate(x, positions)).max() > 0.1, "as one document"
