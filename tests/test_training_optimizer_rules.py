"""Every update rule against its published equations, in NumPy and float64, step by step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.training.optimizers import average_parameters, trained_by_muon
from moe_jax.training.state import TrainState, evaluation_params
from tests.test_training_optimizers import adamw, optimizer_of, spec
from tests.tiny_run import quick_jit, tiny_config

RATE, DECAY = 0.1, 0.3
B1, B2, EPSILON = 0.8, 0.9, 1e-3
STEPS = 4


def gradient(param, step):
    return np.cos(5 * param + step)


def run_optimizer(specs, params, steps=STEPS, **settings):
    """Parameters after some steps, and the parameters to evaluate."""
    optimizer = optimizer_of(
        adamw(learning_rate=RATE, weight_decay=DECAY, clip_norm=0.0, **settings), specs
    )
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)

    @quick_jit
    def run(params):
        state = optimizer.init(params)
        for step in range(steps):
            grads = jax.tree.map(lambda p, step=step: jnp.cos(5 * p + step), params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, evaluation_params(TrainState(None, params, state, {}, None))

    return run(params)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def adamw_steps(param, decay=DECAY, share=1.0):
    """Loshchilov and Hutter 2019, algorithm 2, with the learning rate on the decay too."""
    m = v = 0.0
    for t in range(1, STEPS + 1):
        g = gradient(param, t - 1)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        adam = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPSILON)
        param = param - share * RATE * (adam + decay * param)
    return param


def lion_steps(param):
    """Chen et al. 2023, algorithm 2."""
    m = 0.0
    for t in range(1, STEPS + 1):
        g = gradient(param, t - 1)
        update = np.sign(B1 * m + (1 - B1) * g)
        param, m = param - RATE * (update + DECAY * param), B2 * m + (1 - B2) * g
    return param


def newton_schulz(x, steps=5):
    """Jordan 2024: odd quintic polynomials that push singular values to about 1."""
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_steps(param, scale, momentum=0.95):
    """Nesterov momentum, with both terms corrected for the start as in NAdam."""
    m = np.zeros_like(param)
    for t in range(1, STEPS + 1):
        g = gradient(param, t - 1)
        m = momentum * m + (1 - momentum) * g
        ahead = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
        param = param - RATE * (scale * newton_schulz(ahead) + DECAY * param)
    return param


def schedule_free_steps(param):
    """Defazio et al. 2024, algorithm 1: gradients at y, steps of z, the average x to evaluate."""
    x = z = param
    v = weights = 0.0
    for t in range(1, STEPS + 1):
        y = (1 - B1) * z + B1 * x
        g = gradient(y, t - 1)
        v = B2 * v + (1 - B2) * g**2
        z = z - RATE * (g / (np.sqrt(v / (1 - B2**t)) + EPSILON) + DECAY * y)
        weights += RATE**2
        x = x + RATE**2 / weights * (z - x)
    return (1 - B1) * z + B1 * x, x


ADAM = {"b1": B1, "b2": B2, "epsilon": EPSILON}
MATRIX = {"w": spec((3, 4), decays=True)}
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def test_adamw():
    params, evaluated = run_optimizer(MATRIX, {"w": drawn(3, 4)}, **ADAM)
    np.testing.assert_allclose(params["w"], adamw_steps(drawn(3, 4)), **CLOSE)
    np.testing.assert_array_equal(evaluated["w"], params["w"])


def test_lion():
    params, _ = run_optimizer(MATRIX, {"w": drawn(3, 4)}, name="lion", b1=B1, b2=B2)
    np.testing.assert_allclose(params["w"], lion_steps(drawn(3, 4)), **CLOSE)


def test_schedule_free_evaluates_the_average_of_its_iterates():
    params, evaluated = run_optimizer(MATRIX, {"w": drawn(3, 4)}, name="schedule_free", **ADAM)
    y, x = schedule_free_steps(drawn(3, 4))
    np.testing.assert_allclose(params["w"], y, **CLOSE)
    np.testing.assert_allclose(evaluated["w"], x, **CLOSE)
    assert np.abs(x - y).max() > 1e-2, "they differ"


@pytest.mark.parametrize(("match_adamw", "wide"), [(True, False), (False, False), (False, True)])
def test_muon(match_adamw, wide):
    """Moonlight's scale is 0.2 sqrt(max(I, O)), Jordan's sqrt(max(1, O / I))."""
    shape = (3, 12) if wide else (4, 3)
    scale = 0.2 * 4**0.5 if match_adamw else 2.0 if wide else 1.0
    params, _ = run_optimizer(
        {"w": spec(shape, decays=True)}, {"w": drawn(*shape)},
        name="muon", match_adamw=match_adamw, **ADAM,
    )  # fmt: skip
    np.testing.assert_allclose(params["w"], muon_steps(drawn(*shape), scale), rtol=1e-4, atol=1e-5)


def test_muon_makes_a_step_nearly_orthogonal():
    """A gradient has singular values from 1 to 100; after 5 rounds all are between 0.3 and 1.3."""
    u, v = (np.linalg.qr(drawn(16, 16, seed=seed))[0] for seed in (0, 1))
    grads = {"w": jnp.asarray(u @ np.diag(np.geomspace(1, 100, 16)) @ v.T, jnp.float32)}
    settings = adamw(name="muon", learning_rate=1.0, weight_decay=0.0, match_adamw=False)
    optimizer = optimizer_of(settings, {"w": spec((16, 16), decays=True)})
    zeros = jax.tree.map(jnp.zeros_like, grads)
    step = -optimizer.update(grads, optimizer.init(zeros), zeros)[0]["w"]
    found = np.linalg.svd(step, compute_uv=False)
    assert 0.3 < found.min() and found.max() < 1.3
    assert np.sum(u * (step @ v)) > 0.5 * 16, "in the directions of the gradient"


def test_muon_treats_stacked_matrices_one_by_one_and_leaves_the_rest_to_adamw():
    specs = {
        "experts": spec((2, 3, 4, 5), True, 2),
        "biases": spec((2, 3, 5), False, 2),  # [layers, experts, H]
        "gate": spec((4, 1), True),
        "norm": spec((2, 4), False, 1),
    }
    params = {name: drawn(*one.shape) for name, one in specs.items()}
    got, _ = run_optimizer(specs, params, name="muon", adamw_share=0.5, **ADAM)
    for index in np.ndindex(2, 3):
        expected = muon_steps(params["experts"][index], 0.2 * 5**0.5)
        np.testing.assert_allclose(got["experts"][index], expected, rtol=1e-4, atol=1e-5)
    for name in ("biases", "gate", "norm"):
        expected = adamw_steps(params[name], DECAY * specs[name].decays, share=0.5)
        np.testing.assert_allclose(got[name], expected, **CLOSE, err_msg=name)


def test_what_muon_trains_is_what_the_specs_of_a_model_say():
    """Matrices between hidden activations: no embeddings, heads, routers, gates, norms, biases."""
    moe = {"activation": "swiglu", "use_bias": True, "shared_expert_dim": 8}
    moe["shared_expert_gate"] = True
    model = {"tie_embeddings": False, "parts": {"moe": moe, "attention": {"biases": tuple("qkv")}}}
    specs = tiny_config({"model": model}).model.specs()
    found = {
        jax.tree_util.keystr(path[-2:], simple=True, separator="/")
        for path, one in jax.tree.leaves_with_path(specs)
        if trained_by_muon(one)
    }
    assert found == {f"attention/w{x}" for x in "qkvo"} | {
        f"{owner}/{name}" for owner in ("experts", "shared") for name in ("wi", "wg", "wo")
    }


def test_adafactor_keeps_a_row_and_a_column_of_second_moments():
    """The first step of Shazeer and Stern 2018, algorithms 4 and 5, where the decay is 0."""
    shape = (128, 130)
    params, _ = run_optimizer(
        {"w": spec(shape, True)}, {"w": drawn(*shape)}, steps=1, name="adafactor"
    )
    param = drawn(*shape)
    squares = gradient(param, 0) ** 2 + 1e-30
    rows, columns = squares.mean(1, keepdims=True), squares.mean(0, keepdims=True)
    update = gradient(param, 0) / np.sqrt(rows * columns / rows.mean())
    update /= max(1, math.sqrt(np.mean(update**2)))
    update *= math.sqrt(np.mean(param**2))
    expected = param - RATE * (update + DECAY * param)
    np.testing.assert_allclose(params["w"], expected, rtol=1e-4, atol=1e-5)


def test_an_average_of_bfloat16_parameters_is_float32_from_the_start():
    transform, params = average_parameters(0.999), {"w": jnp.ones(3, jnp.bfloat16)}
    state = transform.init(params)
    _, after = jax.eval_shape(transform.update, params, state, params)
    dtypes = [jax.tree.map(lambda leaf: leaf.dtype, one) for one in (state, after)]
    assert dtypes[0] == dtypes[1] and dtypes[0].average["w"] == jnp.float32


def test_an_average_starts_as_a_plain_mean_and_then_forgets():
    """With decay 0.6 steps weigh 1, 1/2, then 0.4, so the initial values do not count."""
    averages, average = [], 0.0
    for steps in range(1, 5):
        params, evaluated = run_optimizer(
            MATRIX, {"w": drawn(3, 4)}, steps=steps, ema_decay=0.6, **ADAM
        )
        weight = (1, 1 / 2, 0.4, 0.4)[steps - 1]
        average = average + weight * (np.asarray(params["w"]) - average)
        averages.append(evaluated["w"])
        np.testing.assert_allclose(evaluated["w"], average, **CLOSE)
    assert np.abs(averages[-1] - np.asarray(params["w"])).max() > 1e-3


@pytest.mark.parametrize(
    ("clip_value", "clip_norm", "expected"),
    [
        (0.0, 0.0, [3.0, -4.0, 12.0]),
        (3.5, 0.0, [3.0, -3.5, 3.5]),
        # First by value, which leaves a norm of 41**0.5, then scaled to norm 1.
        (4.0, 1.0, [3 / 41**0.5, -4 / 41**0.5, 4 / 41**0.5]),
    ],
)
def test_gradients_are_clipped_by_value_and_then_by_norm(clip_value, clip_norm, expected):
    """Epsilon is huge, so Adam is linear in the gradient."""
    settings = adamw(
        learning_rate=1.0, clip_value=clip_value, clip_norm=clip_norm, epsilon=1e6,
        weight_decay=0.0,
    )  # fmt: skip
    optimizer = optimizer_of(settings, {"w": spec((3,), decays=True)})
    params, grads = {"w": jnp.zeros(3)}, {"w": jnp.array([3.0, -4.0, 12.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(-1e6 * updates["w"], expected, rtol=1e-4)
