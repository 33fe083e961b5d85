"""Training as several processes over gloo: the same run, killed, stopped, resumed, refused."""

import json
import re
import shlex
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.training.files import METRICS_FILE
from moe_jax.training.metrics import read_metrics
from moe_jax.training.saved import CHECKPOINTS, load_run
from tests.parallel_job import LIMIT_SECONDS, Job
from tests.tiny_run import tiny_flags

TINY = tiny_flags(num_steps=24, checkpoint_every=6, evaluate_every=12, sample_tokens=1)
# Trains and saves only: each further program compiles for seconds, in each process.
SHORT = tiny_flags(num_steps=6, checkpoint_every=3, evaluate_every=0, sample_tokens=0)
MESH = ("--config.mesh.fsdp=2", "--config.mesh.expert=2")
# Losses are near 5. Sums over devices are in another order, which changes the last bits of a
# float32, and training carries that on.
LOSS_TOLERANCE = 1e-5
# Parameters are at most 1. Adam's updates have the size of the learning rate, whatever the
# gradient's size, so rounding of gradients near 0 shows.
PARAMETER_TOLERANCE = 1e-4
# How long the others may live after one is lost: its silence, then time to notice and abort.
LOST_AFTER_SECONDS = 10
END_SECONDS = LOST_AFTER_SECONDS + 30


def losses(workdir):
    """The loss by step, with each step once."""
    rows = [row for row in read_metrics(workdir / METRICS_FILE) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["train/loss"] for row in rows])


def checkpoint_steps(workdir):
    directory = workdir / CHECKPOINTS
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The run as one process with four devices, on a mesh that splits everything."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    with Job(workdir.parent, 1, 4, "train", *TINY, *MESH, f"--workdir={workdir}") as job:
        job.succeed()
    return workdir


def test_two_processes_train_what_one_does(tmp_path):
    """The one is this process, which has eight devices; four belong to the two."""
    arguments = [("train", *SHORT, *MESH, f"--workdir={tmp_path / name}") for name in "12"]
    assert main(list(arguments[0])) == 0
    with Job(tmp_path, 2, 2, *arguments[1]) as job:
        job.succeed()
    states = []
    for name in "12":
        assert checkpoint_steps(tmp_path / name) == [3, 6]
        states.append(load_run(tmp_path / name, moments=True)[1])
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=LOSS_TOLERANCE)
    for one, two in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(two, one, atol=PARAMETER_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_what_one_does(expected, tmp_path, count):
    workdir = tmp_path / "run"
    arguments = ("train", *TINY, *MESH, f"--workdir={workdir}")
    with Job(tmp_path, count, 4 // count, *arguments) as job:
        job.succeed()
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=LOSS_TOLERANCE)
    state, one = (load_run(directory, moments=True)[1] for directory in (workdir, expected))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, atol=PARAMETER_TOLERANCE)
    # Each process wrote its own shards.
    files = [path for path in (workdir / CHECKPOINTS / "24").rglob("*") if path.is_file()]
    for process in range(count):
        assert any(f"ocdbt.process_{process}/" in str(path) for path in files), files
    # Only process 0 prints.
    assert "step 24/24" in job.said(0) and "sample:" in job.said(0)
    for process in range(1, count):
        assert "step" not in job.printed(process), job.printed(process)
    assert len(list((workdir / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_several_processes_start_from_a_checkpoint_as_one_does(expected, tmp_path):
    start = (f"--config.init_from.path={expected}", "--config.init_from.optimizer_state=true")
    subset = "--config.optimizer.frozen=router"
    for count in (1, 2):
        arguments = (*TINY, *MESH, *start, subset, f"--workdir={tmp_path / str(count)}")
        with Job(tmp_path, count, 4 // count, "train", *arguments) as job:
            job.succeed()
            assert f"starts from step 24 of {expected}" in job.said(0)
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=LOSS_TOLERANCE)


@pytest.mark.slow
def test_several_processes_learn_from_a_teacher_as_one_does(expected, tmp_path):
    teacher = ("--config.training.loss=distil", f"--config.training.loss.teacher={expected}")
    for count in (1, 2):
        arguments = (
            *TINY,
            *MESH,
            *teacher,
            "--config.seed=1",
            f"--workdir={tmp_path / str(count)}",
        )
        with Job(tmp_path, count, 4 // count, "train", *arguments) as job:
            job.succeed()
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=LOSS_TOLERANCE)
    rows = [read_metrics(tmp_path / str(count) / METRICS_FILE) for count in (1, 2)]
    soft = [[row["train/soft_loss"] for row in each if "train/loss" in row] for each in rows]
    np.testing.assert_allclose(soft[1], soft[0], rtol=1e-4)
    assert soft[0][0] > soft[0][-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_when_one_is_killed_the_others_end_and_fewer_go_on(expected, tmp_path, lost):
    """Four processes, then two, then one: the losses are those of the run that was not killed."""
    workdir = tmp_path / "run"
    arguments = (
        "train",
        *TINY,
        f"--workdir={workdir}",
        f"--lost_after_seconds={LOST_AFTER_SECONDS}",
    )
    with Job(tmp_path, 4, 1, *arguments, *MESH) as job:
        job.wait_until(lambda: checkpoint_steps(workdir))
        began = time.monotonic()
        job.processes[lost].kill()
        codes = job.wait()
    assert time.monotonic() - began < END_SECONDS
    for process in {0, 1, 2, 3} - {lost}:
        assert codes[process] in (75, -signal.SIGABRT), job.said(process)
        assert "start all of them again" in job.said(process)
        assert re.search("distributed service detected fatal errors|Gloo", job.said(process))
    steps = checkpoint_steps(workdir)
    assert steps and steps[-1] < 24, "killed in the middle"

    with Job(tmp_path, 2, 1, *arguments, "--config.mesh.expert=2") as job:
        job.wait_until(lambda: checkpoint_steps(workdir)[-1] > steps[-1])
        job.processes[1].kill()
        job.wait()
    assert re.search(r"resuming after step (6|12|18) of 24", job.said(0))
    with Job(tmp_path, 1, 1, *arguments) as job:
        job.succeed()
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("to", [[1], [0, 1]])
def test_a_signal_to_one_or_all_saves_one_step_of_all(tmp_path, to):
    workdir = tmp_path / "run"
    arguments = ("train", *TINY, "--config.training.num_steps=1000000", f"--workdir={workdir}")
    with Job(tmp_path, 2, 2, *arguments, *MESH) as job:
        job.wait_until(lambda: checkpoint_steps(workdir))
        for process in to:
            job.processes[process].terminate()
        assert job.wait() == [128 + signal.SIGTERM] * 2, job.said(0) + job.said(1)
    step = int(re.search(r"stopped by SIGTERM after step (\d+); its checkpoint", job.said(0))[1])
    assert "stopped by" not in job.said(1)
    assert checkpoint_steps(workdir)[-1] == step
    assert len(losses(workdir)) == step
    assert "run all 2 processes again, this one as" in job.said(0)
    assert shlex.split(job.printed(0).splitlines()[-1])[1:] == job.commands[0][1:]


@pytest.mark.slow
def test_a_workdir_that_only_one_process_sees_is_refused_on_resume_too(expected, tmp_path):
    workdir = shutil.copytree(expected, tmp_path / "run")
    arguments = ("train", *TINY, *MESH, f"--workdir={workdir}")
    with Job(tmp_path, 2, 2, *arguments, last=[f"--workdir={tmp_path / 'elsewhere'}"]) as job:
        assert job.wait() == [1, 1], job.said(0) + job.said(1)
    for process in range(2):
        assert "elsewhere of" in job.said(process) and "Traceback" not in job.said(process)


@pytest.mark.slow
def test_a_model_is_evaluated_and_sampled_on_the_mesh_of_several_processes(expected, tmp_path):
    whole = json.loads((expected / "evaluation.json").read_text())["dropless"]
    arguments = (f"--workdir={expected}", "--mesh=fsdp=2,expert=-1")
    with Job(tmp_path, 2, 2, "evaluate", *arguments) as job:
        job.succeed()
    assert "capacity-limited" in job.printed(0) and not job.printed(1)
    again = json.loads((expected / "evaluation.json").read_text())["dropless"]
    assert again["tokens"] == whole["tokens"]
    np.testing.assert_allclose(again["bits_per_byte"], whole["bits_per_byte"], rtol=LOSS_TOLERANCE)
    with Job(tmp_path, 2, 1, "generate", *arguments, "--prompt=The", "--tokens=2") as job:
        job.succeed()
    assert job.printed(0).startswith("The") and not job.printed(1)
    with Job(tmp_path, 2, 1, "evaluate", f"--workdir={expected}") as job:
        assert job.wait() == [1, 1]
    assert "Pass --mesh=data=-1" in job.said(0) and "Pass --mesh=data=-1" in job.said(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_all", "of_process_1", "message"),
    [
        (["--config.training.batch_size=6"], [], "batch"),
        ([], ["--config.seed=1"], r"process 1 differs.*config\.seed: 0 -> 1"),
        ([], ["--workdir={elsewhere}"], r"is not in .*elsewhere of .* that all machines share"),
        (["--config.mesh.data=2"], [], r"the mesh has 2 of 4"),
    ],
)
def test_what_cannot_be_is_refused_by_all(tmp_path, of_all, of_process_1, message):
    arguments = ("train", *TINY, *of_all, f"--workdir={tmp_path / 'run'}")
    of_process_1 = [argument.format(elsewhere=tmp_path / "elsewhere") for argument in of_process_1]
    began = time.monotonic()
    with Job(tmp_path, 2, 2, *arguments, last=of_process_1) as job:
        assert job.wait() == [1, 1], job.said(0) + job.said(1)
    assert time.monotonic() - began < LIMIT_SECONDS / 2
    for process in range(2):
        assert re.search(f"error: .*{message}", job.said(process), re.DOTALL), job.said(process)
        assert "Traceback" not in job.said(process)
    assert not checkpoint_steps(tmp_path / "run")
    assert not list(tmp_path.glob("*/.seen*"))
