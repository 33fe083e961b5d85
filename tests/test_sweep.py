"""A grid of runs from the command line: names, checks, places, and resuming."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_jax import sweep
from moe_jax.config import MeshConfig, write_config
from moe_jax.jobs.grid import Axis, check_names, grid, names_of, parse_axis, split_values
from moe_jax.jobs.log import failure
from moe_jax.jobs.places import MEMORY, ONE_CORE, Machine, Place
from moe_jax.jobs.side_by_side import Board, Stopped, run_side_by_side
from moe_jax.training.run_record import write_run_record
from tests.tiny_run import CACHE, ROOT, files, tiny_config, tiny_flags

FLAGS = tiny_flags(num_steps=10, checkpoint_every=5, evaluate_every=5, sample_tokens=0)
RATES = "optimizer.learning_rate=1e-3,0.01"


def test_what_is_written_behind_set():
    assert parse_axis("config.seed,data.seed=0,1") == Axis(("seed", "data.seed"), ("0", "1"))
    assert parse_axis("--config.seed=3") == Axis(("seed",), ("3",))
    pairs = "data.domain_weights=(('a',1.0),),(('b',1.0),('c',2.0))"
    assert parse_axis(pairs).values == ("(('a',1.0),)", "(('b',1.0),('c',2.0))")
    assert split_values("a,'b,c',[1,2]") == ["a", "'b,c'", "[1,2]"]
    for wrong in ("seed", "=1", "seed=", "seed=1,,2"):
        with pytest.raises(ValueError, match=r"NAME=VALUE,VALUE: --set=.*Write, for example"):
            parse_axis(wrong)
    with pytest.raises(ValueError, match="Remove what comes twice"):
        parse_axis("seed=1,1")


def test_the_grid_is_every_combination():
    axes = [parse_axis("a=1,2"), parse_axis("seed,data.seed=0,1")]
    assert list(grid(axes)) == [
        {"a": a, "seed": seed, "data.seed": seed} for a in ("1", "2") for seed in ("0", "1")
    ]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("optimiser.learning_rate", r"Did you mean --set=optimizer.learning_rate="),
        ("learning_rate", r"no --config.learning_rate. Did you mean --set=optimizer.learning_rate"),
        ("lerning_rate", r"Did you mean --set=optimizer.learning_rate="),
        ("optimizer", r"not a section; .*--config.optimizer has 2 settings, such as optimizer.b1"),
        ("zzz", "Correct the name"),
    ],
)
def test_a_name_that_is_no_setting_is_refused_with_the_one_that_may_be_meant(name, error):
    with pytest.raises(ValueError, match=error):
        check_names([Axis((name,), ("1",))], ["seed", "optimizer.b1", "optimizer.learning_rate"])
    with pytest.raises(ValueError, match=r"varied only once: --config.seed in two --set"):
        check_names([Axis(("seed",), ("1",)), Axis(("seed",), ("2",))], ["seed"])


def test_directories_say_what_differs():
    axes = [parse_axis(text) for text in ("optimizer.b1=.9", "data.seed=0", "seed=0", "name=x")]
    point = {"optimizer.b1": 0.9, "data.seed": 3, "seed": 4, "name": "x"}
    assert names_of(axes, [point]) == ["b1=0.9,data.seed=3,seed=4,name=x"]
    (odd,) = names_of(axes[3:], [{"name": "../a b" + "c" * 200}])
    assert re.fullmatch(r"name=\.\._a_bc+_[0-9a-f]{6}", odd) and len(odd) <= 120


def test_the_runs_of_a_grid(tmp_path):
    runs = sweep.plan(FLAGS, [RATES, "seed,data.seed=0,7"], tmp_path)
    assert [run.name for run in runs] == [
        "learning_rate=0.001,seed=0", "learning_rate=0.001,seed=7",
        "learning_rate=0.01,seed=0", "learning_rate=0.01,seed=7",
    ]  # fmt: skip
    last = runs[-1]
    assert (last.config.seed, last.config.data.seed) == (7, 7)
    assert last.config.optimizer.learning_rate == 0.01
    command = last.command()
    assert command[1:3] == ["-m", "moe_jax.train"]
    assert command[-4:] == [
        "--config.optimizer.learning_rate=0.01", "--config.seed=7", "--config.data.seed=7",
        f"--workdir={tmp_path / last.name}",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_the_flags_that_runs_share_are_taken_from_the_command_line():
    argv = ["--config", "a b.py:x", "--out=o", "--config.seed", "3", "--noconfig.model.scan_layers"]
    assert sweep.shared_arguments(argv) == [
        "--config=a b.py:x", "--config.seed=3", "--config.model.scan_layers=false",
    ]  # fmt: skip
    assert sweep.shared_arguments(["-config=a.py"]) == ["--config=a.py"]


def test_the_flags_that_runs_share_may_be_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("--config=a.py\n--config.seed=3\n--out=o\n")
    found = sweep.shared_arguments([f"--flagfile={tmp_path / 'flags'}", "--config.name=x"])
    assert found == ["--config=a.py", "--config.seed=3", "--config.name=x"]


def test_presets_may_be_varied(tmp_path):
    flags = ["--config=configs/quickstart.py:smoke"]
    moe, dense = sweep.plan(flags, ["presets=none,dense"], tmp_path)
    assert (moe.name, dense.name) == ("presets=none", "presets=dense")
    assert set(moe.config.model.part) == {"attention", "moe"}
    assert set(dense.config.model.part) == {"attention", "mlp"}
    assert dense.arguments[0] == "--config=configs/quickstart.py:smoke,dense"


def test_values_with_commas(tmp_path):
    weights = "data.domain_weights=(('prose',1.0),),(('prose',1.0),('python',2.0)),()"
    trackers = "training.trackers=('csv',),('csv', 'tensorboard')"
    runs = sweep.plan(FLAGS, [weights, trackers], tmp_path)
    assert [run.config.data.domain_weights for run in runs[::2]] == [
        (("prose", 1.0),), (("prose", 1.0), ("python", 2.0)), (),
    ]  # fmt: skip
    assert runs[1].config.training.trackers == ("csv", "tensorboard")
    assert len({run.name for run in runs}) == 6
    prompts = "training.sample_prompt='Hello, world','',Once"
    runs = sweep.plan(FLAGS, [prompts], tmp_path)
    assert [run.config.training.sample_prompt for run in runs] == ["Hello, world", "", "Once"]
    assert runs[0].arguments[-1] == "--config.training.sample_prompt=Hello, world"


@pytest.mark.parametrize(
    ("sets", "error"),
    [
        (["optimizer.learning_rate=1e-3,-1"], r"learning_rate lies in \(0, inf\)"),
        (["optimizer.learning_rate=1e-3,0.001"], r"'1e-3'.*'0.001'.* give the same config\. Rem"),
        (["training.num_steps=10,20"], "in --set and in --config.training.num_steps. Remove one"),
        (["seed=0", "seed=1"], "a setting may be varied only once"),
    ],
)
def test_a_grid_is_refused_whole(tmp_path, sets, error):
    with pytest.raises(ValueError, match=error):
        sweep.plan(FLAGS, sets, tmp_path)
    with pytest.raises(ValueError, match=r"--config.seed is of type int: 'one' is not"):
        sweep.plan(FLAGS, ["seed=0,one"], tmp_path)


def begin(run):
    """Writes what training writes at its start, on the test machine."""
    write_run_record(run.workdir, run.config.on_devices(8))


def test_a_run_is_known_by_its_config_whatever_the_grid_calls_it(tmp_path):
    (run,) = sweep.plan(FLAGS, ["seed=5"], tmp_path)
    begin(run)
    first, second = sweep.plan(FLAGS, ["seed=5,6", "optimizer.b1=0.9"], tmp_path)
    assert first.workdir == run.workdir and second.workdir == tmp_path / "seed=6,b1=0.9"


def test_a_run_is_known_whether_its_paths_are_whole_or_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (run,) = sweep.plan([*FLAGS, f"--config.data.corpus={tmp_path}/texts"], ["seed=5"], tmp_path)
    begin(run)
    flags = [*FLAGS, "--config.data.corpus=texts"]
    (again,) = sweep.plan(flags, ["optimizer.b1=0.9", "seed=5"], tmp_path)
    assert again.workdir == run.workdir and again.name == "b1=0.9,seed=5"


def test_runs_that_differ_in_what_changes_no_result_have_a_workdir_each(tmp_path):
    rates = sweep.plan(FLAGS, [RATES], tmp_path)
    begin(rates[0])
    flags = [flag for flag in FLAGS if "checkpoint_every" not in flag]
    sets = ["optimizer.learning_rate=1e-3", "training.checkpoint_every=7,8"]
    both = sweep.plan(flags, sets, tmp_path)
    assert both[0].workdir == rates[0].workdir and both[1].workdir == tmp_path / both[1].name
    begin(both[1])
    again = sweep.plan(flags, sets, tmp_path)
    assert [run.workdir for run in again] == [run.workdir for run in both]


def test_a_directory_of_other_runs_is_refused_before_any_starts(tmp_path):
    runs = sweep.plan(FLAGS, ["seed=5"], tmp_path)
    runs[0].workdir.mkdir()
    other = json.dumps(write_config(tiny_config()))
    (runs[0].workdir / "config.json").write_text(other)
    (runs[0].workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"^seed=5: A workdir can hold only one run"):
        sweep.check(runs, Machine("cpu", 0, (0,)), 1)
    with pytest.raises(ValueError, match=r"^seed=6: the mesh must not have more devices"):
        meshed = sweep.plan([*FLAGS, "--config.mesh.data=4"], ["seed=6"], tmp_path)
        sweep.check(meshed, Machine("cpu", 0, (0,)), 1)
    with pytest.raises(ValueError, match=r"^seed=7: init_from.path must be the workdir of a run"):
        begun = sweep.plan([*FLAGS, f"--config.init_from.path={tmp_path}"], ["seed=7"], tmp_path)
        sweep.check(begun, Machine("cpu", 0, (0,)), 1)
    assert files(tmp_path) == before


def test_data_is_checked_once_with_held_out_text_and_once_without(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("moe_jax.data.check_data", lambda _, *, evaluates: seen.append(evaluates))
    flags = [flag for flag in FLAGS if "evaluate_every" not in flag]
    runs = sweep.plan(flags, ["training.evaluate_every=0,7", "seed=0,1"], tmp_path)
    sweep.check(runs, Machine("cpu", 0, (0,)), 1)
    assert seen == [False, True]


def test_cores_are_shared_out():
    machine = Machine("cpu", 0, (0, 1, 2, 3))
    assert machine.places(1) == [Place()]
    assert [place.cores for place in machine.places(2)] == [(0, 2), (1, 3)]
    assert [place.cores for place in machine.places(0)] == [(0,), (1,), (2,), (3,)]
    assert ONE_CORE in machine.places(4)[0].environment()["XLA_FLAGS"]
    assert ONE_CORE not in machine.places(2)[0].environment().get("XLA_FLAGS", "")


def test_jobs_take_memory_in_huge_pages_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert Place().environment()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert Place().environment()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = Machine("cuda", 4, tuple(range(8)))

    def visible(num_jobs, needed=1):
        places = machine.places(num_jobs, needed)
        return [(p.variables["CUDA_VISIBLE_DEVICES"], p.num_devices) for p in places]

    assert visible(0) == [("0", 1), ("1", 1), ("2", 1), ("3", 1)]
    assert visible(0, needed=2) == [("0,1", 2), ("2,3", 2)]
    assert visible(1) == [("0,1,2,3", 4)]
    assert visible(8)[4:6] == [("0", 1), ("1", 1)]
    assert machine.places(8)[0].variables[MEMORY] == "0.45"
    assert MEMORY not in machine.places(4)[0].variables
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible(2) == [("2", 1), ("3", 1)]


def test_another_accelerator_belongs_to_one_run():
    machine = Machine("tpu", 4, (0, 1))
    assert machine.places(0) == [Place((), 4)]
    with pytest.raises(ValueError, match=r"a tpu belongs to one process: --jobs=2\. Use --jobs=1"):
        machine.places(2)


def test_a_mesh_of_several_devices_has_fewer_runs_side_by_side(tmp_path):
    machine = Machine("cuda", 4, (0, 1))
    run = sweep.plan([*FLAGS, "--config.mesh.fsdp=2"], ["seed=0,1,2,3"], tmp_path)
    assert run[0].config.mesh == MeshConfig(data=-1, fsdp=2)
    assert len(sweep.places_for(run, machine, 0)) == 2
    assert len(sweep.places_for(run[:1], machine, 0)) == 1


class Script:
    """A job that runs a script."""

    def __init__(self, workdir, text):
        self.name, self.workdir, self.num_steps, self.text = workdir.name, workdir, 1, text

    def finished_steps(self):
        return 0

    def is_finished(self):
        return False

    def command(self):
        return [sys.executable, "-c", self.text]


def test_a_job_runs_on_the_cores_of_its_place(tmp_path):
    core = min(os.sched_getaffinity(0))
    job = Script(tmp_path / "job", "import os; print(os.sched_getaffinity(0))")
    before = os.sched_getaffinity(0)
    with Board([job]) as board:
        assert run_side_by_side([job], [Place((core,))], board) == []
    assert (tmp_path / "job" / "log.txt").read_text().endswith(f"\n{{{core}}}\n")
    assert os.sched_getaffinity(0) == before


def test_a_job_that_is_killed_is_not_said_to_fail_as_before(tmp_path):
    (tmp_path / "log.txt").write_text("error: an earlier attempt\n")
    job = Script(tmp_path, "import os; os.kill(os.getpid(), 9)")
    with Board([job]) as board:
        assert run_side_by_side([job], [Place(())], board) == [job]
    assert "ended by SIGKILL" in failure(tmp_path)


def test_a_signal_stops_the_jobs_and_a_second_one_is_handed_on_too(tmp_path):
    """The job takes two signals, like one that is asked to end while it saves."""
    text = (
        "import pathlib, signal, sys, time\n"
        "here, count = pathlib.Path(sys.argv[1]), []\n"
        "def take(*_):\n"
        "    count.append(1); (here / f'signal_{len(count)}').touch()\n"
        "    if len(count) == 2: sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, take); (here / 'ready').touch()\n"
        "while True: time.sleep(0.01)"
    )
    job = Script(tmp_path / "job", text)
    job.command = lambda: [sys.executable, "-c", text, str(job.workdir)]

    def press_twice():
        for name in ("ready", "signal_1"):
            while not (job.workdir / name).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_twice)
    thread.start()
    with pytest.raises(Stopped, match="SIGINT"), Board([job]) as board:
        run_side_by_side([job], [Place()], board)
    thread.join()
    assert (job.workdir / "signal_2").exists()


def test_a_job_is_stopped_when_what_started_it_is_killed(tmp_path):
    job = (
        "import os, pathlib, signal, sys, time, moe_jax\n"
        "from moe_jax.interrupts import PARENT\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "def take(*_): (here / 'saved').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, take); (here / 'ready').touch()\n"
        "assert PARENT not in os.environ, 'processes of the job have another parent'\n"
        "while True: time.sleep(0.01)"
    )
    parent = (
        "import pathlib, sys, time, types\n"
        "from moe_jax.jobs.places import Place\nfrom moe_jax.jobs.side_by_side import start\n"
        "command = [sys.executable, '-c', *sys.argv[:0:-1]]\n"
        "job = types.SimpleNamespace(workdir=pathlib.Path(sys.argv[1]), command=lambda: command)\n"
        "start(job, Place())\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent, str(tmp_path), job], cwd=ROOT) as process:
        wait_for(tmp_path / "ready")
        process.kill()
    wait_for(tmp_path / "saved")


def wait_for(path, seconds=300):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} is not there after {seconds} s"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_sweep_is_stopped_goes_on_and_is_compared(tmp_path):
    """Two runs, stopped by Ctrl-C in their first steps; then a third run that fails."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip

    def command(num_steps, *sets):
        flags = tiny_flags(num_steps=num_steps, checkpoint_every=1000000, sample_tokens=0)
        sets = [f"--set={one}" for one in sets]
        return [sys.executable, "-m", "moe_jax.sweep", *flags, f"--out={tmp_path}", *sets]

    options = {"cwd": ROOT, "env": environment, "text": True}
    long = command(3000, RATES)
    process = subprocess.Popen(long, stdout=subprocess.PIPE, start_new_session=True, **options)
    metrics = [tmp_path / f"learning_rate={rate}" / "metrics.jsonl" for rate in (0.001, 0.01)]
    while not any(path.exists() and path.read_text().count("\n") > 3 for path in metrics):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "To go on, run again:" in said
    begun = [path.parent for path in metrics if path.exists()]
    assert any((run / "checkpoints").iterdir() for run in begun)

    done = subprocess.run(long, capture_output=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stdout and "2 runs: 2 to do, " in done.stdout
    assert {"compare.html", "compare.png", "compare.csv"} <= set(os.listdir(tmp_path))

    third = RATES + ",1e30"
    done = subprocess.run(command(3000, third), capture_output=True, timeout=600, **options)
    assert done.returncode == 1 and "1 of 3 runs failed: learning_rate=1e+30." in done.stderr
    assert "3 runs: 2 finished before, 1 to do" in done.stdout
    with (tmp_path / "compare.csv").open(newline="") as stream:
        states = {row["run"]: row["state"] for row in csv.DictReader(stream)}
    assert states == {
        "learning_rate=0.001": "finished", "learning_rate=0.01": "finished",
        "learning_rate=1e+30": "failed",
    }  # fmt: skip
