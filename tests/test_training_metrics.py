"""The record of a run: metrics that survive kills, settings, and progress output."""

import errno
import io
import json
import math
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ExperimentConfig
from moe_jax.training import metrics as metrics_module
from moe_jax.training import run_record as record_module
from moe_jax.training.files import read_json
from moe_jax.training.metrics import MetricWriter, last_step, read_metrics
from moe_jax.training.progress import Progress, progress_line
from moe_jax.training.run_record import extensions, run_record, write_run_record
from tests.tiny_run import tiny_config


def steps(path: pathlib.Path) -> list[int]:
    return [row["step"] for row in read_metrics(path / "metrics.jsonl")]


def test_what_is_written_is_read(tmp_path):
    load = jnp.array([0.1, 0.7, 0.2])
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(10, {"train/loss": jnp.float32(0.1), "perf/mfu": 0.25, "count": np.int64(3)})
        writer.write(20, {"moe/layer_01/expert_load": load, "train/loss": float("nan")})
        # Flushed at once, not only at close.
        assert steps(tmp_path / "run") == [10, 20]
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first == {"step": 10, "train/loss": 0.1, "perf/mfu": 0.25, "count": 3}
    assert second["moe/layer_01/expert_load"] == [0.1, 0.7, 0.2]
    assert math.isnan(second["train/loss"])


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": NaN, "load": [Infinity, 0.5]}\n')  # an old file
    with MetricWriter(tmp_path, start_step=1) as writer:
        writer.write(2, {"train/loss": jnp.float32("nan"), "load": [0.5, float("nan")]})
    written = path.read_text().splitlines()[-1]
    assert written == '{"step": 2, "train/loss": null, "load": [0.5, null]}'
    for row, place in zip(read_metrics(path), (0, 1), strict=True):
        assert math.isnan(row["train/loss"])
        assert [not math.isfinite(value) for value in row["load"]] == [i == place for i in range(2)]


def test_float32_reads_back_as_the_same_float32(tmp_path):
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32) * 1e-5
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"x": values, "y": jnp.bfloat16(0.1)})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(np.float32(row["x"]), values)
    assert jnp.bfloat16(row["y"]) == jnp.bfloat16(0.1)


@pytest.mark.parametrize("cut", [0, 5, 12])
def test_a_killed_and_resumed_run_has_each_step_once(tmp_path, cut):
    writer = MetricWriter(tmp_path)
    for step in (10, 20, 30, 40):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 50, '[:cut])
    assert steps(tmp_path) == [10, 20, 30, 40]
    with MetricWriter(tmp_path, start_step=25) as writer:
        assert steps(tmp_path) == [10, 20]
        for step in (30, 40, 50):
            writer.write(step, {"train/loss": 2.0})
    assert steps(tmp_path) == [10, 20, 30, 40, 50]


def damaged(directory, caplog, change, saved=None):
    """Resumes after step 30 from a changed metrics file of four rows; returns the warnings."""
    with MetricWriter(directory) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"train/loss": 1.0})
            saved = writer.state() if step == 30 else saved
    path = directory / "metrics.jsonl"
    change(path)
    caplog.clear()
    with MetricWriter(directory, start_step=30, saved=saved) as writer:
        writer.write(40, {"train/loss": 2.0})
        assert writer.state()["rows"] == len(steps(directory))
    return " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("change", "message", "kept"),
    [
        (lambda path: None, "", [10, 20, 30]),
        (lambda path: path.unlink(), "is missing: 0 rows of 3 are kept", []),
        (lambda path: path.write_bytes(b""), "0 rows of 3 are kept", []),
        (lambda path: path.write_bytes(bytes(100)), "0 rows of 3 are kept", []),
        (
            lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[1:])),
            "is not what the checkpoint of step 30 was saved with: 2 rows of 3 are kept",
            [20, 30],
        ),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'{"step": 20', b"{", 1)),
            "is damaged in line 2: 2 rows of 3 are kept",
            [10, 30],
        ),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"1.0", b"7.0", 1)),
            "is not what the checkpoint of step 30 was saved with: 3 rows of 3 are kept",
            [10, 20, 30],
        ),
    ],
    ids=["whole", "deleted", "empty", "zeroed", "a row less", "a bad line", "another value"],
)
def test_lost_rows_are_reported_and_a_damaged_file_is_set_aside(
    change, message, kept, tmp_path, caplog
):
    warned = damaged(tmp_path, caplog, change)
    assert message in warned
    assert bool(warned) == bool(message)
    assert steps(tmp_path) == [*kept, 40]
    aside = tmp_path / "damaged-metrics.jsonl"
    assert aside.exists() == ("damaged-metrics.jsonl" in warned)
    assert aside.exists() == (bool(message) and "is missing" not in message)


def test_a_run_stopped_before_its_first_row_has_lost_none(tmp_path, caplog):
    with MetricWriter(tmp_path) as writer:
        saved = writer.state()
    MetricWriter(tmp_path, start_step=30, saved=saved).close()
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kill_before_the_kept_rows_are_written_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nXX\n{"step": 2}\n')

    def killed(*arguments):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(metrics_module, "write_atomically", killed)
        MetricWriter(tmp_path, 2)
    MetricWriter(tmp_path, 2).close()
    assert steps(tmp_path) == [1, 2]


def test_a_run_that_begins_anew_sets_the_metrics_of_the_one_before_aside(tmp_path, caplog):
    """Its checkpoints were moved away, or it was killed before the first one."""
    with MetricWriter(tmp_path) as writer:
        for step in (0, 10, 20):
            writer.write(step, {"train/loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricWriter(tmp_path) as writer:
        writer.write(10, {"train/loss": 2.0})
    assert "has 2 rows of later steps, but there is no checkpoint: 1 rows are kept" in caplog.text
    assert (tmp_path / "earlier-metrics.jsonl").read_bytes() == before
    assert steps(tmp_path) == [0, 10]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 3}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r'"step": .*metrics.jsonl line 2 is b\'{"loss": 3}\''):
        read_metrics(path)


@pytest.mark.parametrize(
    "metrics", [{"step": 3}, {"loss": "low"}, {"loss": None}, {"load": np.ones((2, 2))}]
)
def test_a_metric_is_a_number_or_a_vector(tmp_path, metrics):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"a metric must be a number or a vector of numbers"):
            writer.write(1, metrics)
    assert steps(tmp_path) == []


def test_run_record_says_what_it_ran_on():
    record = run_record()
    assert record["versions"]["jax"] == jax.__version__
    assert record["platform"] == "cpu"
    assert record["num_devices"] == 8
    assert record["commit"] is None or len(record["commit"]) == 40
    assert record == json.loads(json.dumps(record))


def test_a_config_that_git_does_not_know_makes_a_checkout_dirty(tmp_path, monkeypatch):
    """Untracked Python files count; a study's results, to which runs append, do not."""

    def git(*arguments):
        user = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *user, *arguments], check=True)

    here, results = tmp_path / "metrics.py", tmp_path / "experiments/one/results.jsonl"
    results.parent.mkdir(parents=True)
    for path in (here, results):
        path.touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(record_module, "__file__", str(here))
    results.write_text("{}")
    (tmp_path / "notes.txt").touch()
    assert run_record()["dirty"] is False
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs/mine.py"
    mine.touch()
    assert run_record()["dirty"] is True
    mine.unlink()
    here.write_text("x = 1")
    assert run_record()["dirty"] is True


def test_a_copy_inside_another_checkout_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    copy = tmp_path / "site-packages" / "metrics.py"
    copy.parent.mkdir()
    copy.touch()
    monkeypatch.setattr(record_module, "__file__", str(copy))
    record = run_record()
    assert record["commit"] is None and record["dirty"] is None


def test_run_files_keep_earlier_sessions(tmp_path):
    config = ExperimentConfig(name="one")
    facts = {"parameters": {"total": 10, "active": 4}}
    write_run_record(tmp_path, config, facts=facts)
    assert (
        json.loads((tmp_path / "config.json").read_text())["model"]["parts"]["moe"]["num_experts"]
        == 8
    )
    assert json.loads((tmp_path / "run.json").read_text())["parameters"]["active"] == 4

    write_run_record(tmp_path, config, start_step=50)
    write_run_record(tmp_path, config, start_step=80)
    record = json.loads((tmp_path / "run.json").read_text())
    assert [earlier["start_step"] for earlier in record["earlier"]] == [0, 50]

    # `run.json` is only a record, so a damaged one is set aside.
    (tmp_path / "run.json").write_text('{"start')
    write_run_record(tmp_path, config, start_step=90)
    assert json.loads((tmp_path / "run.json").read_text())["earlier"] == []
    assert (tmp_path / "damaged-run.json").read_text() == '{"start'
    (tmp_path / "damaged-run.json").unlink()

    # A run that starts again from the beginning is another run.
    write_run_record(tmp_path, config)
    assert "earlier" not in json.loads((tmp_path / "run.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "run.json"]


def test_a_run_says_where_it_got_more_steps(tmp_path):
    def session(start, num_steps):
        config = tiny_config({"training": {"num_steps": num_steps}, "mesh": {"data": 2}})
        write_run_record(tmp_path, config, start_step=start)
        return read_json(tmp_path / "run.json")

    record = session(0, 10)
    assert (record["num_steps"], record["num_microbatches"], record["mesh"]["data"]) == (10, 1, 2)
    assert extensions(record) == []
    assert extensions(session(10, 10)) == []  # the same command again
    assert extensions(session(10, 30)) == [(10, 10)]
    assert extensions(session(20, 40)) == [(10, 10), (20, 30)]
    assert extensions(session(10, 10)) == []  # its later steps are lost
    # An older release did not record the number.
    del record["num_steps"]
    assert extensions(record) == []
    assert extensions({"start_step": 10, "num_steps": 20, "earlier": [record]}) == []


METRICS = {"train/loss": 2.0, "perf/tokens_per_s": 950.0, "perf/seconds_per_step": 60.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_plain_lines():
    file = io.StringIO()
    with Progress(1000, file=file) as progress:
        progress.update(1)
        progress.update(100, METRICS)
        progress.print("held-out [0.5]")
    assert file.getvalue() == (
        "step  100/1000  loss 2.0000 (nats/token)  950 tok/s  eta 15:00:00\nheld-out [0.5]\n"
    )


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    file = Terminal()
    with Progress(10, start_step=4, file=file) as progress:
        progress.update(5)
        progress.print("held-out [0.5]")
        progress.update(10, METRICS)
    text = file.getvalue()
    assert "held-out [0.5]" in text
    assert "step 10/10  loss 2.0000 (nats/token)  950 tok/s  eta 00:00" in text


def test_the_name_of_utilization():
    line = progress_line(5, 10, {"perf/mfu": 0.333}, "of measured peak")
    assert line == "step  5/10  of measured peak 33%"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_is_closed_does_not_fail_a_run(terminal, monkeypatch):
    class Closed(io.StringIO):
        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setenv("TERM", "xterm")
    with Progress(10, file=Closed()) as progress:
        progress.update(5, METRICS)
        progress.print("held-out [0.5]")


def test_a_file_that_was_moved_away_is_noticed_at_the_next_write(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(OSError, match=r"metrics\.jsonl was removed or renamed\. Bring it back"):
            writer.write(2, {"loss": 1.0})


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0, "there is no file yet"
    path.write_text('{"step": 1}\n{"step": 2, "loss": 3.5}\n{"st')
    assert last_step(path) == 2
    monkeypatch.setattr("moe_jax.training.metrics.LAST_BYTES", 29)
    assert last_step(path) == 2, "the end of the file has that line"
    path.write_text("no metrics")
    assert last_step(path) == 0
