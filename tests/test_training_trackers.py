"""Displays of a run's metrics: copies of the record, none of which can fail the run."""

import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from moe_jax.config import ExperimentConfig, TrainingConfig
from moe_jax.parallel.processes import SHUTDOWN_SECONDS
from moe_jax.training import trackers
from moe_jax.training.metrics import MetricWriter, read_metrics
from moe_jax.training.trackers import FINISH_SECONDS, check_trackers, open_trackers

ROOT = pathlib.Path(__file__).parent.parent


def config_of(*names):
    return dataclasses.replace(ExperimentConfig(), training=TrainingConfig(trackers=names))


def writer(directory, *names, start=0):
    directory.mkdir(exist_ok=True)
    opened = open_trackers(config_of(*names), directory, start)
    return MetricWriter(directory, start, trackers=opened)


def events(path):
    """The TensorBoard events in a directory. A record is a length, its checksum, data, checksum."""
    found = []
    for file in sorted((path / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def table(directory):
    with (directory / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_tensorboard_has_the_scalars_and_forgets_steps_that_are_run_again(tmp_path):
    with writer(tmp_path, "tensorboard") as record:
        record.write(7, {"train/loss": 1.5, "moe/layer_00/expert_load": [0.5, 0.5]})
    values = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert values == [(7, "train/loss", 1.5)]
    writer(tmp_path, "tensorboard", start=5).close()
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts == [1, 6]


def test_tensorboard_does_not_wait_for_torch(tmp_path):
    """If torch is installed, tensorboardX imports it, which delays the start by seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    program = (
        "import importlib.util, pathlib, sys\n"
        "from moe_jax.training.trackers import TensorBoard\n"
        f"board = TensorBoard(pathlib.Path({str(tmp_path)!r}), 0)\n"
        "board.write(1, {'train/loss': 1.5})\n"
        "board.close()\n"
        f"assert importlib.util.find_spec('torch').origin == {str(tmp_path / 'torch.py')!r}\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [v.tag for e in events(tmp_path) for v in e.summary.value] == ["train/loss"]


def test_a_csv_file_has_a_line_a_write_and_a_column_a_metric(tmp_path):
    with writer(tmp_path, "csv") as record:
        record.write(1, {"train/loss": jnp.float32(0.1), "load": jnp.array([0.5, 0.5])})
        record.write(2, {"train/loss": 3.0})
        record.write(2, {"heldout, all": 2.5})
        record.write(3, {"train/loss": 1.0})
    assert table(tmp_path) == [
        {"step": "1", "train/loss": "0.1", "heldout, all": ""},
        {"step": "2", "train/loss": "3.0", "heldout, all": ""},
        {"step": "2", "train/loss": "", "heldout, all": "2.5"},
        {"step": "3", "train/loss": "1.0", "heldout, all": ""},
    ]
    with writer(tmp_path, "csv", start=1) as record:
        record.write(2, {"train/loss": 4.0})
    assert [(row["step"], row["train/loss"]) for row in table(tmp_path)] == [
        ("1", "0.1"), ("2", "4.0"),
    ]  # fmt: skip


class FakeWandb(types.ModuleType):
    """Replaces the package: records what it is told, and fails where it is told to."""

    def __init__(self, fails_at=""):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.fails_at, self.started, self.logged, self.finished = fails_at, [], [], 0
        self.Settings = dict

    def fail(self, where):
        if self.fails_at == where:
            raise ConnectionError("no network")
        if self.fails_at == f"{where} hangs":
            threading.Event().wait()

    def init(self, **arguments):
        assert not sys.stdin.isatty()
        self.started.append(arguments)
        self.fail("init")
        return self

    def log(self, row, step):
        self.fail("log")
        self.logged.append((step, row))

    def finish(self):
        self.fail("finish")
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    def install(fails_at=""):
        module = FakeWandb(fails_at)
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setattr(trackers, "STARTUP_SECONDS", 0.2)
        monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
        return module

    return install


def test_a_resumed_run_goes_on_with_the_same_run_of_weights_and_biases(tmp_path, wandb):
    module = wandb()
    run = tmp_path / "my_run"
    with writer(run, "wandb") as record:
        record.write(1, {"train/loss": 2.0, "load": [0.5, 0.5]})
    with writer(run, "wandb", start=1) as record:
        record.write(2, {"train/loss": 1.0})
    first, second = module.started
    assert first["id"] == second["id"] == (run / "wandb_id.txt").read_text().strip()
    assert first["name"] == "my_run" and first["dir"] == str(run)
    assert first["config"]["training"]["trackers"] == ("wandb",)
    assert module.logged == [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0})]
    assert module.finished == 2
    writer(tmp_path / "another", "wandb").close()
    assert module.started[2]["id"] != first["id"]


@pytest.mark.parametrize("where", ["init", "log", "finish", "init hangs", "finish hangs"])
def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tmp_path, wandb, capsys, where):
    wandb(where)
    with writer(tmp_path, "wandb", "csv") as record:
        record.write(1, {"train/loss": 2.0})
        record.write(2, {"train/loss": 1.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the tracker wandb failed, and the run goes on without it: ")
    assert ("no answer within 0.2 s" if "hangs" in where else "no network") in line
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in table(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("bad", ["x1,2.0", "\0\0", ""])
def test_a_damaged_csv_file_is_set_aside_at_a_resume(tmp_path, capsys, bad):
    text = f"step,train/loss\n1,2.0\n{bad}\n" if bad else "step,train/loss\n1,2.0\n\xff\n"
    (tmp_path / "metrics.csv").write_bytes(text.encode("latin-1"))
    with writer(tmp_path, "csv", start=1) as record:
        record.write(2, {"train/loss": 1.0})
    assert table(tmp_path) == [{"step": "2", "train/loss": "1.0"}]
    assert (tmp_path / "damaged-metrics.csv").read_bytes() == text.encode("latin-1")
    assert "the tracker csv failed" not in capsys.readouterr().err


def test_a_csv_file_of_somebody_else_is_said_and_left_alone(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with writer(tmp_path, "csv") as record:
        record.write(1, {"train/loss": 2.0})
    assert "the tracker csv failed" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").read_text() == "a,b\n1,2\n"


def test_a_package_that_is_not_there_is_an_error_before_the_run(monkeypatch):
    check_trackers(("tensorboard", "csv"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed\. Run `pip install wandb`, or"):
        check_trackers(("csv", "wandb"))


def test_trackers_are_known_and_may_be_none(tmp_path):
    with pytest.raises(ValueError, match=r"trackers is one of \['tensorboard', 'csv', 'wandb'\]"):
        TrainingConfig(trackers=("tensorbord",))
    with writer(tmp_path) as record:
        record.write(1, {"train/loss": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 2.0}


def test_the_other_processes_wait_until_the_first_has_closed_its_trackers():
    assert SHUTDOWN_SECONDS > FINISH_SECONDS
