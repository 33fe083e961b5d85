"""Reading a run from its directory, also while it trains."""

import dataclasses
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import DataConfig, MeshConfig, write_config
from moe_jax.data.objectives import Supervised
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training import files as training_files
from moe_jax.training.checkpoints import Checkpoints, DamagedCheckpointError
from moe_jax.training.placement import state_shardings
from moe_jax.training.run_record import write_run_record
from moe_jax.training.saved import (
    CHECKPOINTS,
    check_content,
    encoding_of,
    kept_steps,
    load_run,
    newest_places,
    restore,
)
from tests.tiny_run import files, tiny_config, tiny_moe, tiny_state

BIAS = {"kind": "sign", "rate": 0.1}
CONFIG = tiny_config(tiny_moe(bias=BIAS))


def make_run(workdir, *steps):
    write_run_record(workdir, CONFIG)
    state = tiny_state(CONFIG)
    with Checkpoints(workdir / CHECKPOINTS, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, state._replace(step=jnp.int32(step)))
    return state


def test_the_newest_state_and_the_config_come_back(tmp_path):
    state = make_run(tmp_path, 2, 4)
    before = files(tmp_path)
    config, loaded = load_run(tmp_path, moments=True)
    assert config == CONFIG
    assert int(loaded.step) == 4
    expected = state._replace(step=jnp.int32(4))
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), loaded, expected)
    assert files(tmp_path) == before


def test_reading_leaves_a_save_in_progress_alone(tmp_path, monkeypatch):
    """`generate` reads the directory of a run just while it writes a checkpoint."""
    state = make_run(tmp_path, 2)
    go_on = threading.Event()
    add_manifest = Checkpoints._add_manifest

    def wait_and_add_manifest(self):
        assert go_on.wait(60)
        add_manifest(self)

    monkeypatch.setattr(Checkpoints, "_add_manifest", wait_and_add_manifest)
    with Checkpoints(tmp_path / CHECKPOINTS, keep=3) as checkpoints:
        checkpoints.save(4, state._replace(step=jnp.int32(4)))
        _, loaded = load_run(tmp_path)
        assert int(loaded.step) == 2
        time.sleep(1)  # Orbax would clean up in the background
        go_on.set()
    _, loaded = load_run(tmp_path)
    assert int(loaded.step) == 4


def test_a_damaged_checkpoint_is_passed_over_and_left_to_the_run_to_set_aside(tmp_path, caplog):
    make_run(tmp_path, 2, 4)
    newest = tmp_path / CHECKPOINTS / "4"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    before = files(tmp_path)
    _, loaded = load_run(tmp_path)
    assert int(loaded.step) == 2
    assert "is damaged and not used" in caplog.text
    assert files(tmp_path) == before


def cut_short(file):
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize("harm", [cut_short, lambda file: file.unlink()])
def test_nothing_is_asked_of_a_checkpoint_before_it_is_known_to_be_whole(tmp_path, harm):
    """The power failed before Orbax's description of the arrays reached the disk."""
    make_run(tmp_path, 2, 4)
    harm(tmp_path / CHECKPOINTS / "4" / "state" / "_METADATA")
    assert int(load_run(tmp_path)[1].step) == 2
    with pytest.raises(DamagedCheckpointError, match=r"in .*/4, state/_METADATA"):
        load_run(tmp_path, step=4)
    with Checkpoints(tmp_path / CHECKPOINTS, keep=3) as checkpoints:
        assert int(restore(CONFIG, checkpoints, make_mesh(CONFIG.mesh)).step) == 2
    assert kept_steps(tmp_path) == [2]
    assert (tmp_path / CHECKPOINTS / "damaged-4").is_dir()


@pytest.mark.parametrize("step", [None, 2])
def test_each_file_is_hashed_once(tmp_path, monkeypatch, step):
    make_run(tmp_path, 2)
    read, hashed = [], training_files.sha256_of
    monkeypatch.setattr(training_files, "sha256_of", lambda file: read.append(file) or hashed(file))
    with Checkpoints(tmp_path / CHECKPOINTS, keep=None) as checkpoints:
        restore(CONFIG, checkpoints, make_mesh(CONFIG.mesh), step)
    assert len(read) == len(set(read)) > 1


def test_an_earlier_state_comes_back_by_its_step(tmp_path):
    make_run(tmp_path, 2, 4)
    assert kept_steps(tmp_path) == [2, 4]
    assert [int(load_run(tmp_path, step=step)[1].step) for step in (2, 4)] == [2, 4]
    with pytest.raises(ValueError, match=r"none of step 3 in .*, which has 2, 4\. Pass one"):
        load_run(tmp_path, step=3)
    manifest = tmp_path / CHECKPOINTS / "2" / "manifest.json"
    manifest.write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"cannot be understood .*Use another step"):
        load_run(tmp_path, step=2)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"knows its config: there is neither in .*Pass the"):
        load_run(tmp_path)
    write_run_record(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"there is none in .*checkpoints\. Wait for the first"):
        load_run(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="The run has finished: bring them back"):
        load_run(tmp_path)
    assert not (tmp_path / CHECKPOINTS).exists()


def test_changed_data_is_refused_with_the_flags_that_name_other_text(tmp_path):
    record = {"content": {"corpus": "a" * 64, "tokenizer": "b" * 64}}
    check_content(record, {"corpus": "a" * 64, "tokenizer": "b" * 64}, tmp_path)
    with pytest.raises(ValueError, match=r"Bring back the data, or name other text: --text or --c"):
        check_content(record, {"corpus": "c" * 64, "tokenizer": "b" * 64}, tmp_path)
    with pytest.raises(ValueError, match=r"content of tokenizer: .*\. Bring back the data\.$"):
        check_content(record, {"tokenizer": "c" * 64}, tmp_path)


def test_another_model_is_refused(tmp_path):
    make_run(tmp_path, 2)
    write_run_record(tmp_path, tiny_config(tiny_moe(bias=BIAS, expert_dim=48)))
    with pytest.raises(ValueError, match=r"into a state of the same arrays: .*wi: float32"):
        load_run(tmp_path)


ONE_DEVICE = MeshConfig(data=1)
EXPERT_8 = MeshConfig(data=1, expert=8)
FSDP_AND_EXPERT = MeshConfig(data=1, fsdp=4, expert=2)
SPANNED = MeshConfig(slices=2, data=1, expert=2, tensor=2, experts_span_slices=True)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize(
    ("saved_on", "restored_on"),
    [
        (EXPERT_8, FSDP_AND_EXPERT),
        (EXPERT_8, ONE_DEVICE),
        (ONE_DEVICE, EXPERT_8),
        (FSDP_AND_EXPERT, SPANNED),
    ],
)
@pytest.mark.parametrize("moments", [True, False])
def test_a_state_moves_to_another_mesh(tmp_path, optimizer, saved_on, restored_on, moments):
    config = tiny_config(
        {
            **tiny_moe(num_experts=8, bias=BIAS),
            "optimizer": {"name": optimizer},
            "training": {"batch_size": 8},
        }
    )
    config = dataclasses.replace(config, mesh=saved_on)
    random = np.random.default_rng(0)

    def draw(leaf):
        values = random.normal(size=leaf.shape) * 100
        return np.asarray(values, leaf.dtype)  # moments, bias and step differ from zero too

    state = jax.tree.map(draw, tiny_state(config))
    state = state._replace(step=np.int32(7))
    write_run_record(tmp_path, config)
    with Checkpoints(tmp_path / CHECKPOINTS, keep=1) as checkpoints:
        placed = state_shardings(config, make_mesh(saved_on))
        checkpoints.save(7, jax.device_put(state, placed))

    moved, loaded = load_run(tmp_path, restored_on, moments=moments)
    if not moments:
        state = state._replace(opt_state=())
    assert moved == dataclasses.replace(config, mesh=restored_on)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    shardings = state_shardings(moved, make_mesh(restored_on))
    shardings = shardings if moments else shardings._replace(opt_state=())
    leaves = zip(
        jax.tree.leaves_with_path(loaded),
        jax.tree.leaves(state),
        jax.tree.leaves(shardings),
        strict=True,
    )
    for (path, leaf), expected, sharding in leaves:
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, expected, strict=True, err_msg=name)
        assert leaf.sharding == sharding, name


@pytest.mark.parametrize(
    "optimizer", [{"ema_decay": 0.9}, {"name": "schedule_free", "schedule": "constant"}]
)
def test_a_loaded_run_has_the_parameters_to_evaluate(tmp_path, optimizer):
    """The average, or what Schedule-Free makes of z; here both are twice the parameters."""
    config = tiny_config({"optimizer": optimizer})
    state = tiny_state(config)
    twice = jax.tree.map(lambda p: 2 * p, state.params)
    kept = {"average": twice} if "ema_decay" in optimizer else {"z": twice, "b1": jnp.float32(0.9)}
    state = state._replace(
        step=jnp.int32(7), opt_state=(*state.opt_state[:-1], state.opt_state[-1]._replace(**kept))
    )
    write_run_record(tmp_path, config)
    with Checkpoints(tmp_path / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(7, state)
    _, loaded = load_run(tmp_path)
    assert loaded.opt_state == ()
    share = 2.0 if "ema_decay" in optimizer else (1 - 0.1 * 2) / 0.9  # (y - (1 - b1) z) / b1
    jax.tree.map(
        lambda got, p: np.testing.assert_allclose(got, share * p, rtol=1e-5, atol=1e-6),
        loaded.params,
        state.params,
    )
    _, whole = load_run(tmp_path, moments=True)
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_a_state_is_read_straight_to_where_it_goes(tmp_path, monkeypatch):
    """No array is first restored as a whole: a device may have no room for it."""
    make_run(tmp_path, 2)
    placed = []
    device_put = jax.device_put

    def put(x, *args, **kwargs):
        placed.append(np.size(x))
        return device_put(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", put)
    _, loaded = load_run(tmp_path, MeshConfig(data=1, fsdp=2, expert=2))
    leaves = jax.tree.leaves(loaded)
    shards = [leaf.addressable_shards[0].data.size for leaf in leaves]
    assert max(placed) == max(shards) == 384 * 16 // 2
    assert len(placed) == 4 * len(leaves)


def test_a_mesh_that_does_not_fit_the_run_is_refused(tmp_path):
    make_run(tmp_path, 2)
    with pytest.raises(ValueError, match=r"dim 'expert' of .* is 4, over 8 devices"):
        load_run(tmp_path, EXPERT_8)
    with pytest.raises(ValueError, match=r"mesh\.tensor must divide the heads .*: tensor=4, 2"):
        load_run(tmp_path, MeshConfig(data=1, tensor=4))


def test_a_chat_template_that_was_moved_is_found_where_the_config_says(tmp_path):
    old, new = (
        dataclasses.replace(
            tiny_config(),
            data=DataConfig(objective=Supervised(chat_template=str(tmp_path / f"{name}.jinja"))),
        )
        for name in ("old", "new")
    )
    message = r"the chat template of .* cannot be opened: .*data\.objective\.chat_template\."
    with pytest.raises(ValueError, match=message):
        encoding_of(tmp_path, old)
    content = {"tokenizer": "aaaa"}
    (tmp_path / "config.json").write_text(json.dumps(write_config(new, content)))
    assert newest_places(tmp_path, write_config(old, content), old.data) == new.data
    other = write_config(old, {"tokenizer": "bbbb"})
    assert newest_places(tmp_path, other, old.data) == old.data
