"""Schedules by value, the parameters that decay, and the optimizers against optax."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import ExperimentConfig, OptimizerConfig, TrainingConfig
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.parameters import ParameterSpec, init_parameters, normal_init
from moe_jax.part import Part
from moe_jax.training.optimizers import learning_rate_schedule, make_optimizer, per_parameter
from tests.tiny_run import quick_jit, tiny_config, tiny_state

FLOAT32 = {"rtol": 1e-6, "atol": 1e-9}  # the same operations, fused otherwise
PEAK = 0.5


def adamw(**settings):
    return OptimizerConfig(
        **{"learning_rate": PEAK, "schedule": "constant", "warmup_steps": 0, **settings}
    )


def spec(shape, decays, num_stacked=0):
    axes = (None,) * len(shape)
    return ParameterSpec(shape, axes, normal_init(1.0), "test", decays, num_stacked)


def optimizer_of(settings, specs):
    """The optimizer of a ten-step run of a model with these parameters."""
    model = types.SimpleNamespace(specs=lambda: specs)
    training = TrainingConfig(num_steps=10)
    return make_optimizer(types.SimpleNamespace(optimizer=settings, model=model, training=training))


# By step of 100: the first, the end of the warm-up, the last, and some that are easy to compute.
@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {1: 1, 50: 1, 100: 1}),
        ("constant", 10, {1: 0.1, 5: 0.5, 10: 1, 100: 1}),
        # Half a cosine from 1 to 0.1: 0.55 in the middle, 0.1 + 0.9 * 0.75 after a third.
        ("cosine", 0, {1: 1, 34: 0.1 + 0.9 * 0.75, 100: 0.1, 120: 0.1}),
        ("cosine", 1, {1: 1, 34: 0.1 + 0.9 * 0.75, 100: 0.1}),
        ("cosine", 10, {1: 0.1, 9: 0.9, 10: 1, 40: 0.1 + 0.9 * 0.75, 55: 0.55, 100: 0.1}),
        ("linear", 0, {1: 1, 34: 0.7, 67: 0.4, 100: 0.1}),
        ("linear", 10, {1: 0.1, 5: 0.5, 10: 1, 55: 0.55, 100: 0.1}),
        ("rsqrt", 10, {1: 0.1, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3, 100: 0.1**0.5, 1000: 0.1}),
        ("wsd", 0, {1: 1, 80: 1, 90: 0.55, 100: 0.1}),
        ("wsd", 10, {1: 0.1, 10: 1, 80: 1, 85: 0.775, 100: 0.1}),
        ("cosine", 100, {1: 0.01, 99: 0.99, 100: 1}),
    ],
)
def test_schedules(schedule, warmup, expected):
    rate = learning_rate_schedule(adamw(schedule=schedule, warmup_steps=warmup), 100)
    for step, share in expected.items():
        np.testing.assert_allclose(rate(jnp.int32(step - 1)), PEAK * share, rtol=1e-6, atol=1e-9)


def test_a_constant_warm_up_uses_the_peak_from_the_first_step_on():
    """T5's schedule: the peak times sqrt(W / max(step, W))."""
    settings = adamw(schedule="rsqrt", warmup_steps=10, warmup="constant")
    rate = learning_rate_schedule(settings, 100)
    steps = jnp.asarray([1, 5, 10, 40])
    np.testing.assert_allclose(rate(steps - 1), PEAK * np.array([1, 1, 1, 0.5]), rtol=1e-6)


def test_a_decay_shorter_than_a_step_is_at_the_last_step():
    rate = learning_rate_schedule(adamw(schedule="wsd", decay_fraction=1e-3), 100)
    np.testing.assert_allclose([rate(97), rate(98), rate(99)], [PEAK, PEAK, 0.1 * PEAK], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_a_run_of_one_step_takes_it_with_a_finite_rate(schedule):
    rate = float(learning_rate_schedule(adamw(schedule=schedule), 1)(0))
    assert rate in (PEAK, pytest.approx(0.1 * PEAK))


def test_each_step_uses_the_rate_of_its_number():
    """A step of Lion without decay has the size of the learning rate."""
    settings = adamw(
        name="lion", schedule="linear", warmup_steps=2, final_fraction=0.25, weight_decay=0.0
    )
    optimizer = optimizer_of(settings, {"w": spec((1,), decays=True)})
    params = {"w": jnp.zeros(1)}
    state, sizes = optimizer.init(params), []
    for _ in range(10):
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        sizes.append(-float(updates["w"][0]))
    expected = [0.5, *np.linspace(1, 0.25, 9)]
    np.testing.assert_allclose(sizes, PEAK * np.array(expected), rtol=1e-5)


EVERYTHING = {
    "tie_embeddings": False,
    "norm": "layernorm",
    "parts": {
        "attention": {"biases": tuple("qkvo"), "qk_norm": "rmsnorm"},
        "mlp": {"kind": "mlp", "dim": 32, "activation": "swiglu", "use_bias": True},
        "moe": {
            "activation": "swiglu", "use_bias": True,
            "shared_expert_dim": 32, "shared_expert_gate": True,
        },
    },
    "stack": {
        "first": [["attention", "mlp"]], "unit": [["attention", "moe"]], "repeats": 3,
        "last": [["attention", "moe"]],
    },
}  # fmt: skip


def decayed(config, params):
    """For each parameter, whether a step without a gradient changes it."""
    optimizer = make_optimizer(config)

    @quick_jit
    def update(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    return {
        tuple(entry.key for entry in path): bool(np.any(leaf))
        for path, leaf in jax.tree.leaves_with_path(update(params))
    }


def test_matrices_decay_and_norms_biases_and_embeddings_do_not():
    """A model with every kind of parameter, in repeated and in other layers."""
    config = tiny_config({"model": EVERYTHING})
    names = {True: set(), False: set()}
    for path, decays in decayed(config, tiny_state(config).params).items():
        names[decays].add("/".join(path[-2:]))
    matrices = {f"attention/w{x}" for x in "qkvo"} | {
        "head", "router/weight", "experts/wi", "experts/wg", "experts/wo",
        "shared/wi", "shared/wg", "shared/wo", "shared/gate", "mlp/wi", "mlp/wg", "mlp/wo",
    }  # fmt: skip
    others = {f"attention/b{x}" for x in "qkvo"} | {
        "embedding", "experts/bi", "experts/bg", "experts/bo",
        "shared/bi", "shared/bg", "shared/bo", "mlp/bi", "mlp/bg", "mlp/bo",
    }  # fmt: skip
    norms = ("attention_norm", "mlp_norm", "moe_norm", "final_norm")
    others |= {f"{norm}/{name}" for norm in norms for name in ("scale", "bias")}
    others |= {"q_norm/scale", "k_norm/scale"}
    assert names == {True: matrices, False: others}


@dataclasses.dataclass(frozen=True)
class Mixer(Part):
    """A user's part, whose parameter names mean something else elsewhere."""

    def specs(self, dims):
        matrix, stacked = (dims.model_dim, 3), (5, dims.model_dim, 3)
        return {
            "router_mlp": spec(matrix, decays=True),
            "norm": spec(matrix, decays=True),
            "embedding": spec(stacked, decays=True, num_stacked=1),
            "wi": spec(matrix, decays=False),
        }

    def looks_ahead(self, training):
        return False

    def apply(self, params, x_BLM, call, own):
        return x_BLM, None, None


def mixers(**optimizer):
    stack = StackLayout(first=(("mixer",),), unit=(("mixer",),), repeats=2)
    model = LanguageModel(model_dim=4, parts={"mixer": Mixer()}, stack=stack)
    return ExperimentConfig(model=model, optimizer=adamw(**optimizer))


def test_what_decays_is_what_the_specs_say_whatever_its_name():
    config = mixers()
    params = init_parameters(jax.random.key(0), config.model.specs())
    of_mixers = {
        path[1:]: decays
        for path, decays in decayed(config, params).items()
        if path[-2:-1] == ("mixer",)
    }
    assert of_mixers == {
        (segment, "0", "mixer", name): name != "wi"
        for segment in ("first", "unit")
        for name in ("router_mlp", "norm", "embedding", "wi")
    }


def test_what_is_stacked_is_what_the_specs_say():
    """Five matrices in one array are five parameters, and so are those of repeated layers."""
    config = mixers(name="adafactor", weight_decay=0.0, clip_norm=0.0)
    params = init_parameters(jax.random.key(0), config.model.specs())
    optimizer = make_optimizer(config)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    dims = {"router_mlp": 0, "norm": 0, "embedding": 1, "wi": 0}
    for segment, layers in (("first", 0), ("unit", 1)):
        for name, own in dims.items():
            update = np.asarray(updates["stack"][segment]["0"]["mixer"][name])
            param = np.asarray(params["stack"][segment]["0"]["mixer"][name])
            for index in np.ndindex(param.shape[: layers + own]):
                # The gradient over its root mean square is 1; the step is relative to the scale.
                rms = math.sqrt(np.mean(np.square(param[index])))
                np.testing.assert_allclose(update[index], -PEAK * rms, rtol=1e-4, err_msg=name)


def some_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda one: jnp.asarray(rng.normal(size=one.shape), jnp.float32), SOME_SPECS
    )


SOME_SPECS = {
    "embedding": spec((5, 3), decays=False),
    "ffn": {"wi": spec((3, 4), decays=True), "bi": spec((4,), decays=False)},
    "norm": {"scale": spec((3,), decays=False)},
}


@functools.partial(quick_jit, static_argnums=(0, 2))
def train(optimizer, params, steps=5):
    """Takes some steps on gradients that depend on the parameters and the step."""
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
    got, expected = train(optimizer_of(config, SOME_SPECS), params), train(reference, params)
    assert jnp.any(got["ffn"]["wi"] != params["ffn"]["wi"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FLOAT32), got, expected)


def test_the_state_is_laid_out_as_in_the_checkpoints_of_earlier_releases():
    """This includes empty states: Orbax restores nothing into another tree."""
    params = some_params()
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=jax.tree.map(lambda one: one.decays, SOME_SPECS)),
        optax.scale_by_learning_rate(optax.constant_schedule(0.1)),
    )
    for settings in (adamw(), adamw(clip_norm=0.0, clip_value=1.0), adamw(schedule="wsd")):
        state = optimizer_of(settings, SOME_SPECS).init(params)
        assert jax.tree.structure(state) == jax.tree.structure(reference.init(params))


def test_decay_is_the_weight_times_rate_and_parameter():
    """With no gradient, a step multiplies a matrix by 1 - rate * weight_decay."""
    optimizer = optimizer_of(adamw(learning_rate=0.1, weight_decay=0.5), SOME_SPECS)
    params = some_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["ffn"]["wi"], -0.05 * params["ffn"]["wi"], **FLOAT32)
    for name in ("embedding", "norm"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates[name]))
    assert not np.any(updates["ffn"]["bi"])


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 1 / 13), (13.0, 1), (20.0, 1), (0.0, 1)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, scale):
    """The norm over two arrays is 13. Epsilon is huge, so Adam is linear in the gradient."""
    optimizer = optimizer_of(
        adamw(learning_rate=1.0, clip_norm=clip_norm, epsilon=1e6, weight_decay=0.0),
        {"wa": spec((2,), decays=True), "wb": spec((1,), decays=True)},
    )
    params = {"wa": jnp.zeros(2), "wb": jnp.zeros(1)}
    grads = {"wa": jnp.array([3.0, 4.0]), "wb": jnp.array([12.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name, grad in grads.items():
        np.testing.assert_allclose(updates[name], -grad * scale / 1e6, rtol=1e-4)


def test_adafactor_is_optax_adafactor_on_one_matrix():
    """The matrix is large enough to be factored."""
    rng = np.random.default_rng(0)
    params = {"wi": jnp.asarray(rng.normal(size=(128, 130)), jnp.float32)}
    config = adamw(name="adafactor", learning_rate=0.01, clip_norm=0.0, weight_decay=0.0)
    optimizer = optimizer_of(config, {"wi": spec((128, 130), decays=True)})
    reference = optax.adafactor(0.01, multiply_by_parameter_scale=True)
    factored = [leaf.size for leaf in jax.tree.leaves(optimizer.init(params))]
    assert max(factored) == 130, "the second moments are a row and a column"
    got, expected = train(optimizer, params, 3), train(reference, params, 3)
    np.testing.assert_allclose(got["wi"], expected["wi"], rtol=1e-5, atol=1e-7)


def test_stacked_parameters_are_transformed_one_by_one():
    """Experts of repeated layers; their biases, which have two dims; norms of repeated layers."""
    rng = np.random.default_rng(0)
    stacked = {
        "first": {
            "experts": {"wi": ((2, 3, 4), 1), "bi": ((2, 4), 1)},
            "router": {"weight": ((3, 2), 0)},
            "shared": {"bi": ((4,), 0)},
        },
        "unit": {
            "experts": {"wi": ((5, 2, 3, 4), 2), "bi": ((5, 2, 4), 2)},
            "router": {"weight": ((5, 3, 2), 1)},
            "shared": {"bi": ((5, 4), 1)},
            "moe_norm": {"scale": ((5, 3), 1)},
        },
    }

    def is_pair(node):
        return isinstance(node, tuple)

    counts = jax.tree.map(lambda pair: pair[1], stacked, is_leaf=is_pair)
    specs = jax.tree.map(lambda pair: spec(pair[0], True, pair[1]), stacked, is_leaf=is_pair)
    params = jax.tree.map(
        lambda pair: jnp.asarray(rng.normal(size=pair[0]), jnp.float32), stacked, is_leaf=is_pair
    )
    # This transform depends on array bounds: it uses the whole parameter's root mean square.
    transform = optax.scale_by_param_block_rms()
    wrapped = per_parameter(lambda _: transform, specs)
    grads = jax.tree.map(jnp.ones_like, params)
    got, _ = wrapped.update(grads, wrapped.init(params), params)
    leaves = zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(params), jax.tree.leaves(counts),
        strict=True,
    )  # fmt: skip
    for (path, update), param, count in leaves:
        for index in np.ndindex(param.shape[:count]):
            rms = math.sqrt(np.mean(np.square(param[index])))
            np.testing.assert_allclose(update[index], rms, rtol=1e-5, err_msg=str(path))


@pytest.mark.slow
def test_adafactor_trains_repeated_layers_like_layers_one_by_one():
    """Every parameter, including norms and expert biases."""
    layer = ["attention", "moe"]
    model = {
        "model_dim": 128,
        "parts": {
            "attention": {"biases": tuple("qkvo")},
            "moe": {"num_experts": 2, "expert_dim": 136, "use_bias": True},
        },
    }
    optimizer = {"name": "adafactor", "learning_rate": 0.01, "clip_norm": 0.0}
    settings = {"model": model, "optimizer": optimizer, "training": {"num_steps": 10}}

    def in_stack(**stack):
        return tiny_config(settings | {"model": model | {"stack": stack}})

    plain = in_stack(first=[layer, layer], unit=[], repeats=0)
    repeated = in_stack(unit=[layer], repeats=2)
    params = tiny_state(plain).params

    def stack(tree):
        layers = tree["stack"]["first"]
        unit = {"0": jax.tree.map(lambda a, b: jnp.stack([a, b]), layers["0"], layers["1"])}
        return tree | {"stack": {"first": {}, "unit": unit, "last": {}}}

    abstract = jax.eval_shape(lambda: tiny_state(repeated).params)
    assert jax.tree.structure(stack(params)) == jax.tree.structure(abstract)
    expected = stack(train(make_optimizer(plain), params, 2))
    got = train(make_optimizer(repeated), stack(params), 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)
