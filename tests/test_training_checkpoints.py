"""Checkpoints: bit-exact, resharded, damaged and killed."""

import errno
import hashlib
import json
import logging
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from moe_jax.training import checkpoints as checkpoints_module
from moe_jax.training import files
from moe_jax.training.checkpoints import Checkpoints, DamagedCheckpointError

WRITER = pathlib.Path(__file__).with_name("checkpoint_writer.py")


def make_state(step: int) -> dict:
    """A state with every kind of leaf of a training run, different for each step."""
    key = jax.random.fold_in(jax.random.key(7), step)
    params = {
        "experts": {"wi_EMH": jax.random.normal(key, (4, 8, 256))},
        "router": jax.random.normal(key, (8, 4), jnp.bfloat16),
        "scale": jnp.full((8,), 1 / 3),
    }
    adamw, adafactor = optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=4)
    return {
        "params": params,
        "adamw": adamw.update(params, adamw.init(params), params)[1],
        "adafactor": adafactor.update(params, adafactor.init(params), params)[1],
        "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)).init(params),
        "router_bias": jnp.arange(8, dtype=jnp.float32).reshape(2, 4) * 1e-3,
        "key": jax.random.key_data(key),
        "step": jnp.int32(step),
    }


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def write_steps(directory, steps, keep=5):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def restore_latest(checkpoints, abstract_state):
    """The newest whole step and its state, read as a run reads them, or None."""
    step = checkpoints.newest_whole()
    return None if step is None else (step, checkpoints.restore(step, abstract_state))


def largest_file(directory: pathlib.Path) -> pathlib.Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        assert restore_latest(checkpoints, abstract(state)) is None
        assert checkpoints.save(3, state, wait=True)
        assert checkpoints.latest_step == 3
        step, restored = restore_latest(checkpoints, abstract(state))
    assert step == 3
    assert_same_bits(restored, state)
    # A restored random key draws what the saved key would have drawn.
    key = jax.random.wrap_key_data(restored["key"])
    assert key == jax.random.fold_in(jax.random.key(7), 3)


def test_metadata_is_published_with_the_state_and_read_back(tmp_path):
    said = {"config": {"seed": 3, "mesh": None}, "corpus": "sha256:ab"}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(1), metadata=said)
        said["corpus"] = "changed while the save is running"
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        assert checkpoints.metadata(1) == {
            "config": {"seed": 3, "mesh": None},
            "corpus": "sha256:ab",
        }
        assert checkpoints.metadata(2) == {}, "saved without, as old checkpoints are"
        with pytest.raises(ValueError, match=r"there is none of step 3 in .*, which has 1, 2\."):
            checkpoints.metadata(3)
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(3, make_state(3), metadata={"path": tmp_path})
    with Checkpoints(tmp_path, keep=None) as reader:
        assert reader.metadata(1)["corpus"] == "sha256:ab"


def test_what_says_that_a_checkpoint_is_whole_is_on_the_disk(tmp_path, monkeypatch):
    """Older checkpoints are deleted next, and a power failure may follow."""
    synced, fsync = set(), os.fsync

    def noting(descriptor):
        synced.add(pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), metadata={"a": 1})
    assert synced >= {"manifest.json", "metadata.json"}


def test_metadata_is_covered_by_the_manifest(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), metadata={"seed": step})
        checkpoints.wait()
        (tmp_path / "2" / "metadata.json").write_text('{"seed": 7}')
        with pytest.raises(DamagedCheckpointError, match=r"in .*/2, metadata.json has 11 bytes in"):
            checkpoints.metadata(2)
        assert restore_latest(checkpoints, abstract(make_state(1)))[0] == 1
        (tmp_path / "1" / "metadata.json").unlink()
        with pytest.raises(DamagedCheckpointError, match=r"metadata\.json is missing"):
            checkpoints.metadata(1)


def test_the_newest_are_kept(tmp_path):
    write_steps(tmp_path, [2, 4, 6, 8], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["6", "8"]


def test_multiples_of_a_step_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in (2, 4, 6, 8, 10, 12, 14):
            checkpoints.save(step, make_state(step))
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:  # after a restart
        checkpoints.save(18, make_state(18))
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 12, 18]


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match=r"at least 1 checkpoint: keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_is_saved_once_and_steps_increase(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.save(4, make_state(4))
        assert not checkpoints.save(4, make_state(5))
        with pytest.raises(ValueError, match=r"order of their steps: step 2, but .* has step 4"):
            checkpoints.save(2, make_state(2))
        _, restored = restore_latest(checkpoints, abstract(make_state(4)))
    assert_same_bits(restored, make_state(4))


def test_whether_a_step_is_there_is_known_without_a_listing(tmp_path, monkeypatch):
    """On a network file system a listing may lag, more in one process than in another."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(4, make_state(4), wait=True)
        monkeypatch.setattr("moe_jax.training.checkpoints.complete_steps", lambda directory: [])
        assert not checkpoints.save(4, make_state(5))
        with pytest.raises(ValueError, match=r"step 2, but .* has step 4"):
            checkpoints.save(2, make_state(2))
        monkeypatch.undo()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, restored = restore_latest(checkpoints, abstract(make_state(4)))
        monkeypatch.setattr("moe_jax.training.checkpoints.complete_steps", lambda directory: [])
        assert not checkpoints.save(step, make_state(5))
    assert_same_bits(restored, make_state(4))


def test_the_others_wait_for_hours_until_a_large_checkpoint_is_hashed(tmp_path, monkeypatch):
    real, given = ocp.AsyncOptions, {}
    monkeypatch.setattr(
        ocp, "AsyncOptions", lambda **options: given.update(options) or real(**options)
    )
    Checkpoints(tmp_path, keep=1).close()
    assert given["timeout_secs"] >= 2 * 3600


def test_several_files_are_hashed_at_once(tmp_path, monkeypatch):
    """Each of two threads waits until the other reads too, when writing and when checking."""
    (tmp_path / "state").mkdir()
    for name in ("a", "b"):
        (tmp_path / "state" / name).write_text(name)
    both, hashed = threading.Barrier(2, timeout=60), files.sha256_of
    monkeypatch.setattr(files, "THREADS", 2)
    monkeypatch.setattr(files, "sha256_of", lambda file: (both.wait(), hashed(file))[1])
    files.write_manifest(tmp_path)
    assert files.damage(tmp_path) is None
    (tmp_path / "state" / "a").write_text("c")
    assert files.damage(tmp_path) == "the content of state/a has changed"


def test_a_manifest_takes_over_what_a_process_has_hashed(tmp_path):
    """Except for a file whose size has changed since."""
    for process in (0, 1):
        (tmp_path / "state" / f"ocdbt.process_{process}").mkdir(parents=True)
        for name in ("a", "b"):
            (tmp_path / "state" / f"ocdbt.process_{process}" / name).write_text(name)
    files.write_hashes(tmp_path, tmp_path / "state", 1)
    part = tmp_path / "hashes.process_1.json"
    assert len(json.loads(part.read_text())) == 2
    part.write_text(part.read_text().replace(sha256("a"), "taken over").replace(sha256("b"), "old"))
    (tmp_path / "state" / "ocdbt.process_1" / "b").write_text("longer")
    files.write_manifest(tmp_path, processes=3)
    said = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert {name: one["sha256"] for name, one in said.items()} == {
        "state/ocdbt.process_0/a": sha256("a"),
        "state/ocdbt.process_0/b": sha256("b"),
        "state/ocdbt.process_1/a": "taken over",
        "state/ocdbt.process_1/b": sha256("longer"),
    }
    assert not part.exists()


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_saved_array_may_be_donated(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        x = jnp.arange(200_000.0) + 0
        checkpoints.save(1, {"x": x})
        for _ in range(3):
            x = overwrite(x)
        _, restored = restore_latest(checkpoints, abstract({"x": x}))
    np.testing.assert_array_equal(restored["x"], np.arange(200_000.0))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_restores_into_another_sharding(tmp_path, num_devices):
    def sharding(count):
        mesh = jax.sharding.Mesh(jax.devices()[:count], ("expert",))
        return jax.sharding.NamedSharding(mesh, jax.P("expert"))

    state = {"wi": jnp.arange(4 * 6.0).reshape(4, 6), "mu": jnp.arange(8.0)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, jax.device_put(state, sharding(4)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        _, restored = restore_latest(checkpoints, abstract(state, sharding(num_devices)))
    assert_same_bits(restored, state)
    for leaf in restored.values():
        assert leaf.sharding.is_equivalent_to(sharding(num_devices), leaf.ndim)


def truncate(step_dir):
    file = largest_file(step_dir)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(step_dir):
    file = largest_file(step_dir)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete_a_file(step_dir):
    largest_file(step_dir).unlink()


def delete_the_manifest(step_dir):
    (step_dir / "manifest.json").unlink()


def garble_the_manifest(step_dir):
    (step_dir / "manifest.json").write_bytes(b'\xff{"files": [')


def empty_the_manifest(step_dir):
    (step_dir / "manifest.json").write_text('{"files": {}}')


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, r"has \d+ bytes in place of \d+"),
        (flip_a_bit, "the content of state/.* has changed"),
        (delete_a_file, "state/.* is missing"),
        (delete_the_manifest, "manifest.json is missing"),
        (garble_the_manifest, "manifest.json cannot be understood"),
        (empty_the_manifest, "manifest.json names no files"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, caplog, harm, reason):
    write_steps(tmp_path, [1, 2])
    harm(tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with caplog.at_level(logging.WARNING, "moe_jax.training.checkpoints"):
            step, restored = restore_latest(checkpoints, abstract(make_state(1)))
        assert step == 1
        assert_same_bits(restored, make_state(1))
        assert checkpoints.latest_step == 1
        # Training reaches that step again and saves it.
        assert checkpoints.save(2, make_state(2))
        step, restored = restore_latest(checkpoints, abstract(make_state(2)))
        assert step == 2
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("moe_jax")]
    assert any(str(tmp_path / "2") in message for message in messages)
    assert any(re.search(reason, message) for message in messages)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "damaged-2"]


def test_a_step_can_be_damaged_twice(tmp_path):
    write_steps(tmp_path, [1])
    for _ in range(2):
        write_steps(tmp_path, [2])
        truncate(tmp_path / "2")
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            assert restore_latest(checkpoints, abstract(make_state(1)))[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "damaged-2", "damaged-2-2"]


def test_orbax_own_files_may_be_lost(tmp_path):
    # Orbax writes these after the manifest; the state does not depend on them.
    write_steps(tmp_path, [1])
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text("{gar")
    (tmp_path / "1" / "commit_success.txt").unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_same_bits(restore_latest(checkpoints, abstract(make_state(1)))[1], make_state(1))


def test_all_damaged_is_an_error_and_moves_nothing(tmp_path):
    write_steps(tmp_path, [1, 2])
    flip_a_bit(tmp_path / "1")
    truncate(tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for _ in range(2):
            with pytest.raises(DamagedCheckpointError, match=r"all are damaged in .*: 1, 2\."):
                restore_latest(checkpoints, abstract(make_state(1)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_reader_takes_the_newer_checkpoint_that_replaced_the_one_it_was_reading(
    tmp_path, monkeypatch, caplog
):
    write_steps(tmp_path, [1])
    real = checkpoints_module.damage

    def replaced(path):
        if path.name == "1":
            path.rename(tmp_path / "2")  # a run with keep=1 publishes step 2 and deletes step 1
        return real(path)

    monkeypatch.setattr(checkpoints_module, "damage", replaced)
    with Checkpoints(tmp_path, keep=None) as reader:
        assert reader.newest_whole() == 2
    assert "damaged" not in caplog.text


def test_another_config_is_an_error_and_not_damage(tmp_path):
    write_steps(tmp_path, [1])
    other = abstract(make_state(1))
    other["router_bias"] = jax.ShapeDtypeStruct(
        (2, 8), jnp.float32, sharding=other["step"].sharding
    )
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(ValueError, match=r"router_bias: float32\[2,4\] in the checkpoint"):
            restore_latest(checkpoints, other)
        del other["router_bias"]
        with pytest.raises(ValueError, match=r"router_bias: .*, absent in this run"):
            restore_latest(checkpoints, other)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_sharding_is_required(tmp_path):
    write_steps(tmp_path, [1])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(ValueError, match=r"known sharding: params/w has none"):
            checkpoints.restore(1, {"params": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}})


def test_a_save_that_failed_is_noticed_before_the_next_one(tmp_path, monkeypatch):
    """A run checks after each step, so it does not go on training what it cannot save."""

    def fail(path, processes):
        released.wait(10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    released = threading.Event()
    checkpoints = Checkpoints(tmp_path, keep=2)
    with monkeypatch.context() as patched:
        patched.setattr("moe_jax.training.checkpoints.write_manifest", fail)
        checkpoints.save(2, make_state(2))
        checkpoints.check()  # it is still running
        released.set()
        with pytest.raises(OSError, match=r"^The checkpoint of step 2 cannot be written to"):
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)
    checkpoints.check()  # the failure is already reported
    checkpoints.close()


def test_half_written_checkpoints_are_removed(tmp_path):
    write_steps(tmp_path, [1])
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert restore_latest(checkpoints, abstract(make_state(1)))[0] == 1
        checkpoints.save(2, make_state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_save_that_fails_says_the_last_good_step_once(tmp_path, monkeypatch, caplog, number):
    def fail(path, processes):
        raise OSError(number, os.strerror(number), str(path))

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(1), wait=True)
    with monkeypatch.context() as patched:
        patched.setattr("moe_jax.training.checkpoints.write_manifest", fail)
        checkpoints.save(2, make_state(2))
        with pytest.raises(OSError, match=r"^The checkpoint of step 2 cannot be written to") as one:
            checkpoints.wait()
    assert f"{os.strerror(number)}; last good step: 1. Put that right" in str(one.value)
    assert "\n" not in str(one.value)
    assert not [record for record in caplog.records if record.exc_info]
    checkpoints.close()  # the failure is already reported
    # Once there is space, saving goes on from the last whole step.
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert restore_latest(checkpoints, abstract(make_state(1)))[0] == 1
        checkpoints.save(2, make_state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_no_thread_waits_for_a_checkpoint_whose_directory_cannot_be_made(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        with monkeypatch.context() as patched:
            patched.setattr("orbax.checkpoint._src.path.atomicity._create_tmp_directory", fail)
            with pytest.raises(OSError, match="Read-only file system; last good step: 1"):
                checkpoints.save(2, make_state(2))
    assert not [one.name for one in threading.enumerate() if "Signaling" in type(one).__name__]


def test_a_directory_that_was_moved_away_is_noticed_at_the_next_save(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="removed or renamed; no checkpoint is complete"):
            checkpoints.save(2, make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"], "not made again"


def kill_while_saving(directory: pathlib.Path, seconds: float) -> int:
    """Runs the writer, kills it `seconds` after its first save, and returns its last step."""
    writer = subprocess.Popen(
        [sys.executable, str(WRITER), str(directory)], stdout=subprocess.PIPE, text=True
    )
    with writer:
        first = writer.stdout.readline()
        assert first.startswith("saved"), f"the writer failed: {first}"
        try:
            writer.wait(seconds)
        except subprocess.TimeoutExpired:
            writer.send_signal(signal.SIGKILL)
        lines = [first, *writer.stdout.read().split("\n")]
    assert writer.returncode == -signal.SIGKILL
    return max(int(line.split()[1]) for line in lines if line.startswith("saved "))


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_9_leaves_a_whole_checkpoint(tmp_path, caplog, kills):
    state = {"step": jnp.int32(0), "w": jnp.zeros((64, 1024)), "v": jnp.zeros((1024,))}
    rng = random.Random(kills)
    for _ in range(kills):
        finished = kill_while_saving(tmp_path, rng.uniform(0.1, 0.7))
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            step, restored = restore_latest(checkpoints, abstract(state))
        assert step >= finished
        assert all(bool((leaf == step).all()) for leaf in restored.values())
    assert "damaged" not in caplog.text
