"""Distillation: the loss by hand, its gradient, the mesh, a run, refusals."""

import dataclasses
import functools
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import read_config, write_config
from moe_jax.config.run import ExperimentConfig
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.finetune.distil import Distil, soft_nats
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.planning.communication import collectives
from moe_jax.planning.flops import forward_flops
from moe_jax.planning.memory import estimate_memory
from moe_jax.planning.roofline import computed_flops, estimate, estimate_by_kind
from moe_jax.planning.sweep import sweep
from moe_jax.planning.topology import parse_topology
from moe_jax.planning.traffic import hbm_traffic
from moe_jax.planning.workload import resolve
from moe_jax.training.files import METRICS_FILE
from moe_jax.training.imported import save_state
from moe_jax.training.loop import train
from moe_jax.training.loss import CrossEntropy, Scored, batch_totals, call_of_batch
from moe_jax.training.memory import needed_bytes
from moe_jax.training.metrics import read_metrics
from moe_jax.training.placement import BATCH_AXES, compile_train_step, state_shardings
from moe_jax.training.signals import Interrupted
from moe_jax.training.state import evaluation_params
from moe_jax.training.step import make_train_step
from tests.foreign import Unsure
from tests.test_training_init_from import config_of, save_run, state_of
from tests.test_training_loop import at_batch
from tests.tiny_run import (
    DENSE,
    assert_same_run,
    cut,
    quick_jit,
    tiny_batch,
    tiny_config,
    tiny_moe,
    tiny_state,
    tiny_training,
)  # fmt: skip

TOKENIZER = {"tokenizer": ByteTokenizer().fingerprint()}


# Biases large enough to change choices.
STATE = {"moe": {"bias_E": jnp.array([[0.0, 0.3, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0]])}}


def saved(folder, config, seed=1, model_state=None, step=0):
    """Saves a model in its own directory, as an import does; returns its parameters."""
    folder.mkdir(parents=True)
    state = tiny_state(config, seed=seed)._replace(opt_state=(), step=jnp.int32(step))
    state = state._replace(model_state=model_state or state.model_state)
    save_state(folder, config, state, TOKENIZER, {})
    return state.params


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The directory of a MoE teacher, overloaded in training, with selection biases."""
    folder = tmp_path_factory.mktemp("distil") / "teacher"
    config = tiny_config(tiny_moe(capacity={"train_factor": 0.5}, bias="sign"))
    saved(folder, config, model_state=STATE)
    return folder


def student(teacher, num_microbatches=1, **loss):
    """The config of a dense run that learns from a teacher."""
    loss = {"kind": "distil", "teacher": str(teacher), **loss}
    settings = {"loss": loss, "num_microbatches": num_microbatches}
    return tiny_config({**DENSE, "training": settings})


def one_device(config):
    return make_mesh(config.on_devices(1).mesh)


@functools.cache
def compiled(config):
    return quick_jit(make_train_step(config))


def stepped(config, batch, seed=0):
    """The state and metrics after a step on one device."""
    arrays = config.training.loss.arrays(config, one_device(config))
    step = compiled(config)
    return step(tiny_state(config, seed), cut(batch, config.training.num_microbatches), *arrays)


@functools.partial(quick_jit, static_argnums=0)
def logits_of(model, params, call, state=None):
    return model.run(params, call, state=state).logits_BLV


def test_the_soft_loss_by_hand():
    # The teacher's probabilities are 1/2 and 1/2, the student's 1/4 and 3/4.
    student_V, teacher_V = jnp.array([0.0, math.log(3)]), jnp.array([5.0, 5.0])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(soft_nats(student_V, teacher_V, 1.0)) == pytest.approx(by_hand, rel=1e-6)
    # At temperature 2 the student's first probability is 1 / (1 + sqrt 3); the factor is 2 squared.
    p = 1 / (1 + math.sqrt(3))
    by_hand = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))
    assert float(soft_nats(student_V, teacher_V, 2.0)) == pytest.approx(by_hand, rel=1e-6)
    # The gradient is that of the cross-entropy to the teacher: temperature * (p - q).
    gradient_V = jax.grad(lambda x_V: soft_nats(x_V, teacher_V, 2.0))(student_V)
    np.testing.assert_allclose(gradient_V, [2 * (p - 0.5), 2 * (0.5 - p)], rtol=1e-5)


def test_hard_and_soft_targets_are_mixed_over_microbatches(teacher):
    config, batch = student(teacher, num_microbatches=2, weight=0.25, temperature=2.0), tiny_batch()
    _, metrics = stepped(config, batch)
    state, totals = tiny_state(config), batch_totals(batch)
    of_teacher = tiny_config(tiny_moe(bias="sign"))
    params = tiny_state(of_teacher, seed=1).params
    # The teacher is dropless, though its training has slots for half of the choices.
    dropless = call_of_batch(batch, capacity=0.0)
    teacher_BLV = logits_of(of_teacher.model, params, dropless, STATE)
    unbiased_BLV = logits_of(
        of_teacher.model, params, dropless, jax.tree.map(jnp.zeros_like, STATE)
    )
    assert np.abs(teacher_BLV - unbiased_BLV).max() > 0.1, "the biases move choices"
    student_BLV = logits_of(config.model, state.params, call_of_batch(batch))
    p, q = (np.asarray(jax.nn.softmax(x / 2), np.float64) for x in (teacher_BLV, student_BLV))
    soft_BL = 4 * np.sum(p * np.log(p / q), axis=-1)
    soft = float(np.sum(soft_BL * batch["loss_weights"]) / totals.loss_weight)
    assert metrics.of_loss["soft_loss"] == pytest.approx(soft, rel=1e-4)
    mixed = 0.75 * metrics.loss + 0.25 * soft
    assert metrics.total_loss == pytest.approx(float(mixed), rel=1e-5)


@pytest.mark.slow
def test_with_weight_0_a_step_is_that_of_plain_training(teacher):
    config, batch = student(teacher, num_microbatches=2, weight=0.0), tiny_batch()
    plain = tiny_config({**DENSE, "training": {"num_microbatches": 2}})
    (state, metrics), (expected, others) = (stepped(one, batch) for one in (config, plain))
    # Two programs: the compiler may order their sums differently.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(same, state, expected)
    np.testing.assert_allclose([others.total_loss, metrics.loss], metrics.total_loss, rtol=1e-6)
    mixed, _ = stepped(student(teacher, num_microbatches=2, weight=0.5), batch)
    assert not np.array_equal(mixed.params["embedding"], state.params["embedding"])


def test_a_student_that_is_its_teacher_has_no_gradient(tmp_path):
    saved(tmp_path / "same", tiny_config(DENSE), seed=3)
    _, metrics = stepped(student(tmp_path / "same", weight=1.0), tiny_batch(), seed=3)
    assert abs(metrics.of_loss["soft_loss"]) < 1e-6 and metrics.grad_norm < 1e-5
    _, metrics = stepped(student(tmp_path / "same", weight=1.0), tiny_batch(), seed=4)
    assert metrics.of_loss["soft_loss"] > 0.1 and metrics.grad_norm > 0.1


@pytest.mark.slow
def test_an_annealed_teacher_has_the_temperature_of_its_step(tmp_path):
    """A teacher that has taken half of the steps of its temperature."""
    hot, end = {"anneal_from": 4.0, "anneal_steps": 10}, tiny_config(tiny_moe())
    router = {"kind": "token_choice", "projection": {"kind": "linear", **hot}}
    config = tiny_config(tiny_moe(router=router))
    folder, batch = tmp_path / "annealed", tiny_batch()
    params = saved(folder, config, step=5)
    loss = student(folder).training.loss
    arrays = loss.arrays(student(folder), one_device(config))

    def soft_loss(model, step):
        output = model.run(params, call_of_batch(batch, capacity=0.0, step=step))
        scored = Scored(output.logits_BLV, None, jnp.zeros(()))
        share = functools.partial(loss.share, scored, batch, batch_totals(batch))
        return float(share(arrays)[1]["soft_loss"])

    assert abs(soft_loss(config.model, jnp.int32(5))) < 1e-6
    assert soft_loss(end.model, None) > 1e-4


@pytest.mark.parametrize("optimizer", [{"ema_decay": 0.5}, {"name": "schedule_free"}])
def test_a_teacher_has_the_averages_that_its_run_is_evaluated_with(optimizer, tmp_path):
    config = config_of(optimizer={"schedule": "constant", **optimizer})
    folder = save_run(tmp_path / "averaged", config, 2)
    run = student(folder)
    params, *_ = run.training.loss.arrays(run, one_device(run))
    expected = evaluation_params(state_of(config, 2))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, params, expected)


def test_a_teacher_may_have_adapters(tmp_path):
    trained = {"adapters": {"names": ("attention",), "rank": 2}}
    config = tiny_config({"model": trained, "optimizer": {"trainable": ("adapters",)}})
    params = saved(tmp_path / "adapted", config)
    run = student(tmp_path / "adapted")
    found, *_ = run.training.loss.arrays(run, one_device(run))
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.slow
def test_a_step_on_a_mesh_is_that_on_one_device(teacher):
    config, batch = student(teacher, weight=0.5), tiny_batch()
    expected, metrics = stepped(config, batch)
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=2, expert=2)
    )
    mesh = make_mesh(config.mesh)
    arrays = config.training.loss.arrays(config, mesh)
    sharded = [one for one in jax.tree.leaves(arrays) if not one.sharding.is_fully_replicated]
    assert len(sharded) > 5  # arrays of the teacher
    placed = jax.device_put(tiny_state(config), state_shardings(config, mesh))
    with jax.set_mesh(mesh):
        batch = jax.device_put(cut(batch), named_sharding(BATCH_AXES, mesh))
        state, found = compile_train_step(config, mesh)(placed, batch, *arrays)
    for name in ("loss", "total_loss", "grad_norm"):
        assert getattr(found, name) == pytest.approx(float(getattr(metrics, name)), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    per_device = needed_bytes(config, mesh)["distil"]
    whole = sum(one.nbytes for one in jax.tree.leaves(arrays))
    assert whole / 4 < per_device < whole


def test_a_plan_counts_the_forward_pass_of_the_teacher(teacher):
    config = student(teacher)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=4))
    work = resolve(config, 4)
    plain = dataclasses.replace(config.training, loss=CrossEntropy())
    alone = resolve(dataclasses.replace(config, training=plain), 4)
    (taught,) = work.teachers
    assert not alone.teachers and not taught.teachers
    # Memory: as `train` counts it, plus its logits beside the student's logits and their gradient.
    memory, without = estimate_memory(work), estimate_memory(alone)
    assert memory.dispatch > 0 == without.dispatch, "experts of the teacher alone"
    assert memory.teacher == needed_bytes(config, make_mesh(config.mesh))["distil"]
    assert memory.logits == 1.5 * without.logits
    assert memory.parameters == without.parameters
    # FLOPs and bytes: the plain step plus a teacher's forward pass with slots for all choices.
    flops, traffic = computed_flops(work), hbm_traffic(work)
    tokens = config.training.batch_size * work.length / 4
    forward = sum(forward_flops(taught.model, work.length).values())
    (moe,) = taught.model.moe_parts.values()
    assert moe.capacity.train_factor == 0 and forward > 26_000  # 22,784 with half of the slots
    assert flops.pop("teacher") == tokens * forward > 0 == computed_flops(alone).pop("teacher")
    assert flops == {kind: computed_flops(alone)[kind] for kind in flops}
    assert traffic.pop("teacher") > 0 == hbm_traffic(alone)["teacher"]
    assert traffic == {kind: hbm_traffic(alone)[kind] for kind in traffic}
    # Weights are gathered once, and no gradient is sent.
    sent = [one for one in collectives(work) if one.layer_kind == "teacher"]
    assert {one.operation for one in sent} == {"all-gather"}
    learning = dataclasses.replace(taught, learns=True)
    gathered = {one.name: one for one in collectives(learning) if one.operation == "all-gather"}
    of_experts = {one.name: one.array_bytes for one in sent}["teacher's experts weights"]
    assert 2 * of_experts == gathered["experts weights"].array_bytes
    # The minimum time includes all of it.
    topology = parse_topology("v5e:2x2")
    by_kind = estimate_by_kind(work, topology)
    assert by_kind["teacher"].compute == tokens * forward / topology.chip.flops
    assert estimate(work, topology).compute > estimate(alone, topology).compute


def test_a_plan_knows_what_else_a_teacher_has(tmp_path):
    """Unused modules, a queue without drops, and arrays that no mesh can split."""
    moe = {"bias": {"kind": "sign"}, "capacity": {"queue": "random", "eval_factor": 0}}
    random = {"parts": {"moe": moe}, "stack": {"allow_lookahead": True}}
    config = tiny_config({"model": random})
    modules = tiny_config({"model": random | {"multi_token": {"depth": 1}}})
    saved(tmp_path / "plain", config)
    saved(tmp_path / "modules", modules)
    plans = [resolve(student(tmp_path / name), 1) for name in ("plain", "modules")]
    assert computed_flops(plans[0]) == computed_flops(plans[1])
    assert estimate_memory(plans[0]) == estimate_memory(plans[1])
    arrays = [one.config.training.loss.arrays(one.config, one_device(one.config)) for one in plans]
    assert jax.tree.structure(arrays[0]) == jax.tree.structure(arrays[1])

    saved(tmp_path / "odd", tiny_config({"model": {"model_dim": 12}}))
    found = sweep(student(tmp_path / "odd"), parse_topology("v5e:2x4"))
    assert found.uneven and any(one.work.mesh.expert > 1 for one in found.fitting)


def test_what_is_no_teacher_of_this_run_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"needs a teacher: training\.loss\.teacher=''\. Set it"):
        content_of(student(""))
    with pytest.raises(ValueError, match=r"there is none in .*nowhere'\. Correct the path"):
        content_of(student(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"same tokenizer: sha256 .* here\. Set data\.tokenizer"):
        content_of(student(teacher), tokenizer="0" * 64)
    saved(tmp_path / "wide", tiny_config({"model": {"vocab_size": 512}}))
    with pytest.raises(ValueError, match=r"as many ids .*: 512 in .*, 384 here\. Set model\.voc"):
        content_of(student(tmp_path / "wide"))
    ahead = tiny_config(
        {"model": {"parts": {"moe": {"router": "expert_choice"}},
                   "stack": {"allow_lookahead": True}}}
    )  # fmt: skip
    saved(tmp_path / "ahead", ahead)
    with pytest.raises(ValueError, match=r"must not see the tokens that it predicts.*Use a teach"):
        content_of(student(tmp_path / "ahead"))
    with pytest.raises(ValueError, match=r"checkpoint"):
        content_of(student(teacher, step=7))


def content_of(config, **content):
    return config.training.loss.content(config, TOKENIZER | content)


def test_a_run_records_its_teacher_and_a_config_comes_back(teacher):
    config = student(teacher, temperature=2.0)
    assert read_config(write_config(config), ExperimentConfig) == config
    first = content_of(config)
    assert list(first) == ["teacher"] and first == content_of(student(teacher, weight=0.5))


def test_a_loss_from_outside_takes_the_same_seam():
    loss = "tests.foreign:Unsure"
    config = tiny_config({**DENSE, "training": {"loss": loss, "num_microbatches": 2}})
    assert isinstance(config.training.loss, Unsure) and write_config(config)["sources"].keys() == {
        loss
    }
    _, metrics = stepped(config, tiny_batch())
    assert metrics.of_loss["prior_loss"] > math.log(384)
    by_hand = metrics.loss + 0.5 * metrics.of_loss["prior_loss"]
    assert metrics.total_loss == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_like_one_that_was_not(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    loss = {"kind": "distil", "teacher": teacher.name}
    settings = {"num_steps": 6, "evaluate_every": 3, "checkpoint_every": 2, "loss": loss}
    dense = {
        **DENSE["model"], "parts": {**DENSE["model"]["parts"]}, "dropout_rate": 0.1
    }  # fmt: skip
    config = tiny_training({"model": dense, "training": settings})
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGTERM after step 4"):
        at_batch(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    rows = [row for row in read_metrics(tmp_path / "whole" / METRICS_FILE) if "train/loss" in row]
    assert all(row["train/soft_loss"] > 0 for row in rows)
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert record["content"].keys() == {"corpus", "tokenizer", "teacher"}
    assert record["training"]["loss"]["teacher"] == str(teacher)

    other = tmp_path / "other"
    saved(other, tiny_config(), seed=2)
    changed = dataclasses.replace(config.training.loss, teacher=str(other))
    training = dataclasses.replace(config.training, loss=changed, num_steps=8)
    with pytest.raises(ValueError, match="content of teacher: sha256"):
        train(dataclasses.replace(config, training=training), tmp_path / "stopped")


def test_the_settings_have_bounds():
    for wrong in ({"weight": 1.5}, {"weight": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="lies in"):
            Distil(**wrong)
