"""The library computes what it computed before models were made of parts.

`tests/before/*.npz` hold configs, parameters, batches, and the results of commit f891836.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ExperimentConfig, OptimizerConfig, TrainingConfig
from moe_jax.moe.balance import named_losses
from moe_jax.moe.block import moe_block
from moe_jax.moe.routing import Choices
from moe_jax.part import Call, Own, merge_aux
from moe_jax.training.loss import batch_totals, call_of_batch
from moe_jax.training.state import TrainState
from moe_jax.training.step import gradient
from tests.before import translate
from tests.slow import slow_but

HERE = pathlib.Path(__file__).parent / "before"
FILES = sorted(path.stem for path in HERE.glob("*.npz"))
MODELS = [name for name in FILES if not name.startswith("block_")]
# The cases of a quick run.
QUICK = {
    "deepseek_v3", "expert_choice", "soft", "switch", "block_dropout_einsum", "block_replay"
}  # fmt: skip
BLOCKS = [name for name in FILES if name.startswith("block_")]
# Tolerance, relative to max(1, largest entry): float32 sums in another order.
CLOSE = 1e-5
LEARNING_RATE = 0.1
AUX_LOSSES = ("load_balance_loss", "router_z_loss", "importance_loss", "load_loss")


@functools.cache
def read(name):
    with np.load(HERE / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays}


def under(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def assert_close(got, expected, what):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    scale = max(1.0, np.abs(expected).max(initial=0))
    difference = np.abs(got - expected).max(initial=0)
    assert difference <= CLOSE * scale, f"{what}: off by {difference:.2e} of {scale:.3g}"


def assert_trees_close(got, expected, what):
    assert jax.tree.structure(got) == jax.tree.structure(expected), what
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, f"{what} {jax.tree_util.keystr(path)}")


def saved_model(name, **settings):
    old = json.loads(str(read(name)["config"]))
    model = dataclasses.replace(translate.model(old["model"]), **settings)
    config = ExperimentConfig(
        model=model,
        optimizer=OptimizerConfig(warmup_steps=0),
        training=TrainingConfig(num_steps=10, batch_size=8, num_microbatches=1),
    )
    return config, translate.model_parameters(under(read(name), "params/"), translate.model(
        old["model"]
    ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config",))
def sgd_step(params, model_state, batch, step, config):
    """Returns the loss, cross-entropy, gradient, aux, metrics, and next parameters and state."""
    state = TrainState(step, params, None, model_state, None)
    keys = jax.random.split(jax.random.key(0), batch["inputs"].shape[0])
    loss, grads, said = gradient(state, batch, keys, batch_totals(batch), config.model)
    aux = merge_aux(said.aux)
    sums = {part: one.sums for part, one in aux.items()}
    model_state = config.model.next_state(model_state, sums, step, config.training.num_steps)
    params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    metrics = config.model.metrics(aux)
    return loss, jnp.sum(said.cross_entropy), grads, aux, metrics, params, model_state


@pytest.mark.parametrize("name", slow_but(QUICK, MODELS))
def test_ten_steps_of_a_model_are_those_of_before(name):
    saved = read(name)
    config, params = saved_model(name)
    state = {"moe": {"bias_E": saved["router_bias"]}} if "router_bias" in saved else {}
    for step in range(10):
        batch = {key: value[step] for key, value in under(saved, "batches/").items()}
        outcome = sgd_step(params, state, batch, np.int32(step), config)
        loss, cross_entropy, grads, aux, metrics, params, state = outcome
        assert_close(loss, saved["total_loss"][step], f"loss of step {step}")
        assert_close(cross_entropy, saved["cross_entropy"][step], "cross-entropy")
        sums = aux["moe"].sums
        for count in ("assigned_KE", "kept_KE"):
            np.testing.assert_array_equal(sums[count], saved[f"{count}_by_step"][step])
        if "router_bias" in saved:
            assert_close(state["moe"]["bias_E"], saved["router_bias_after"][step], "bias")
        if step == 0:
            expected = translate.model_parameters(under(saved, "grads/"), config.model)
            assert_trees_close(grads, expected, "gradient")
            for metric in ("load_balance_loss", "router_z_loss"):
                assert_close(metrics[f"moe/{metric}"], saved[metric], metric)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def evaluate(params, model_state, batch, model, capacity):
    call = call_of_batch(batch, capacity=capacity)
    return model.run(params, call, state=model_state).logits_BLV


@pytest.mark.parametrize("name", slow_but(QUICK, MODELS))
def test_evaluation_of_a_model_is_that_of_before(name):
    saved = read(name)
    config, params = saved_model(name)
    state = {"moe": {"bias_E": saved["router_bias"]}} if "router_bias" in saved else {}
    batch = {k: v[0].reshape(-1, v.shape[-1]) for k, v in under(saved, "batches/").items()}
    for key, capacity in (("logits", 0.0), ("logits_capacity", None)):
        logits = evaluate(params, state, batch, config.model, capacity)
        assert_close(logits[: len(saved[key])], saved[key], key)


# Scan instead of an unrolled stack and the reverse, and other recomputation in the backward pass.
# `test_models_stack` has a quick version.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deepseek_v3", {"scan_layers": False, "remat": "dots"}),
        ("bias_quantile", {"scan_layers": False}),
        ("llama4", {"remat": "full"}),
    ],
)
def test_how_layers_are_executed_changes_nothing(name, settings):
    saved = read(name)
    config, params = saved_model(name, **settings)
    state = {"moe": {"bias_E": saved["router_bias"]}} if "router_bias" in saved else {}
    batch = {key: value[0] for key, value in under(saved, "batches/").items()}
    loss, _, grads, *_ = sgd_step(params, state, batch, np.int32(0), config)
    assert_close(loss, saved["total_loss"][0], "loss")
    before, _ = saved_model(name)
    assert_trees_close(
        grads, translate.model_parameters(under(saved, "grads/"), before.model), "gradient"
    )


@functools.partial(jax.jit, static_argnames=("moe",))
def run_block(params, x_BLM, weight_BLM, call, own, moe):
    """Returns the saved objective, its output, aux and losses, and its gradient."""

    def objective(params, x_BLM):
        y_BLM, aux = moe_block(params, x_BLM, moe, call, own)
        tokens = aux.sums["num_tokens"]
        layers = jax.tree.map(lambda a: a[None], aux.sums["losses"])
        losses = {n: loss.by_layer(layers[n], tokens)[0] for n, loss in named_losses(moe.losses)}
        total = jnp.sum(y_BLM * weight_BLM) + sum(losses.values())
        return total + aux.sums["router_loss"] / tokens, (y_BLM, aux, losses)

    return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, x_BLM)


@pytest.mark.parametrize("name", slow_but(QUICK, BLOCKS))
def test_a_random_block_is_that_of_before(name):
    saved = read(name)
    moe = translate.moe(json.loads(str(saved["config"])))
    params = translate.block_parameters(under(saved, "params/"), moe)
    call = Call(
        positions_BL=saved["positions_BL"],
        segments_BL=saved["valid_BL"].astype(np.int32),
        tokens_BL=saved["tokens_BL"],
        step=saved["step"],
        rng=jax.random.wrap_key_data(saved["key_data"]),
    )
    replay = under(saved, "replay/")
    own = Own()
    if replay:
        own = Own(replay=Choices(replay["expert_index_BLK"], replay["chosen_BLK"]))
    (total, (y_BLM, aux, losses)), (grads, grad_x_BLM) = run_block(
        params, saved["x_BLM"], saved["weight_BLM"], call, own, moe
    )
    assert_close(y_BLM, saved["y_BLM"], "output")
    assert_close(total, saved["loss"], "objective")
    for key in AUX_LOSSES:
        assert_close(losses.get(key, 0.0), saved[key], key)
    for key in ("assigned_KE", "kept_KE", "num_tokens"):
        np.testing.assert_array_equal(aux.sums[key], saved[key])
    assert_trees_close(grads, translate.block_parameters(under(saved, "grads/"), moe), "gradient")
    assert_close(grad_x_BLM, saved["grad_x_BLM"], "gradient of the tokens")
