"""The run on an accelerator, without one: its budget, what kills cost, and how it goes on."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.accelerator import supervisor
from benchmarks.accelerator.child import measure
from benchmarks.accelerator.groups import BY_NAME, FACTS, GROUPS, Group, Row
from benchmarks.accelerator.record import ROOT, Record
from benchmarks.accelerator.supervisor import Supervisor, environment_of_child


def states(record):
    return {row: line["state"] for (_, row), line in record.last().items()}


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "accelerator.jsonl")


def test_rows_are_measured_once_and_a_failure_costs_one_row(record):
    calls = []

    def missing():
        calls.append("missing")
        raise NotImplementedError("no such kernel\nhere")

    rows = [Row("first", 1, lambda: {"ms": 2.0}), Row("second", 1, missing)]
    rows.append(Row("third", 1, lambda: {"ms": 3.0}))
    measure("experts", rows, record, until=time.time() + 60)
    measure("experts", rows, record, until=time.time() + 60)
    assert calls == ["missing"]
    assert states(record) == {"first": "measured", "second": "failed", "third": "measured"}
    assert record.last()["experts", "second"]["error"] == "NotImplementedError: no such kernel here"

    record.forget_failed()
    measure("experts", rows, record, until=time.time() + 60)
    assert calls == ["missing", "missing"]


def test_a_row_that_needs_more_than_the_time_left_is_left_out_until_there_is_time(record):
    rows = [Row("long", 100, lambda: {"ms": 1.0}), Row("short", 1, lambda: {"ms": 1.0})]
    measure("experts", rows, record, until=time.time() + 10)
    assert states(record) == {"long": "skipped", "short": "measured"}
    assert record.last()["experts", "long"]["reason"] == "needs about 100 s, 10 s were left"
    measure("experts", rows, record, until=time.time() + 1000)
    assert states(record) == {"long": "measured", "short": "measured"}


def test_a_line_that_a_kill_cut_off_is_no_line(record):
    record.add("experts", "whole", "measured", ms=1.0)
    with record.path.open("a") as file:
        file.write('{"group": "experts", "row": "torn", "sta')
    record.add("experts", "next", "measured", ms=2.0)
    assert states(record) == {"whole": "measured", "next": "measured"}


def test_a_row_in_which_the_whole_run_was_killed_is_measured_again(record):
    record.add("layers", "row", "started", limit=10.0)
    Supervisor(record, 1, dry=True, say=print)
    assert states(record) == {"row": "skipped"}
    measure("layers", [Row("row", 1, lambda: {"ms": 1.0})], record, until=time.time() + 60)
    assert states(record) == {"row": "measured"}


GROUP = Group("layers", 0.5, "A layer")
CHILD = """
import os, pathlib, signal, sys, time
from benchmarks.accelerator.child import measure
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.record import Record

def abort():
    print("F0000 gemm.cc:1] Check failed: rows == 3", file=sys.stderr, flush=True)
    os.abort()

rows = [Row("before", 1, lambda: {"ms": 1.0}), Row("aborts", 1, abort),
        Row("hangs", 1, lambda: time.sleep(60)), Row("behind", 1, lambda: {"ms": 1.0})]
arguments = dict(one.partition("=")[::2] for one in sys.argv[1:])
measure("layers", rows, Record(pathlib.Path(arguments["--record"])), float(arguments["--until"]))
"""


@pytest.fixture
def run_of_bad_rows(monkeypatch, record):
    """Makes a run whose processes have a row that aborts and one that hangs."""
    start = subprocess.Popen

    def make(patience):
        code = f"import benchmarks.accelerator.child as child; child.PATIENCE = {patience}\n{CHILD}"

        def popen(command, **options):
            return start([sys.executable, "-c", code, *command[4:]], **options)

        monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
        return Supervisor(record, 5, dry=False, say=lambda text: None)

    return make


def test_a_row_that_aborts_or_hangs_takes_only_itself_along(run_of_bad_rows, record):
    run_of_bad_rows(patience=0.5).run_group(GROUP, time.time() + 200)
    assert states(record) == {
        "before": "measured", "aborts": "failed", "hangs": "failed", "behind": "measured",
    }  # fmt: skip
    said = {row: line.get("error") for (_, row), line in record.last().items()}
    assert said["aborts"].startswith("its process ended with signal 6 (SIGABRT): F0000 gemm.cc:1]")
    assert said["hangs"] == "stopped after 3 s"


def test_a_row_that_the_time_runs_out_in_is_left_out_and_no_failure(run_of_bad_rows, record):
    record.add("layers", "aborts", "failed")
    run = run_of_bad_rows(patience=100)
    run.end = time.time() + supervisor.RESERVED / 2
    run.run_group(GROUP, time.time() + 8)
    assert states(record) == {"before": "measured", "aborts": "failed", "hangs": "skipped"}


def test_a_process_that_cannot_start_says_why_once(monkeypatch, record):
    monkeypatch.setattr(supervisor, "ROOT", record.path.parent)  # without the package
    monkeypatch.setattr(supervisor, "environment_of_child", lambda *_: {"PATH": os.environ["PATH"]})
    Supervisor(record, 5, dry=True, say=lambda text: None).run_group(GROUP, time.time() + 60)
    [line] = record.lines()
    assert (line["row"], line["state"]) == ("start", "failed")
    assert "No module named 'benchmarks'" in line["error"]

    Supervisor(record, 5, dry=True, say=lambda text: None).forget_start(GROUP)
    assert states(record) == {"start": "skipped"}, "once a process has started"


def test_a_machine_without_an_accelerator_is_refused(record):
    record.add("facts", "device", "measured", platform="cpu", kind="cpu")
    with pytest.raises(RuntimeError, match="JAX found a CPU only"):
        Supervisor(record, 1, dry=False, say=print).check_machine()
    assert states(record) == {"device": "skipped"}, "looked at again when there is one"
    record.add("facts", "device", "measured", platform="cpu", kind="cpu")
    with pytest.raises(RuntimeError, match=r"is of TPU v5e, this is cpu\. Choose another --out"):
        Supervisor(record, 1, dry=True, say=print).check_machine("TPU v5e")


def test_processes_keep_a_cpu_beside_the_accelerator_and_take_no_memory_in_advance():
    made = environment_of_child(
        {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, False
    )
    assert made["JAX_PLATFORMS"] == "cuda,cpu"
    assert made["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".5"
    assert made["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert environment_of_child({}, False)["JAX_PLATFORMS"] == ""
    assert environment_of_child({}, True)["JAX_PLATFORMS"] == "cpu"


def test_what_matters_most_fits_in_eight_minutes_even_if_every_group_takes_its_share():
    seconds = 8 * 60
    groups = (FACTS, *GROUPS[:6])
    assert groups[-1].name == "step"
    taken = sum(supervisor.STARTUP + group.share * seconds for group in groups)
    assert taken <= seconds - supervisor.RESERVED


@pytest.mark.slow
def test_the_whole_run_on_a_cpu(tmp_path):
    """One command; every group has rows; a second start has nothing left to measure."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.accelerator",
        "--dry",
        f"--out={tmp_path}",
        "--minutes=60",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    record = Record(tmp_path / "accelerator.jsonl")
    last = record.last()
    assert {group for group, _ in last} >= {FACTS.name, *BY_NAME} - {"torch_experts"}
    bad = {key: line.get("error") for key, line in last.items() if line["state"] != "measured"}
    assert not bad
    assert all(line["passed"] for (group, _), line in last.items() if group == "parity")

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    *facts, last_line = again.stdout.splitlines()
    assert all(line.startswith("facts/device: ") for line in facts)
    assert last_line == f"rows: {record.path}"
