"""Starting from another run's checkpoint: what is taken, what is drawn, what is refused."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ExperimentConfig, InitFrom, MeshConfig, write_config
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.checkpoints import Checkpoints, DamagedCheckpointError
from moe_jax.training.files import METRICS_FILE, RUN_FILE
from moe_jax.training.imported import save_imported
from moe_jax.training.init_from import (
    check_position,
    check_tokenizer,
    first_state,
    open_source,
    warn_of_heldout,
)
from moe_jax.training.loop import train
from moe_jax.training.loss import CrossEntropy
from moe_jax.training.metrics import read_metrics
from moe_jax.training.saved import CHECKPOINTS, load_run
from moe_jax.training.state import evaluation_params, init_state, with_schedule_at
from moe_jax.training.workdir import check_workdir, with_whole_paths
from tests.test_training_placement import LowRankModel
from tests.test_training_subsets import named, with_model
from tests.tiny_run import (
    assert_same_run,
    files,
    quick_jit,
    tiny_config,
    tiny_state,
    tiny_training,
)

ONE_LAYER = {
    "model": {
        "stack": {"unit": [["attention", "moe"]], "repeats": 1},
        "parts": {"moe": {"bias": {"kind": "sign", "rate": 0.01}}},
    },
    "optimizer": {"schedule": "constant"},
}
CONTENT = {"corpus": "aaaa", "tokenizer": "bbbb"}


def config_of(**sections) -> ExperimentConfig:
    return tiny_config({**ONE_LAYER, **sections})


def started(path, settings=None, **sections):
    """A config that starts from a workdir."""
    return config_of(init_from={"path": str(path), **(settings or {})}, **sections)


def state_of(config, step):
    """A state in which all arrays differ."""
    state = tiny_state(config, seed=step)
    numbers = itertools.count(1)

    def fill(leaf):
        number = next(numbers)
        return leaf + jnp.asarray(number if leaf.dtype == jnp.int32 else number / 16, leaf.dtype)

    return state._replace(
        step=jnp.int32(step),
        opt_state=jax.tree.map(fill, state.opt_state),
        model_state=jax.tree.map(fill, state.model_state),
    )


def save_run(workdir, config, *steps):
    """Writes a run's directory with checkpoints of these steps."""
    with Checkpoints(workdir / CHECKPOINTS, keep=3) as checkpoints:
        for step in steps:
            metadata = {"run": write_config(config, CONTENT)}
            checkpoints.save(step, state_of(config, step), metadata=metadata)
    return workdir


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4. Tests do not write to it."""
    return save_run(tmp_path_factory.mktemp("source") / "run", config_of(), 2, 4)


def begin(config, mesh=None):
    """The first state, by name."""
    placed = make_mesh(mesh or config.mesh)
    return named(first_state(config, placed, open_source(config, CONTENT)))


def refusal(config, content=CONTENT):
    with pytest.raises(ValueError) as error:
        open_source(config, content)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_taken(found, expected, *, but=()):
    for name, value in found.items():
        if not any(word in name for word in but):
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_parameters_alone_are_taken_of_the_newest_checkpoint(source):
    found, saved = begin(started(source)), named(state_of(config_of(), 4))
    drawn = named(quick_jit(init_state, static_argnums=0)(config_of()))
    assert found.keys() == saved.keys()
    new = {name: value for name, value in found.items() if not name.startswith(("params", "model"))}
    assert_taken({name: value for name, value in found.items() if name not in new}, saved)
    assert_taken(new, drawn)  # moments, step and key are those of a new run


def test_moments_and_the_position_are_taken_where_they_are_asked_for(source):
    asked = {"step": 2, "optimizer_state": True}
    saved = named(state_of(config_of(), 2))
    # Its schedule restarts with the count of step 0. Adam's count belongs to the moments.
    found = begin(started(source, asked))
    assert_taken(found, saved, but=["key_data", "step", "opt_state/3"])
    assert found["step"] == 0 == found["opt_state/3/count"]
    assert found["opt_state/1/count"] == saved["opt_state/1/count"]

    found = begin(started(source, {**asked, "data_position": True}))
    assert_taken(found, saved, but=["key_data", "opt_state/3"])
    assert found["step"] == 2 == found["opt_state/3/count"]


def test_what_is_fresh_is_what_a_run_from_scratch_draws(source):
    asked = {"fresh": ("router",), "optimizer_state": True}
    found, saved = begin(started(source, asked)), named(state_of(config_of(), 4))
    drawn = named(quick_jit(init_state, static_argnums=0)(config_of()))
    routers = [name for name in found if "router" in name or name.endswith("bias_E")]
    assert len(routers) == 4, "its weight, two moments, the selection bias"
    assert_taken({name: found[name] for name in routers}, drawn)
    assert_taken(found, saved, but=["router", "bias_E", "key_data", "step", "opt_state/3"])


def test_scanned_and_unrolled_layers_are_one_tree(source):
    scanned = started(source, model={**ONE_LAYER["model"], "scan_layers": True})
    assert_taken(begin(scanned), begin(started(source)))


def test_it_is_read_to_where_it_lies_on_a_mesh(source):
    mesh = MeshConfig(data=1, fsdp=2, expert=2)
    found = begin(started(source, {"optimizer_state": True}), mesh)
    wi = found["params/stack/unit/0/moe/experts/wi"]
    assert {shard.data.shape for shard in wi.addressable_shards} == {(1, 2, 8, 32)}
    assert_taken(found, begin(started(source, {"optimizer_state": True})))


def test_what_does_not_match_is_listed(source):
    message = refusal(started(source, model={**ONE_LAYER["model"], "tie_embeddings": False}))
    assert "differs in 1, params/head: absent in the checkpoint, float32[16,384] in this" in message
    assert "init_from.fresh" in message
    wider = refusal(started(source, model={**ONE_LAYER["model"], "model_dim": 32}))
    assert "params/embedding: float32[384,16] in the checkpoint, float32[384,32] in" in wider
    assert wider.count("in the checkpoint") == 5 and len(wider) < 800, "bounded"


def test_what_the_new_model_lacks_is_listed_too(source):
    model = {**ONE_LAYER["model"], "parts": {"moe": {"bias": None}}}
    message = refusal(started(source, model=model))
    assert "model_state/moe/bias_E: float32[1,4] in the checkpoint, absent in this run" in message
    assert open_source(started(source, {"fresh": ("bias_E",)}, model=model), CONTENT).step == 4


def test_a_name_that_chooses_nothing_is_refused(source):
    assert "'routers' chooses none" in refusal(started(source, {"fresh": ("routers",)}))


@pytest.mark.parametrize(
    ("settings", "optimizer", "message"),
    [
        ({"optimizer_state": True}, {"name": "lion"}, r"name='lion', 'adamw' in"),
        ({"optimizer_state": True}, {"ema_decay": 0.5}, r"opt_state/4/average/embedding: absent"),
    ],
)
def test_moments_of_another_optimizer_are_refused(source, settings, optimizer, message):
    said = refusal(started(source, settings, optimizer={**ONE_LAYER["optimizer"], **optimizer}))
    assert "init_from.optimizer_state" in said
    assert re.search(message, said)


def test_moments_of_a_part_are_enough_to_train_that_part(source):
    optimizer = {**ONE_LAYER["optimizer"], "trainable": ("experts",)}
    found = begin(started(source, {"optimizer_state": True}, optimizer=optimizer))
    moments = [name for name in found if name.startswith("opt_state/1/mu")]
    assert moments and all("/experts/" in name for name in moments)
    assert_taken(found, named(state_of(config_of(), 4)), but=["key_data", "step", "opt_state/3"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 3}, r"none of step 3 in .*, which has 2, 4\. Pass"),
        ({"data_position": True, "step": 2}, None),
    ],
)
def test_the_step_is_one_that_was_kept(source, settings, message):
    if message is None:
        assert open_source(started(source, settings), CONTENT).step == 2
    else:
        with pytest.raises(ValueError, match=message):
            open_source(started(source, settings), CONTENT)


def test_the_source_is_there_and_whole(source, tmp_path):
    assert "there is none in" in refusal(started(tmp_path / "nowhere"))
    assert "there is none in" in refusal(started(tmp_path / "nowhere", {"step": 4}))
    copy = shutil.copytree(source, tmp_path / "copy")
    largest = max((copy / CHECKPOINTS / "4").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert open_source(started(copy), CONTENT).step == 2
    with pytest.raises(DamagedCheckpointError, match="Use another step"):
        open_source(started(copy, {"step": 4}), CONTENT)
    (copy / CHECKPOINTS / "2" / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"all are damaged in .*: 2, 4\. Bring back"):
        open_source(started(copy), CONTENT)


def test_another_tokenizer_needs_an_embedding_of_its_own(source):
    other = {**CONTENT, "tokenizer": "cccc"}
    message = refusal(started(source), other)
    assert "sha256 bbbb in" in message and "set init_from.fresh=('embedding',)." in message
    untied = {**ONE_LAYER["model"], "tie_embeddings": False}
    with pytest.raises(ValueError, match=r"init_from\.fresh=\('embedding', 'head'\)"):
        check_tokenizer(
            started(source, model=untied), {"content": CONTENT}, {"tokenizer": "cccc"}, set()
        )
    fresh = started(source, {"fresh": ("embedding",)})  # the head is the embedding
    assert open_source(fresh, other).fresh == ["params/embedding"]


@pytest.mark.parametrize(
    ("sections", "content", "message"),
    [
        ({"training": {"num_steps": 4, "batch_size": 4}}, CONTENT, "Raise training.num_steps abov"),
        ({"training": {"num_steps": 9, "batch_size": 8}}, CONTENT, "batch_size: 4 -> 8"),
        ({"data": {"sequence_length": 8}}, CONTENT, "config.data.sequence_length: 16 -> 8"),
        ({}, {**CONTENT, "corpus": "dddd"}, "the content of the corpus"),
    ],
)
def test_a_position_is_of_the_same_data(source, sections, content, message):
    said = refusal(started(source, {"data_position": True}, **sections), content)
    assert message in said
    open_source(started(source), content)


def test_the_path_is_recorded_from_the_root_on(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    config = with_whole_paths(started(source.name))
    assert config.init_from.path == str(source)
    assert with_whole_paths(config) == config and with_whole_paths(config_of()) == config_of()

    # A run may go on with either form of the path, and with no other source.
    run = save_run(tmp_path / "run", config, 2)
    check_workdir(started(source.name), run)
    with pytest.raises(ValueError, match=r"config\.init_from\.path: .* -> .*/elsewhere'"):
        check_workdir(started("elsewhere"), run)


def test_settings_without_a_path_are_refused():
    with pytest.raises(ValueError, match=r"Set init_from\.path"):
        InitFrom(fresh=("router",))
    with pytest.raises(ValueError, match="is a URL"):
        InitFrom(path="gs://bucket/run")


def test_a_float_may_have_another_dtype(tmp_path):
    config, state = config_of(), tiny_state(config_of())
    embedding = state.params["embedding"].astype(jnp.bfloat16)
    args = (state.model_state, {"tokenizer": "bbbb"}, {"from": "a test"})
    save_imported(tmp_path / "model", config, {**state.params, "embedding": embedding}, *args)
    found = begin(started(tmp_path / "model"))["params/embedding"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, embedding.astype(jnp.float32))


def test_an_imported_model_has_no_moments(tmp_path):
    config = config_of()
    state = tiny_state(config)
    args = (state.params, state.model_state, {"tokenizer": "bbbb"}, {"from": "a test"})
    save_imported(tmp_path / "model", config, *args)
    found = begin(started(tmp_path / "model"))
    assert_taken(
        {name: value for name, value in found.items() if name.startswith("params")}, named(state)
    )
    assert "opt_state/1/count: absent" in refusal(
        started(tmp_path / "model", {"optimizer_state": True})
    )


def test_the_schedule_of_schedule_free_begins_again():
    """It has its own count from 1, which weights its averages."""
    optimizer = {"name": "schedule_free", "schedule": "constant"}
    opt_state = jax.jit(lambda: init_state(tiny_config({"optimizer": optimizer})).opt_state)()
    later = with_schedule_at(opt_state, 7)
    assert int(later[-1].step_count) == 8
    assert int(with_schedule_at(later, 0)[-1].step_count) == 1


AVERAGED = pytest.mark.parametrize("optimizer", [{"ema_decay": 0.5}, {"name": "schedule_free"}])


@AVERAGED
def test_without_moments_averages_are_taken_with_them_the_last_parameters(optimizer, tmp_path):
    optimizer = {**ONE_LAYER["optimizer"], **optimizer, "frozen": ("router",)}
    config = config_of(optimizer=optimizer)
    save_run(tmp_path / "run", config, 2)
    state = state_of(config, 2)
    found = begin(started(tmp_path / "run"))
    for name, value in named({"params": evaluation_params(state)}).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    again = begin(started(tmp_path / "run", {"optimizer_state": True}, optimizer=optimizer))
    assert_taken(again, named(state), but=["key_data", "step", "count"])


@AVERAGED
def test_the_base_of_a_weight_is_the_average_too(optimizer, tmp_path):
    optimizer = {**ONE_LAYER["optimizer"], **optimizer, "frozen": ("router",)}
    config = config_of(optimizer=optimizer)
    save_run(tmp_path / "run", config, 2)
    averaged = named({"params": evaluation_params(state_of(config, 2))})
    settings = {"adapters": {"names": ("attention", "router"), "rank": 2}, **ONE_LAYER["model"]}
    only = {**ONE_LAYER["optimizer"], "trainable": ("adapters",)}
    adapted = started(tmp_path / "run", {"fresh": ("adapters",)}, model=settings, optimizer=only)
    found = begin(adapted)
    bases = [name for name in found if name.endswith("/base")]
    assert len(bases) == 5, "four matrices of attention that train, a router that does not"
    for name, value in averaged.items():
        of = f"{name}/base" if f"{name}/base" in bases else name
        np.testing.assert_allclose(found[of], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_adapters_that_the_source_lacks_are_drawn_and_those_it_has_are_not_dropped(tmp_path):
    settings = {**ONE_LAYER["model"], "adapters": {"names": ("attention",), "rank": 2}}
    only = {**ONE_LAYER["optimizer"], "trainable": ("adapters",)}
    save_run(tmp_path / "plain", config_of(), 2)
    found = open_source(started(tmp_path / "plain", model=settings, optimizer=only), CONTENT)
    assert {name.rpartition("/")[2] for name in found.fresh} == {"a", "b"}
    save_run(tmp_path / "adapted", config_of(model=settings, optimizer=only), 2)
    for fresh in ((), ("attention",)):
        assert re.search(
            "a run without adapters cannot start from one with .*merge_adapters",
            refusal(started(tmp_path / "adapted", {"fresh": fresh})),
        )


@pytest.mark.parametrize(
    ("data", "content", "warned"),
    [
        ({"heldout_fraction": 0.3}, CONTENT, "data.heldout_fraction=0.3 differ from 0.03"),
        ({"group_field": "page"}, CONTENT, "data.group_field='page' differ from ''"),
        ({"heldout_fraction": 0.01}, CONTENT, ""),  # its held-out text was held out there too
        ({"heldout_fraction": 0.3}, {**CONTENT, "corpus": "cccc"}, ""),
    ],
)
def test_text_that_the_source_trained_on_is_no_held_out_text(source, data, content, warned, caplog):
    open_source(started(source, data=data), content)
    assert warned in caplog.text and bool(caplog.text) == bool(warned)


def test_of_the_text_of_an_imported_model_nothing_is_known(caplog):
    config = config_of(data={"heldout_fraction": 0.3})
    warn_of_heldout(config, {"data": {}}, {})
    assert not caplog.text


def test_a_weight_of_several_arrays_wraps_the_array_that_is_there(source):
    config = with_model(LowRankModel, started(source, {"fresh": ("a", "b")}))
    found, saved = begin(config), named(state_of(config_of(), 4))
    wq = "params/stack/unit/0/attention/wq"
    np.testing.assert_array_equal(found[f"{wq}/base"], saved[wq])
    assert f"{wq}/a" in found


# Whole runs, which are slower.

RUN = {
    "model": {"stack": {"repeats": 1}},
    "optimizer": {"schedule": "constant"},
    "training": {"num_steps": 6, "evaluate_every": 3, "keep_checkpoints": 3},
}


def run_of(**init_from):
    return tiny_training({**RUN, "init_from": init_from})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with a checkpoint of step 3. Tests do not write to it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(run_of(), workdir)
    return workdir


@pytest.mark.slow
def test_with_moments_and_position_a_run_ends_like_the_one_it_started_from(
    finished, tmp_path, capsys
):
    moved = shutil.copytree(finished, tmp_path / "source")
    config = run_of(path=str(moved), step=3, optimizer_state=True, data_position=True)
    workdir = tmp_path / "run"
    train(config, workdir)
    assert f"starts from step 3 of {moved}" in capsys.readouterr().out
    states = [named(load_run(run, moments=True)[1]) for run in (workdir, finished)]
    assert_taken(*states)
    steps = [row["step"] for row in read_metrics(workdir / METRICS_FILE) if "train/loss" in row]
    assert steps == [4, 5, 6]
    record = json.loads((workdir / RUN_FILE).read_text())
    said = record["init_from"]
    assert (said["path"], said["step"], len(said["sha256"])) == (str(moved), 3, 64)

    # The run goes on without the source, and still records where it came from.
    shutil.rmtree(moved)
    longer = dataclasses.replace(config.training, num_steps=7)
    train(dataclasses.replace(config, training=longer), workdir)
    assert json.loads((workdir / RUN_FILE).read_text())["init_from"] == said


def test_nothing_is_written_where_a_start_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="none of step 5"):
        train(run_of(path=str(source), step=5), tmp_path / "run")
    assert files(tmp_path) == {} and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_first_checkpoint_starts_again(
    finished, tmp_path, monkeypatch
):
    config = run_of(path=str(finished), fresh=("router",))
    train(config, tmp_path / "expected")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a kill"):

        def save(*args, **kwargs):
            raise RuntimeError("a kill")

        patch.setattr("moe_jax.training.loop.Run.save", save)
        train(config, tmp_path / "run")
    assert not load_steps(tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "expected")


def load_steps(workdir):
    return [path.name for path in (workdir / CHECKPOINTS).iterdir() if path.name.isdecimal()]


@dataclasses.dataclass(frozen=True)
class OtherLoss(CrossEntropy):
    """A loss that this library does not define."""


def test_a_position_asks_nothing_of_the_loss_of_the_source():
    source = config_of(training={"num_steps": 4, "batch_size": 4, "loss": OtherLoss()})
    config = started("somewhere", {"data_position": True})
    check_position(config, write_config(source), {}, 2)
    source = config_of(training={"num_steps": 4, "batch_size": 8, "loss": OtherLoss()})
    with pytest.raises(ValueError, match="batch_size: 8 -> 4"):
        check_position(config, write_config(source), {}, 2)


def test_the_path_may_begin_with_the_home_of_the_user(source, monkeypatch):
    monkeypatch.setenv("HOME", str(source.parent))
    config = started(f"~/{source.name}")
    assert with_whole_paths(config).init_from.path == str(source)
    assert open_source(config, CONTENT).step == 4
