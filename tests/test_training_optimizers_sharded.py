"""Optimizers over eight devices equal those on one; moments are placed like their parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config.run import OPTIMIZERS
from moe_jax.parallel.batches import from_whole
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.training.optimizers import make_optimizer
from moe_jax.training.placement import BATCH_AXES, compile_train_step, state_shardings
from moe_jax.training.state import evaluation_params
from moe_jax.training.step import make_train_step
from tests.tiny_run import cut, quick_jit, tiny_batch, tiny_config, tiny_state

MIXED = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
AVERAGED = {"ema": {"ema_decay": 0.9}, "schedule_free": {"schedule": "constant"}}
# Relative to the largest entry of each array. In each of five iterations Newton-Schulz multiplies a
# small singular value, and a rounding error as small, by 3.4.
TOLERANCE = {"muon": 1e-3, "schedule_free": 1e-4}
STEPS = 2
# Each compilation takes a second or more. This one keeps more than one average.
QUICK = ("schedule_free",)


def make_config(name, mesh):
    """Repeated layers with experts, and clipping in force."""
    optimizer = {"name": "adamw" if name == "ema" else name, **AVERAGED.get(name, {})}
    return tiny_config(
        {
            "model": {
                "parts": {"moe": {"num_experts": 8}},
                "tie_embeddings": False,
                "scan_layers": True,
            },
            "optimizer": {**optimizer, "clip_norm": 0.1, "clip_value": 0.05},
            "training": {"batch_size": 16},
            "mesh": mesh,
        }
    )


def assert_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = max(np.abs(b).max(), 1e-6) if b.size else 1
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )


def updates(config):
    """Some steps of the optimizer only, on gradients that depend on the parameters."""
    optimizer = make_optimizer(config)

    def run(params, opt_state):
        for step in range(STEPS):
            grads = jax.tree.map(lambda p, step=step: jnp.sin(7 * p + step), params)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, changes)
        return params, opt_state

    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in (*OPTIMIZERS, "ema")
    ],
)
def test_its_steps_are_those_of_one_device(name):
    config = make_config(name, MIXED)
    state, mesh = tiny_state(config), make_mesh(config.mesh)
    start = (state.params, make_optimizer(config).init(state.params))
    placed = state_shardings(config, mesh)
    where = (placed.params, placed.opt_state)
    on_mesh = quick_jit(updates(config), in_shardings=where, out_shardings=where)
    got, expected = on_mesh(*start), quick_jit(updates(config))(*start)
    assert np.any(np.abs(expected[0]["head"] - state.params["head"]) > 1e-4)
    assert_close(got, expected, TOLERANCE.get(name, 2e-5))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "ema"])
def test_what_it_keeps_of_a_parameter_lies_with_it(name):
    """Every array of the state that is as large as a matrix of experts is split like it."""
    config = make_config(name, MIXED)
    mesh = make_mesh(config.mesh)
    kept, placed = jax.tree.leaves(jax.eval_shape(lambda: tiny_state(config).opt_state)), 0
    shardings = jax.tree.leaves(state_shardings(config, mesh).opt_state)
    wanted = named_sharding((None, "expert", "model", "hidden"), mesh)
    for leaf, sharding in zip(kept, shardings, strict=True):
        if leaf.shape == (2, 8, 16, 32):
            assert sharding.is_equivalent_to(wanted, 4)
            placed += 1
    assert placed == {"lion": 1, "muon": 1, "adafactor": 1, "ema": 3}.get(name, 2)


@functools.cache
def batches():
    return [cut(tiny_batch(16, seed=seed)) for seed in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIMIZERS, "ema"])
def test_training_steps_are_those_of_one_device(name):
    config = make_config(name, MIXED)
    mesh, state = make_mesh(config.mesh), tiny_state(config)
    # The state that `init` makes from the parameters; `tiny_state` has zeros there.
    state = state._replace(opt_state=make_optimizer(config).init(state.params))
    step, expected = quick_jit(make_train_step(config)), state
    for batch in batches():
        expected, _ = step(expected, batch)
    step = compile_train_step(config, mesh)
    got = jax.tree.map(
        jax.device_put, jax.tree.map(np.asarray, state), state_shardings(config, mesh)
    )
    for batch in batches():
        with jax.set_mesh(mesh):
            got, _ = step(got, from_whole(batch, mesh, BATCH_AXES))
    # Lion's steps are signs, even of small gradients: one rounding moves a parameter by two steps.
    tolerance = {"muon": 5e-3, "lion": 2e-2}.get(name, 2e-3)
    assert_close(evaluation_params(got), evaluation_params(expected), tolerance)
