"""Every family as a model of this library: training, sharding, scans and causality.

One model per family and set of parts, with random initial values. `test_interchange_families`
compares values with transformers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, TrainingConfig
from moe_jax.data.objectives.causal_lm import CausalLM
from moe_jax.data.objectives.span_corruption import SpanCorruption
from moe_jax.interchange.family import FAMILIES, Reader
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, EncoderInputs
from moe_jax.training.loss import batch_totals, partial_loss
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step
from tests.hf_families import CASES, VOCAB

# The first case of each family. Together they have one of Jamba's two parts, and each kind of
# attention.
NAMES = [
    next(name for name, case in CASES.items() if case.settings["model_type"] == family)
    for family in FAMILIES
    if family in {case.settings["model_type"] for case in CASES.values()}
]
ROUNDING = 2e-5  # relative to the largest number of an array: float32 sums in another order


def model_of(name):
    return CASES[name].family.model(Reader(CASES[name].settings))


@functools.cache
def batch(sequences=8, length=16):
    """Random tokens: two documents in the first row, left padding in the second.

    Encoders read other tokens at the same places; models without an encoder ignore them.
    """
    random = np.random.RandomState(1)
    tokens = random.randint(3, VOCAB, (sequences, length + 1))
    segments, positions = np.ones((sequences, length)), np.tile(np.arange(length), (sequences, 1))
    segments[0, 7:], positions[0, 7:] = 2, np.arange(length - 7)
    segments[1, :3], positions[1, 3:] = 0, np.arange(length - 3)
    positions[1, :3] = 0
    whole = {
        "inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments,
        "positions": positions, "encoder_inputs": tokens[::-1, :-1],
        "encoder_segment_ids": segments, "encoder_positions": positions,
    }  # fmt: skip
    whole = {name: value.astype(np.int32) for name, value in whole.items()}
    return whole | {"loss_weights": (segments > 0).astype(np.float32)}


def draw(model):
    """Parameters and state, with routers that distinguish tokens."""
    specs = model.specs()
    params = init_parameters(jax.random.key(0), specs)
    state = init_parameters(jax.random.key(1), model.state_specs())

    def stretch(spec, value):
        return value * 20 if spec.component == "router" else value

    return jax.tree.map(stretch, specs, params), state


def gradients(model, params, state):
    """The gradient of the training loss, including balance losses, without noise."""

    def loss(params):
        totals = batch_totals(batch(), model)
        share, _ = partial_loss(
            params, batch(), totals, model, model_state=state, rng=jax.random.key(3)
        )
        return share

    return jax.grad(loss)(params)


def assert_close(ours, theirs):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=ROUNDING * scale, rtol=0, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_in_bfloat16_are_finite_and_learn(name):
    model = dataclasses.replace(model_of(name), compute_dtype="bfloat16")
    objective = SpanCorruption() if model.has_encoder else CausalLM()
    config = ExperimentConfig(
        model=model,
        data=DataConfig(objective=objective),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        training=TrainingConfig(num_steps=10, batch_size=8),
    )
    step, state = jax.jit(make_train_step(config)), jax.jit(init_state, static_argnums=0)(config)
    one = {key: value[None] for key, value in batch().items()}
    losses = []
    for _ in range(10):
        state, metrics = step(state, one)
        losses.append(float(metrics.loss))
        assert np.isfinite(float(metrics.grad_norm))
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0] - 0.1
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_give_the_gradients_of_one(name):
    model = model_of(name)
    params, state = draw(model)
    alone = jax.jit(functools.partial(gradients, model))(params, state)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2).fill(8))
    place = functools.partial(jax.tree.map, lambda spec: named_sharding(spec.axes, mesh))
    placed = jax.device_put(params, place(model.specs()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(gradients, model), out_shardings=place(model.specs()))
        assert_close(compiled(placed, state), alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_unrolled_layers_give_the_gradients_of_a_scan(name):
    model = dataclasses.replace(model_of(name), scan_layers=True)
    params, state = draw(model)
    unrolled = dataclasses.replace(model, scan_layers=False, remat="full")
    results = [
        jax.jit(functools.partial(gradients, one))(params, state) for one in (model, unrolled)
    ]
    assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_logit_depends_on_a_later_token(name):
    model = model_of(name)
    params, state = draw(model)
    tokens, split = np.asarray(batch()["inputs"]), 9
    changed = tokens.copy()
    changed[:, split:] = (changed[:, split:] + 11) % (VOCAB - 3) + 3

    @jax.jit
    def logits(tokens):
        encoder = EncoderInputs(jnp.asarray(batch()["encoder_inputs"]))
        call = Call(tokens_BL=tokens, encoder=encoder if model.has_encoder else None)
        return model.run(params, call, state=state).logits_BLV

    one, other = logits(tokens), logits(changed)
    np.testing.assert_allclose(one[:, :split], other[:, :split], atol=1e-5, rtol=0)
    assert np.abs(one[:, split:] - other[:, split:]).max() > 1e-2
    # In an encoder, the same layers see both sides if any of their mixers does.
    stack = dataclasses.replace(model.stack, causal=False)
    encoder = dataclasses.replace(model, stack=stack)
    assert encoder.looks_ahead(training=False)
