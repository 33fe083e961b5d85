"""The trace of chosen steps: a file that TensorBoard opens, with scope names."""

import errno

import jax
import jax.numpy as jnp
import pytest

from moe_jax.training.loop import train
from moe_jax.training.profiling import PROFILE, Profile
from tests.tiny_run import tiny_training


@jax.jit
def step(x):
    with jax.named_scope("moe"), jax.named_scope("run_experts"):
        return jnp.tanh(x @ x)


def traces(workdir):
    return list((workdir / PROFILE).rglob("*.xplane.pb"))


def run(workdir, steps, first=1, last=5):
    """Takes steps with a trace; returns for each step whether a trace is written after it."""
    written, x = [], jnp.eye(8)
    with Profile(steps, workdir) as profile:
        for number in range(first, last + 1):
            profile.before(number, x)
            x = step(x)
            profile.after(number, x)
            written.append(bool(traces(workdir)))
    return written


def test_the_trace_has_the_scopes_of_the_model(tmp_path, capsys):
    assert run(tmp_path, (2, 3)) == [False, False, True, True, True]
    (path,) = traces(tmp_path)
    assert b"moe/run_experts" in path.read_bytes()
    assert f"tensorboard --logdir={tmp_path / PROFILE}" in capsys.readouterr().out


def test_a_run_that_starts_inside_or_ends_with_the_steps_has_a_trace(tmp_path):
    # The trace ends with its last step, before what follows, such as the final evaluation.
    assert run(tmp_path, (2, 5), first=4) == [False, True]
    assert len(traces(tmp_path)) == 1


def test_a_run_that_fails_ends_its_trace(tmp_path):
    with pytest.raises(ZeroDivisionError), Profile((1, 9), tmp_path) as profile:
        profile.before(1, None)
        step(jnp.eye(8))
        raise ZeroDivisionError
    assert len(traces(tmp_path)) == 1
    assert run(tmp_path / "next", (1, 1))[-1], "another can start"


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / PROFILE).touch()
    assert not any(run(tmp_path, (2, 3)))
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: no trace in {tmp_path / PROFILE}, and the run goes on")
    assert said.err.count("\n") == 1 and not said.out
    assert any(run(tmp_path / "next", (1, 1))), "another can start"


def test_a_disk_that_is_full_when_a_trace_ends_is_a_warning(tmp_path, capsys, monkeypatch):
    stop = jax.profiler.stop_trace

    def fail():
        stop()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    run(tmp_path, (2, 3))
    run(tmp_path, (2, 9))  # at the end of the run
    said = capsys.readouterr().err
    assert said.count("warning: no trace in") == said.count("No space left on device") == 2


def test_a_trace_of_the_program_goes_on(tmp_path, capsys):
    with jax.profiler.trace(tmp_path / "of_the_program"):
        run(tmp_path, (2, 4))
    said = capsys.readouterr().err
    assert said.startswith("warning: no trace in") and said.count("\n") == 1
    assert len(list((tmp_path / "of_the_program").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize(("steps", "first"), [((), 1), ((1, 2), 3)])
def test_no_trace_without_steps_to_trace(tmp_path, steps, first):
    run(tmp_path, steps, first)
    assert not (tmp_path / PROFILE).exists()


@pytest.mark.slow
def test_a_run_writes_the_trace_of_its_steps(tmp_path):
    train(tiny_training({"training": {"profile_steps": (3, 4), "num_steps": 5}}), tmp_path)
    (path,) = traces(tmp_path)
    found = path.read_bytes()
    assert all(name in found for name in (b"moe", b"attention", b"run_experts"))
