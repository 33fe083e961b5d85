"""Training of some parameters: which, at which rate, and that nothing is kept for the others."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ExperimentConfig, MeshConfig
from moe_jax.config.file import parse_value
from moe_jax.models.model import LanguageModel
from moe_jax.models.trained import count_trained, moving_state, training_marks, training_specs
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parameters import zeros
from moe_jax.planning.memory import optimizer_bytes
from moe_jax.planning.workload import Workload
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.files import RUN_FILE
from moe_jax.training.loop import train
from moe_jax.training.memory import needed_bytes
from moe_jax.training.optimizers import make_optimizer
from moe_jax.training.placement import compile_train_step, state_shardings
from moe_jax.training.run_record import write_run_record
from moe_jax.training.saved import CHECKPOINTS, load_run
from moe_jax.training.state import abstract_state, evaluation_params, trained_params
from moe_jax.training.step import make_train_step
from tests.test_training_placement import LowRankModel
from tests.tiny_run import cut, quick_jit, tiny_batch, tiny_config, tiny_state, tiny_training

MODEL = {
    "model": {
        "stack": {"unit": [["attention", "moe"]], "repeats": 1},
        "parts": {"moe": {"bias": {"kind": "sign", "rate": 0.01}}},
    }
}
PLAIN = {"clip_norm": 0.0, "schedule": "constant", "learning_rate": 0.01}


def config_of(**optimizer):
    return tiny_config({**MODEL, "optimizer": {**PLAIN, **optimizer}})


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.cache
def one_step(**optimizer):
    """The states before and after a step, and the metrics."""
    config = config_of(**optimizer)
    before = tiny_state(config)
    after, metrics = quick_jit(make_train_step(config))(before, cut(tiny_batch()))
    return before, after, metrics


PRESETS = {
    "trainable=all": {"embedding", "norms", "attention", "experts", "router"},
    "trainable=experts": {"experts"},
    "frozen=experts": {"embedding", "norms", "attention", "router"},
    "trainable=attention": {"attention"},
    "frozen=router": {"embedding", "norms", "attention", "experts"},
    "frozen=embedding": {"norms", "attention", "experts", "router"},
    "trainable=moe": {"experts", "router"},
    "trainable=router,norms": {"router", "norms"},
}


@pytest.mark.parametrize("flag", PRESETS)
def test_one_flag_chooses_what_trains(flag):
    name, _, text = flag.partition("=")
    config = config_of(**{name: parse_value(f"--config.optimizer.{name}", text, tuple)})
    counts = count_trained(config.optimizer, config.model.specs())
    assert {of for of, count in counts.items() if count["trained"]} == PRESETS[flag]
    assert all(count["trained"] in (0, count["total"]) for count in counts.values())
    # A selection bias belongs to the router.
    assert moving_state(config.optimizer, config.model)["moe"]["bias_E"] == (
        "router" in PRESETS[flag]
    )


def test_a_selection_bias_is_frozen_by_its_name_alone():
    config = config_of(frozen=("bias_E",))
    assert moving_state(config.optimizer, config.model) == {"moe": {"bias_E": False}}
    counts = count_trained(config.optimizer, config.model.specs())
    assert all(count["trained"] == count["total"] for count in counts.values())


@pytest.mark.parametrize(
    ("optimizer", "of_stack", "of_modules"),
    [
        ({}, True, True),
        ({"frozen": ("router",)}, False, False),
        ({"frozen": ("bias_E",)}, False, False),
        ({"frozen": ("multi_token",)}, True, False),
        ({"frozen": ("multi_token/bias_E",)}, True, False),
        ({"frozen": ("stack/router",)}, False, True),
        ({"trainable": ("experts",)}, False, False),
        ({"trainable": ("router",)}, True, True),
    ],
)
def test_a_selection_bias_moves_if_its_router_trains(optimizer, of_stack, of_modules):
    modules = {"depth": 2, "layer": ("attention", "moe")}
    moe = {"moe": {"bias": {"kind": "sign"}}}
    config = tiny_config({"model": {"parts": moe, "multi_token": modules}, "optimizer": optimizer})
    moving = moving_state(config.optimizer, config.model)
    assert moving == {"moe": {"bias_E": of_stack}, "multi_token_moe": {"bias_E": of_modules}}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"trainable": ("expert",)}, r"'expert' chooses none\. .*: .*attention, .*experts,"),
        ({"frozen": ("encoder",)}, r"'encoder' chooses none"),
        ({"trainable": ()}, r"trainable=\(\)\. Name a part, or 'all'"),
        ({"frozen": ("all",)}, r"some parameter must train: .*frozen=\('all',\)"),
        ({"learning_rates": (("router", 0.0),)}, r"positive and finite.*optimizer\.frozen"),
        (
            {"learning_rates": (("router", 0.1),), "frozen": ("router",)},
            r"'router' chooses none",
        ),
        (
            {"learning_rates": (("moe", 0.1), ("router", 0.2))},
            r"moe/router/weight is in \['moe', 'router'\]",
        ),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(optimizer, message):
    with pytest.raises(ValueError, match=message) as error:
        config_of(**optimizer)
    assert "\n" not in str(error.value)


def test_a_step_changes_what_trains_as_if_all_trained_and_nothing_else():
    before, after, metrics = one_step(trainable=("experts",))
    _, all_after, all_metrics = one_step()
    old, new, expected = (named(state.params) for state in (before, after, all_after))
    for name in old:
        if "/experts/" in name:
            np.testing.assert_allclose(new[name], expected[name], rtol=1e-6, atol=1e-9)
            assert (np.asarray(new[name]) != np.asarray(old[name])).any()
        else:
            np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    np.testing.assert_allclose(metrics.loss, all_metrics.loss, rtol=1e-6)
    assert metrics.grad_norm < all_metrics.grad_norm
    bias_XE = [state.model_state["moe"]["bias_E"] for state in (before, after, all_after)]
    np.testing.assert_array_equal(bias_XE[0], bias_XE[1])
    assert (np.asarray(bias_XE[2]) != np.asarray(bias_XE[0])).any()


def updates_of(**optimizer):
    """By name, gradients that count up, and the first update from them without a model's step."""
    config = config_of(**optimizer)
    trained = trained_params(config, tiny_state(config).params)
    grads = jax.tree.map(lambda p: jnp.arange(1.0, 1 + p.size).reshape(p.shape), trained)
    transform = make_optimizer(config)
    first = quick_jit(lambda grads, p: transform.update(grads, transform.init(p), p)[0])
    return named(grads), named(first(grads, trained))


def test_the_norm_that_is_clipped_is_of_what_trains():
    # This Adam's first update is -rate * m / (m + epsilon), near -rate * g / epsilon.
    large = {"trainable": ("attention",), "weight_decay": 0.0, "epsilon": 1e6}
    grads, free = updates_of(**large)
    norm = sum(float((g**2).sum()) for g in grads.values()) ** 0.5
    _, clipped = updates_of(**large, clip_norm=norm / 4)
    assert clipped.keys() == free.keys() and all("/attention/" in name for name in free)
    for name, update in free.items():
        np.testing.assert_allclose(clipped[name], update / 4, rtol=1e-3)


def test_a_group_has_a_learning_rate_of_its_own():
    _, plain = updates_of(name="lion", weight_decay=0.1)
    groups = (("router", 0.25), ("attention/wq", 2.0))
    _, scaled = updates_of(name="lion", weight_decay=0.1, learning_rates=groups)
    assert scaled.keys() == plain.keys()
    for name, update in plain.items():
        factor = 0.25 if "/router/" in name else 2.0 if name.endswith("wq") else 1.0
        np.testing.assert_allclose(scaled[name], factor * update, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "ema", "adafactor", "lion", "muon", "schedule_free"])
def test_an_optimizer_keeps_nothing_for_what_is_frozen(name):
    average = {"ema_decay": 0.9} if name == "ema" else {}
    name = "adamw" if name == "ema" else name
    config = config_of(name=name, trainable=("attention",), **average)
    state = abstract_state(config)
    kept = [path for path, leaf in named(state.opt_state).items() if leaf.ndim]
    assert kept and all("/attention/" in path for path in kept)
    mesh = make_mesh(config.mesh)
    needed, of_all = needed_bytes(config, mesh), needed_bytes(config_of(name=name), mesh)
    attention = sum(leaf.size for path, leaf in named(state.params).items() if "/w" in path
                    and "/attention/" in path)  # fmt: skip
    assert needed["gradients"] == 4 * attention
    assert needed["parameters"] == of_all["parameters"] == of_all["gradients"]
    if name != "adafactor":
        big = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 16)
        assert optimizer_bytes(Workload(config)) == 4 * big

    if not average and name != "schedule_free":
        return
    # Frozen parameters have no average: they are evaluated as they are.
    params = tiny_state(config).params
    optimizer, trained = make_optimizer(config), trained_params(config, params)
    grads = jax.tree.map(jnp.ones_like, trained)
    _, opt_state = quick_jit(optimizer.update)(grads, optimizer.init(trained), trained)
    state = tiny_state(config)._replace(params=params, opt_state=opt_state)
    found, given = named(evaluation_params(state)), named(params)
    assert found.keys() == given.keys()
    for path, value in given.items():
        if "/attention/" not in path:
            np.testing.assert_array_equal(found[path], value)


class Int8Model(LanguageModel):
    """A model whose experts are integers."""

    def specs(self):
        def of(spec):
            if spec.component != "experts":
                return spec
            return dataclasses.replace(spec, dtype=jnp.int8, init=zeros)

        return jax.tree.map(of, super().specs())


def with_model(cls, config: ExperimentConfig) -> ExperimentConfig:
    fields = {
        field.name: getattr(config.model, field.name) for field in dataclasses.fields(LanguageModel)
    }
    return dataclasses.replace(config, model=cls(**fields))


def test_of_a_weight_of_several_arrays_some_train():
    base = with_model(LowRankModel, tiny_config(MODEL))
    optimizer = dataclasses.replace(base.optimizer, trainable=("a", "b"))
    config = dataclasses.replace(base, optimizer=optimizer)
    wq = training_specs(config.optimizer, config.model.specs())["stack"]["unit"]["0"]["attention"][
        "wq"
    ]
    assert wq.base is None and wq.a is not None and wq.b is not None
    moments = [path for path, leaf in named(abstract_state(config).opt_state).items() if leaf.ndim]
    assert len(moments) == 2 * 4 * 2 and all(path[-2:] in ("/a", "/b") for path in moments)


def test_integers_never_train():
    config = with_model(Int8Model, tiny_config(MODEL))
    marks = named(training_marks(config.optimizer, config.model.specs()))
    assert {name for name, mark in marks.items() if not mark} == {
        name for name in marks if "/experts/" in name
    }
    assert not [path for path in named(abstract_state(config).opt_state) if "/experts/" in path]


@pytest.mark.slow
def test_a_step_on_a_mesh_is_that_of_one_device():
    config = config_of(frozen=("router",), trainable=("moe", "attention"))
    sharded = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=2, expert=2))
    after, batch = [], jax.tree.map(np.asarray, cut(tiny_batch()))
    for one in (config, sharded):
        mesh = make_mesh(one.mesh)
        state = jax.device_put(tiny_state(one), state_shardings(one, mesh))
        with jax.set_mesh(mesh):
            after.append(named(compile_train_step(one, mesh)(state, batch)[0].params))
    for name, value in after[0].items():
        np.testing.assert_allclose(after[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_checkpoint_of_a_part_comes_back(tmp_path):
    config = config_of(frozen=("router",), ema_decay=0.5)
    write_run_record(tmp_path, config)
    state = tiny_state(config)
    with Checkpoints(tmp_path / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(2, state)
    loaded = load_run(tmp_path, moments=True)[1]
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    kept, found = named(state.opt_state), named(loaded.opt_state)
    assert not any("router" in name for name in kept)
    for name, value in kept.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def run_of(num_steps):
    settings = {
        "optimizer": {"frozen": ("router",), "ema_decay": 0.5, "schedule": "constant"},
        "training": {"num_steps": num_steps, "evaluate_every": 0},
    }
    return tiny_training({**MODEL, **settings})


@pytest.mark.slow
def test_a_run_that_trains_a_part_resumes_and_says_what_trains(tmp_path, capsys):
    train(run_of(2), tmp_path / "resumed")
    said = capsys.readouterr().out
    assert "trains 11,312 of 11,376 parameters" in said and "router 0 of 64" in said
    record = json.loads((tmp_path / "resumed" / RUN_FILE).read_text())
    assert record["trained"]["router"] == {"trained": 0, "total": 64}
    train(run_of(4), tmp_path / "resumed")
    train(run_of(4), tmp_path / "at_once")
    states = [named(load_run(tmp_path / name, moments=True)[1]) for name in ("resumed", "at_once")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
