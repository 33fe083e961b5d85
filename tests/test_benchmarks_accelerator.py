"""The run on an accelerator, tested without one: its budget, killed rows, and resumption."""

import functools
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import jax
import pytest

from benchmarks.accelerator import child, supervisor
from benchmarks.accelerator.child import measure
from benchmarks.accelerator.groups import BY_NAME, END, FACTS, GROUPS, TESTS, Group, Row
from benchmarks.accelerator.record import NOT_REACHED, ROOT, Record
from benchmarks.accelerator.shapes import SHAPES
from benchmarks.accelerator.supervisor import Supervisor, environment_of_child
from moe_jax.config.kinds import KINDS
from moe_jax.moe.run_experts.grouped_matmul import Target


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


def test_what_is_first_is_measured_first_and_what_is_left_is_known(record):
    calls = []

    def row(name, first):
        return Row(name, 5, lambda: calls.append(name) or {"ms": 1.0}, first)

    rows = [row("one", False), row("two", True), row("three", False)]
    run = Supervisor(record, 5, dry=False, say=lambda text: None)
    assert run.fits(GROUP, 60, only_first=True), "nothing is known of the group yet"
    measure("layers", rows, record, until=time.time() + 60, only_first=True)
    assert calls == ["two"]
    assert not run.fits(GROUP, 60, only_first=True)
    assert run.fits(GROUP, 60) and not run.fits(GROUP, 4)
    measure("layers", rows, record, until=time.time() + 60)
    assert calls == ["two", "one", "three"]
    assert not run.fits(GROUP, 60), "no process is started for nothing"


def test_rows_that_fail_at_once_leave_the_others_their_time(record):
    def fails():
        raise ValueError("at once")

    rows = [Row(str(i), 100, fails) for i in range(3)]
    rows.append(Row("works", 10, lambda: {"ms": 1.0}))
    measure("layers", rows, record, until=time.time() + 1000)
    [started] = [line for line in record.lines()
                 if line["row"] == "works" and line["state"] == "started"]  # fmt: skip
    assert started["needs"] == 10 and started["limit"] == 10 + child.PATIENCE


def test_a_device_is_lost_if_nothing_can_be_computed_any_more(monkeypatch):
    of_jax = jax.errors.JaxRuntimeError("INTERNAL: the kernel does not compile")
    assert not child.loses_device(of_jax)
    assert not child.loses_device(ValueError("no such kernel"))
    assert child.loses_device(RuntimeError("CUDA error: an illegal memory access"))

    def lost(*_):
        raise jax.errors.JaxRuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(jax.numpy, "ones", lost)
    assert child.loses_device(of_jax)


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

is_lost = False  # the context of a process that had a fault computes no more

def fault():
    global is_lost
    is_lost = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def sound():
    if is_lost:
        fault()
    return {"ms": 1.0}

rows = [Row("before", 1, sound), Row("faults", 1, fault), Row("sound", 1, sound),
        Row("aborts", 1, abort), Row("hangs", 1, lambda: time.sleep(60)), Row("behind", 1, sound)]
arguments = dict(one.partition("=")[::2] for one in sys.argv[1:])
record = Record(pathlib.Path(arguments["--record"]))
sys.exit(measure("layers", rows, record, float(arguments["--until"])))
"""


@pytest.fixture
def run_of_bad_rows(monkeypatch, record):
    """Returns a maker of runs whose child processes have one row that aborts and one that hangs."""
    start = subprocess.Popen

    def make(patience):
        code = f"import benchmarks.accelerator.child as child; child.PATIENCE = {patience}\n{CHILD}"

        def popen(command, **options):
            return start([sys.executable, "-c", code, *command[4:]], **options)

        monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
        return Supervisor(record, 5, dry=False, say=lambda text: None)

    return make


def test_a_row_that_faults_aborts_or_hangs_takes_only_itself_along(run_of_bad_rows, record):
    run_of_bad_rows(patience=0.5).run_group(GROUP, time.time() + 200)
    assert states(record) == {
        "before": "measured", "faults": "failed", "sound": "measured", "aborts": "failed",
        "hangs": "failed", "behind": "measured",
    }  # fmt: skip
    said = {row: line.get("error") for (_, row), line in record.last().items()}
    assert said["aborts"].startswith("its process ended with signal 6 (SIGABRT): F0000 gemm.cc:1]")
    assert said["hangs"] == "stopped after 3 s"


def test_a_row_that_the_time_runs_out_in_is_left_out_and_no_failure(run_of_bad_rows, record):
    for row in ("before", "faults", "sound", "aborts"):
        record.add("layers", row, "failed")
    run = run_of_bad_rows(patience=100)
    wait = run.wait

    def until_it_hangs(process, begin, until):
        while not record.running():
            assert process.poll() is None
            time.sleep(0.05)
        run.end = time.time() + supervisor.RESERVED / 2 + 0.2
        return wait(process, begin, until=time.time())

    run.wait = until_it_hangs
    line = run.run_child(GROUP, time.time() + 200)
    assert (line["row"], line["state"]) == ("hangs", "skipped")
    assert line["reason"] == supervisor.OUT_OF_TIME
    assert line["needs"] == max(1, 2 * line["cut"])
    assert record.last()["layers", "behind"]["reason"] == NOT_REACHED

    # The row is measured last, and only if twice the time is left.
    calls, needs = [], 1000
    record.add("layers", **line | {"cut": needs / 2, "needs": needs})
    rows = [
        Row(name, 1, lambda name=name: calls.append(name) or {}) for name in ("hangs", "behind")
    ]
    measure("layers", rows, record, until=time.time() + needs - 1)
    assert calls == ["behind"] and states(record)["hangs"] == "skipped"
    measure("layers", rows, record, until=time.time() + needs + 100)
    assert calls == ["behind", "hangs"]


def test_a_row_beyond_half_its_limit_when_the_time_is_up_has_failed(run_of_bad_rows, record):
    for row in ("before", "faults", "sound", "aborts"):
        record.add("layers", row, "failed")

    def until_it_has_hung(*_):
        while not (line := record.running()) or time.time() - line["at"] < line["limit"] / 2 + 0.2:
            time.sleep(0.05)
        return supervisor.OUT_OF_TIME

    run = run_of_bad_rows(patience=0.5)
    run.wait = until_it_has_hung
    line = run.run_child(GROUP, time.time() + 60)
    assert (line["row"], line["state"], line["error"]) == (
        "hangs",
        "failed",
        supervisor.OUT_OF_TIME,
    )


def test_a_process_that_cannot_start_says_why_once(monkeypatch, record):
    monkeypatch.setattr(supervisor, "ROOT", record.path.parent)  # this folder lacks the package
    monkeypatch.setattr(supervisor, "environment_of_child", lambda *_: {"PATH": os.environ["PATH"]})
    Supervisor(record, 5, dry=True, say=lambda text: None).run_group(GROUP, time.time() + 60)
    [line] = record.lines()
    assert (line["row"], line["state"]) == ("start", "failed")
    assert "No module named 'benchmarks'" in line["error"]

    Supervisor(record, 5, dry=True, say=lambda text: None).forget_start(GROUP)
    assert states(record) == {"start": "skipped"}, "once a process has started"


def test_all_but_the_quickstart_starts_without_the_packages_of_training_runs():
    groups = ("facts", "parity", "experts", "attention", "step", "layers", "other_kernels")
    code = (
        "import sys\n"
        "for name in ('ml_collections', 'grain', 'array_record', 'tensorboardX', 'flax',\n"
        "             'tensorflow_datasets', 'sentencepiece', 'pyarrow', 'matplotlib', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        f"import benchmarks.accelerator.{', benchmarks.accelerator.'.join(groups)}\n"
        "import benchmarks.accelerator.__main__"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


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


def on_a_gpu(monkeypatch):
    """Lists the rows of a GPU of compute capability 9.0 with cuDNN."""
    target = Target("gpu", capability=(9, 0))
    monkeypatch.setattr("moe_jax.moe.run_experts.plan.target_in_use", lambda: target)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    for module in ("attention", "other_kernels", "cudnn_fusion"):
        monkeypatch.setattr(f"benchmarks.accelerator.{module}.platform", lambda: "gpu")
    unfit = {"splash": "it runs on a TPU"}
    monkeypatch.setattr(
        "benchmarks.accelerator.attention.refusal", lambda name: unfit.get(name, "")
    )


def test_what_is_first_is_known_by_name_and_fits_in_eight_minutes(monkeypatch):
    on_a_gpu(monkeypatch)
    of = {
        group.name: [row for row in group.rows(False) if row.first] for group in GROUPS + (FACTS,)
    }
    first = {name: [row.name for row in rows] for name, rows in of.items()}
    assert first["facts"] == ["device", "matmul bfloat16 8192", "kernels", "copy"]
    ways = ("ragged triton", "ragged mosaic_gpu", "ragged dense", "einsum", "gather")
    assert first["parity"] == [
        *(f"{way}/bfloat16" for way in ways),
        *(f"router {kind}/float32 highest" for kind in KINDS["router"]),
        *(f"attention {kernel}, causal/bfloat16" for kernel in ("triton", "cudnn", "xla")),
    ]
    kernels, shapes = ("ragged triton", "ragged mosaic_gpu"), [*SHAPES, "mixtral_E8, forward"]
    assert first["experts"] == [f"{one}/even/{kernel}" for one in shapes for kernel in kernels]
    if find_spec("torch"):
        assert {name.split("/")[0] for name in first["torch_experts"]} == {*SHAPES}
    assert first["attention"] == ["causal/triton", "causal/cudnn", "causal/xla"]
    assert first["step"] == ["0.5 B/as it comes", "Mixtral-shaped/as it comes"]
    assert first["quickstart"] == ["device"]
    assert {name.split("/")[0] for name in first["layers"]} == {"a", "b", "c", "d"}
    assert not first["other_kernels"] and not first["cudnn_fusion"]

    # Each group fits its share of eight minutes.
    needs = {name: sum(row.seconds for row in rows) for name, rows in of.items()}
    assert all(needs[group.name] <= group.share * 8 * 60 for group in (FACTS, *GROUPS))


class Clock:
    """A clock that advances by the estimated time of each row."""

    now = 1e9

    def time(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds
        return {"platform": "gpu", "kind": "a card"}


def test_eight_minutes_reach_what_is_first_and_eight_more_go_on(monkeypatch, record):
    on_a_gpu(monkeypatch)
    listed = {group: group.rows(False) for group in (FACTS, *GROUPS, END)}
    clock = Clock()
    for module in ("supervisor", "child", "record"):
        monkeypatch.setattr(f"benchmarks.accelerator.{module}.time", clock)

    def run_group(self, group, until, only_first=False):
        self.tried.add(group.name)
        clock.pass_by(supervisor.STARTUP)
        rows = [row._replace(run=functools.partial(clock.pass_by, row.seconds))
                for row in listed[group]]  # fmt: skip
        measure(group.name, rows, record, until, only_first)

    monkeypatch.setattr(Supervisor, "run_group", run_group)

    def run():
        begin = clock.now
        Supervisor(record, 8, dry=False, say=print).run()
        assert clock.now <= begin + 8 * 60
        return {(group, row) for group, row in record.last("measured")}

    first = {(group.name, row.name) for group, rows in listed.items() for row in rows if row.first}
    reached = run()
    assert {key for key in first - reached if key[0] != "layers"} == set()
    again = run()
    assert first < again, "the layers too"
    measured = [(line["group"], line["row"]) for line in record.lines()
                if line["state"] == "measured" and line["row"] != "device"]  # fmt: skip
    at_the_end = [key for key in measured if key[0] == END.name]
    assert len(measured) - len(at_the_end) == len(set(measured)) - len(set(at_the_end))


def test_rows_behind_the_first_are_those_of_all_groups_by_value(monkeypatch):
    on_a_gpu(monkeypatch)
    names = {group.name: [row.name for row in group.rows(False)] for group in GROUPS}
    assert not any("blocks" in name for name in names["attention"] + names["parity"])
    assert names["layers"][:5] == [
        "b/ragged triton, dropless", "d/ragged triton, dropless", "a/ragged triton, dropless",
        "c/ragged triton, dropless", "b/gather, 1.25",
    ]  # fmt: skip
    assert "repository_tests" not in names


@pytest.mark.slow
def test_the_whole_run_on_a_cpu(tmp_path):
    """One command runs every group. A second start finds nothing left to measure."""
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
    assert {group for group, _ in last} >= {*BY_NAME} - {"torch_experts", TESTS.name}
    bad = {key: line.get("error") for key, line in last.items() if line["state"] != "measured"}
    assert not bad
    assert all(line["passed"] for (group, _), line in last.items() if group == "parity")

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    *facts, last_line = again.stdout.splitlines()
    assert all(line.startswith("facts/device: ") for line in facts)
    assert last_line == f"rows: {record.path}"
