"""Runs in which only multi-token modules route: losses, logs, scores and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import write_config
from moe_jax.models.multi_token import without_modules
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.serving import serving_costs
from moe_jax.planning.sorted_rows import sorted_rows
from moe_jax.planning.workload import resolve
from moe_jax.training import loop
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.evaluation import score
from moe_jax.training.loss import batch_totals, partial_loss
from moe_jax.training.step import StepMetrics
from moe_jax.training.workdir import CHECKPOINTS, check_workdir
from tests.tiny_run import quick_jit, tiny_batch, tiny_config, tiny_state

DEPTH = 2
FLOAT32 = {"rtol": 1e-6}


def make(**moe):
    """A model of one MLP, and two modules of one MoE block, where only balance has a weight."""
    moe = {
        "capacity": {"train_factor": 0.0, "eval_factor": 1.0},
        "losses": {"load_balance": {"kind": "load_balance", "weight": 1.0}},
        **moe,
    }
    model = {
        "vocab_size": 300, "stack": {"unit": [["mlp"]], "repeats": 1},
        "parts": {"attention": None, "mlp": {"kind": "mlp", "dim": 8}, "moe": moe},
        "multi_token": {"depth": DEPTH, "layer": ("moe",), "weight": 0.3},
    }  # fmt: skip
    return tiny_config({"model": model, "optimizer": {"schedule": "constant"}})


def short_documents():
    """Documents of three tokens: module 1 has two tokens of each, module 2 has one of each."""
    batch = tiny_batch(length=12)
    segments = jnp.broadcast_to(1 + jnp.arange(12) // 3, (4, 12)).at[3, 3:].set(0)
    positions = jnp.broadcast_to(jnp.arange(12) % 3, (4, 12))
    return {**batch, "segment_ids": segments, "positions": positions}


@quick_jit
def losses(params, part, totals):
    """What the parts add to the training loss, their metrics, and their sums."""
    model = make().model
    loss, found = partial_loss(params, part, totals, model, model_state={}, rng=jax.random.key(0))
    own = 0.3 * jnp.mean(found.aux["multi_token"].sums["loss_D"])
    sums = {name: aux.sums for name, aux in found.aux.items()}
    return loss - found.cross_entropy - own, model.metrics(found.aux), sums


def test_the_balance_loss_of_a_module_is_per_token_of_its_own():
    """In short documents, module k has all but k tokens of each."""
    config, batch = make(), short_documents()
    totals = batch_totals(batch, config.model)
    assert totals.tokens == 39
    assert totals.later_tokens_D.tolist() == [26, 13]

    params = tiny_state(config).params
    trained, metrics, sums = losses(params, batch, totals)
    logged = metrics["multi_token_moe/load_balance_loss"]
    assert logged.shape == (DEPTH,)
    np.testing.assert_allclose(trained, np.mean(logged), **FLOAT32)

    # By hand: E * sum_e f_e * P_e for each module, over all its choices and tokens.
    of_moe = sums["multi_token_moe"]
    counted_DE = np.sum(of_moe["assigned_KE"], axis=1)
    assert counted_DE.sum(axis=1).tolist() == [2 * 26, 2 * 13]
    share_DE = counted_DE / counted_DE.sum(axis=1, keepdims=True)
    prob_DE = of_moe["prob_sum_E"] / np.array([[26], [13]])
    np.testing.assert_allclose(logged, 4 * np.sum(share_DE * prob_DE, axis=1), **FLOAT32)

    # Microbatches: with the sums of the whole batch, which this loss needs, their shares add up.
    totals = totals._replace(sums=sums)
    halves = [{n: v[rows] for n, v in batch.items()} for rows in (slice(2), slice(2, 4))]
    shares = [losses(params, half, totals)[0] for half in halves]
    np.testing.assert_allclose(sum(shares), trained, **FLOAT32)


def test_a_part_of_the_modules_alone_is_not_part_of_an_evaluation():
    config = make()
    model, state = config.model, tiny_state(config)
    assert (model.moe_parts, model.moe_layers, model.has_capacity) == ({}, {}, False)
    found = score(
        state.params, {}, config, [{**tiny_batch(), "domain": np.zeros(4, int)}], ("text",),
        np.ones(300, np.int32), make_mesh(config.mesh),
    )  # fmt: skip
    assert list(found) == ["dropless", "domain_expert_share"]
    assert np.isfinite(found["dropless"]["nats_per_token"])
    assert found["domain_expert_share"] == {}


def test_plans_know_where_a_part_of_the_modules_runs():
    """Training runs it, serving does not."""
    config = make(run_experts="ragged")
    (rows,) = sorted_rows(resolve(config, 1))
    assert (rows.part, rows.layers) == ("moe", DEPTH)
    assert serving_costs(config.model, 16) == serving_costs(without_modules(config.model), 16)


def test_a_module_that_lost_choices_stops_the_run(tmp_path):
    config = make(run_experts="ragged", buffer_factor=1.5, stop_at_overflow=True)
    metrics = StepMetrics(*[np.float32(1)] * 4, {})
    of_parts = {
        "multi_token_moe/buffer_overflow": np.array([0, 7]),
        "multi_token_moe/buffer_rows": np.array([30, 60]),
        "multi_token_moe/buffer_factor": np.array([1.0, 2.0]),
    }
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        with pytest.raises(loop.BufferOverflowError) as error:
            loop.check_overflow(3, metrics._replace(of_parts=of_parts), config, checkpoints)
    assert "multi_token_moe/layer_02 lost 7 choices at step 3" in str(error.value)
    assert "Set model.parts.moe.buffer_factor=2, or" in str(error.value)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_run_is_extended_unless_the_bias_of_a_module_follows_its_end(schedule, tmp_path):
    config = make(bias={"kind": "sign", "rate": 0.01, "schedule": schedule})
    with Checkpoints(tmp_path / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(3, {"x": np.zeros(3)}, metadata={"run": write_config(config)})
    training = dataclasses.replace(config.training, num_steps=200)
    longer = dataclasses.replace(config, training=training)
    if schedule == "constant":
        check_workdir(longer, tmp_path)
        return
    with pytest.raises(ValueError, match=r"selection bias of 'multi_token_moe' follows num_steps"):
        check_workdir(longer, tmp_path)
