"""Schedules by value, which parameters decay, and the optimizers against optax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import OptimizerConfig
from moe_jax.training.optimizers import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    per_parameter,
)
from tests.tiny_run import quick_jit, tiny_config, tiny_state

FLOAT32 = {"rtol": 1e-6, "atol": 1e-9}  # the same operations, fused otherwise
PEAK = 0.5


def adamw(**settings):
    return OptimizerConfig(
        **{"learning_rate": PEAK, "schedule": "constant", "warmup_steps": 0, **settings}
    )


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1, 50: 1, 100: 1}),
        ("constant", 10, {0: 0, 5: 0.5, 10: 1, 100: 1}),
        # Half a cosine from 1 to 0.1: in the middle 0.55, at a third 0.1 + 0.9 * 0.75.
        ("cosine", 0, {0: 1, 50: 0.55, 100: 0.1, 120: 0.1}),
        ("cosine", 10, {0: 0, 1: 0.1, 10: 1, 40: 0.1 + 0.9 * 0.75, 55: 0.55, 100: 0.1}),
        ("linear", 0, {0: 1, 50: 0.55, 100: 0.1}),
        ("linear", 10, {0: 0, 5: 0.5, 10: 1, 55: 0.55, 100: 0.1}),
        ("rsqrt", 10, {0: 0, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3, 1000: 0.1}),
        ("cosine", 100, {0: 0, 99: 0.99, 100: 1}),
    ],
)
def test_schedules(schedule, warmup, expected):
    config = adamw(schedule=schedule, warmup_steps=warmup)
    rate = learning_rate_schedule(config, 100)
    for step, share in expected.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), PEAK * share, rtol=1e-6, atol=1e-9)


EVERYTHING = {
    "num_layers": 3,
    "attention_bias": True,
    "ffn_bias": True,
    "qk_norm": True,
    "norm": "layernorm",
    "tie_embeddings": False,
    "activation": "swiglu",
    "moe": {
        "layer_period": 2,
        "activation": "swiglu",
        "use_bias": True,
        "num_shared_experts": 1,
        "shared_expert_gate": True,
    },
}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_matrices_decay_and_norms_biases_and_embeddings_do_not(scan_layers):
    """A decoder with every kind of parameter; with three layers alike a scan stacks them."""
    moe = EVERYTHING["moe"] | ({"layer_period": 1} if scan_layers else {})
    config = tiny_config({"model": EVERYTHING | {"scan_layers": scan_layers, "moe": moe}})
    params = tiny_state(config).params
    names = {True: set(), False: set()}
    for path, decays in jax.tree.leaves_with_path(decay_mask(params)):
        names[decays].add("/".join(entry.key for entry in path[-2:]))
    matrices = {f"attention/w{x}" for x in "qkvo"} | {
        "head", "moe/router", "moe/wi", "moe/wg", "moe/wo",
        "moe/shared_wi", "moe/shared_wg", "moe/shared_wo", "moe/shared_gate",
    }  # fmt: skip
    others = {f"attention/b{x}" for x in "qkvo"} | {
        "embedding", "moe/bi", "moe/bg", "moe/bo",
        "moe/shared_bi", "moe/shared_bg", "moe/shared_bo",
    }  # fmt: skip
    norms = ("attention_norm", "ffn_norm", "final_norm")
    others |= {f"{norm}/{name}" for norm in norms for name in ("scale", "bias")}
    others |= {"q_norm/scale", "k_norm/scale"}
    if not scan_layers:
        matrices |= {"ffn/wi", "ffn/wg", "ffn/wo"}
        others |= {"ffn/bi", "ffn/bg", "ffn/bo"}
    assert names == {True: matrices, False: others}


def is_shape(node):
    return isinstance(node, tuple)


def some_params():
    rng = np.random.default_rng(0)
    shapes = {"embedding": (5, 3), "ffn": {"wi": (3, 4), "bi": (4,)}, "norm": {"scale": (3,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=is_shape,
    )


@functools.partial(quick_jit, static_argnums=(0, 2))
def train(optimizer, params, steps=5):
    """Some steps on gradients that are functions of the parameters and the step."""
    state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(3 * p + step), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_is_optax_adamw():
    config = adamw(
        name="adamw", learning_rate=0.1, schedule="cosine", warmup_steps=2, clip_norm=0.0,
        b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.3,
    )  # fmt: skip
    mask = {"embedding": False, "ffn": {"wi": True, "bi": False}, "norm": {"scale": False}}
    reference = optax.adamw(
        learning_rate_schedule(config, 10), b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, mask=mask
    )
    params = some_params()
    got, expected = train(make_optimizer(config, 10), params), train(reference, params)
    assert jnp.any(got["ffn"]["wi"] != params["ffn"]["wi"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FLOAT32), got, expected)


def test_decay_is_the_weight_times_rate_and_parameter():
    """With no gradient, a step multiplies a matrix by 1 - rate * weight_decay."""
    optimizer = make_optimizer(adamw(learning_rate=0.1, weight_decay=0.5), 10)
    params = some_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["ffn"]["wi"], -0.05 * params["ffn"]["wi"], **FLOAT32)
    for name in ("embedding", "norm"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates[name]))
    assert not np.any(updates["ffn"]["bi"])


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 1 / 13), (13.0, 1), (20.0, 1), (0.0, 1)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, scale):
    """Norm 13 over two arrays. Epsilon is huge, so that Adam is linear in the gradient."""
    optimizer = make_optimizer(
        adamw(learning_rate=1.0, clip_norm=clip_norm, epsilon=1e6, weight_decay=0.0), 10
    )
    params = {"wa": jnp.zeros(2), "wb": jnp.zeros(1)}
    grads = {"wa": jnp.array([3.0, 4.0]), "wb": jnp.array([12.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name, grad in grads.items():
        np.testing.assert_allclose(updates[name], -grad * scale / 1e6, rtol=1e-4)


def test_adafactor_is_optax_adafactor_on_one_matrix():
    """Large enough to be factored."""
    rng = np.random.default_rng(0)
    params = {"wi": jnp.asarray(rng.normal(size=(128, 130)), jnp.float32)}
    config = adamw(name="adafactor", learning_rate=0.01, clip_norm=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10)
    reference = optax.adafactor(0.01, multiply_by_parameter_scale=True)
    factored = [leaf.size for leaf in jax.tree.leaves(optimizer.init(params))]
    assert max(factored) == 130, "the second moments are a row and a column"
    got, expected = train(optimizer, params, 3), train(reference, params, 3)
    np.testing.assert_allclose(got["wi"], expected["wi"], rtol=1e-5, atol=1e-7)


def test_stacked_parameters_are_transformed_one_by_one():
    """Experts of scanned layers; their biases, which have two dims; norms of scanned layers."""
    rng = np.random.default_rng(0)
    shapes = {
        "first": {"moe": {"wi": (2, 3, 4), "bi": (2, 4), "router": (3, 2), "shared_bi": (4,)}},
        "repeated": {
            "moe": {"wi": (5, 2, 3, 4), "bi": (5, 2, 4), "router": (5, 3, 2), "shared_bi": (5, 4)},
            "ffn_norm": {"scale": (5, 3)},
        },
    }
    stacked = {"wi": 1, "bi": 1}  # dims of experts
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=is_shape
    )
    # It knows one array from another: the root mean square of the whole parameter.
    transform = optax.scale_by_param_block_rms()
    wrapped = per_parameter(transform)
    grads = jax.tree.map(jnp.ones_like, params)
    got, _ = wrapped.update(grads, wrapped.init(params), params)
    for path, update in jax.tree.leaves_with_path(got):
        names = [entry.key for entry in path]
        dims = (names[0] == "repeated") + stacked.get(names[-1], 0)
        param = params
        for name in names:
            param = param[name]
        for index in np.ndindex(param.shape[:dims]):
            rms = math.sqrt(np.mean(np.square(param[index])))
            np.testing.assert_allclose(update[index], rms, rtol=1e-5, err_msg=str(names))


def test_adafactor_trains_scanned_layers_like_layers_one_by_one():
    """Every parameter, norms and biases of experts included."""
    model = {
        "num_layers": 2, "model_dim": 128, "attention_bias": True,
        "moe": {"num_experts": 2, "expert_dim": 136, "use_bias": True},
    }  # fmt: skip
    plain = tiny_config({"model": model})
    params = dict(tiny_state(plain).params)
    optimizer = make_optimizer(
        adamw(name="adafactor", learning_rate=0.01, clip_norm=0.0), num_steps=10
    )

    def scan(tree):
        layers = tree["first"].values()
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), *layers)
        rest = {name: value for name, value in tree.items() if name != "first"}
        return rest | {"repeated": {"layer_0": stacked}}

    scanned = tiny_config({"model": model | {"scan_layers": True}})
    abstract = jax.eval_shape(lambda: tiny_state(scanned).params)
    assert jax.tree.structure(scan(params)) == jax.tree.structure(abstract)
    expected = scan(train(optimizer, params, 2))
    got = train(optimizer, scan(params), 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)
