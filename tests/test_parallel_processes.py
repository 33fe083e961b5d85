"""How processes find each other, agree and end: rules first, then real processes with gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.parallel import processes
from moe_jax.parallel.processes import Place, place_of_process
from moe_jax.training.files import damage
from tests.process_step import two_steps
from tests.tiny_run import ROOT

WORKER = ROOT / "tests" / "process_worker.py"
# Two processes start and meet in about three seconds; the rest is for a busy machine.
LIMIT_SECONDS = 300
JAX_VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "host-0:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def test_one_process_needs_nothing_and_touches_nothing():
    assert place_of_process("1", None, None, {}) is None
    assert place_of_process("1", None, None, {"SLURM_NTASKS": "8"}) is None
    processes.start()
    assert processes.gather("here") == ["here"]
    processes.require_same("config", {"a": 1})
    processes.wait_for_all()
    processes.leave()


def test_flags_say_the_place():
    assert place_of_process("4", 3, "host-0:8476", {}) == Place("host-0:8476", 4, 3)
    assert place_of_process("2", 0, "[::1]:1", {}) == Place("[::1]:1", 2, 0)
    assert place_of_process("4", 3, "host-0:8476", JAX_VARIABLES) is not None, "they agree"


def test_auto_takes_the_variables_of_jax_and_leaves_the_rest_to_it():
    assert place_of_process("auto", None, None, JAX_VARIABLES) == Place("host-0:8476", 4, 3)
    assert place_of_process("auto", None, None, {}) is None
    # JAX itself combines the address with SLURM's variables.
    only_address = {"JAX_COORDINATOR_ADDRESS": "host-0:8476", "SLURM_NTASKS": "8"}
    assert place_of_process("auto", None, None, only_address) is None


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("3", None, None), {}, r"must be given together: --processes=3 without --process_id and"),
        (("3", 1, None), {}, r"without --coordinator\. Pass all three"),
        (("3", None, "h:1"), {}, r"without --process_id\. Pass all three"),
        (("1", 0, None), {}, r"--processes=1, but --process_id=0\. Pass --processes=N"),
        (("1", None, "h:1"), {}, r"--processes=1, but --coordinator=h:1\. Pass --processes=N"),
        (("0", None, None), {}, r"got '0'\. Pass --processes=auto, or"),
        (("many", None, None), {}, r"got 'many'"),
        (("2", 2, "h:1"), {}, r"0 to N - 1: --process_id=2, --processes=2"),
        (("2", -1, "h:1"), {}, r"--process_id=-1, --processes=2"),
        (("2", 1, "host"), {}, r"HOST:PORT.*: --coordinator=host\. Name a host"),
        (("2", 1, ":80"), {}, r"HOST:PORT.*: --coordinator=:80\."),
        (("2", 1, "host:http"), {}, r"HOST:PORT.*: --coordinator=host:http"),
        (("2", 1, "host:65536"), {}, r"HOST:PORT.*: --coordinator=host:65536"),
        (("auto", 1, None), {}, r"also given --process_id=1\. Leave that out"),
        (("1", None, None), JAX_VARIABLES, r"--processes=1, JAX_NUM_PROCESSES=4\. .* or unset"),
        (("2", 1, "h:1"), JAX_VARIABLES, r"--processes=2, JAX_NUM_PROCESSES=4"),
        (("4", 1, "host-0:8476"), JAX_VARIABLES, r"--process_id=1, JAX_PROCESS_ID=3\. Unset JAX_"),
        (("4", 3, "h:1"), JAX_VARIABLES, r": --coordinator=h:1, JAX_COORDINATOR_ADDRESS=host-0"),
        (("auto", None, None), {"JAX_PROCESS_ID": "0"}, r"set together: .*NUM_PROCESSES=\(unset\)"),
        (("auto", None, None), JAX_VARIABLES | {"JAX_PROCESS_ID": "x"}, r"whole numbers: .*ID=x"),
        (("auto", None, None), JAX_VARIABLES | {"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID=4, JAX_"),
    ],
)  # fmt: skip
def test_what_is_missing_wrong_or_contradictory_is_refused(flags, environment, message):
    with pytest.raises(ValueError, match=message):
        place_of_process(*flags, environment)


def test_auto_without_a_cluster_says_what_it_looked_for(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROC", "SLURM_", "OMPI_", "KUBERN")):
            monkeypatch.delenv(name)
    done = finish([spawn("sum", "auto")])[0]
    assert done.code == 1
    assert "reads SLURM, Open MPI, Cloud TPU" in done.said
    assert "or run one process" in done.said


class Finished:
    """The output and exit code of a finished process."""

    def __init__(self, process):
        self.said, _ = process.communicate(timeout=LIMIT_SECONDS)
        self.code = process.returncode


def spawn(*arguments, devices=1, **variables):
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        }
        | variables,
    )


def finish(spawned):
    try:
        return [Finished(process) for process in spawned]
    finally:
        for process in spawned:
            process.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def together(scenario, count=2, devices=1, **variables):
    port = free_port()
    return finish(
        [
            spawn(scenario, count, index, f"localhost:{port}", devices=devices, **variables)
            for index in range(count)
        ]
    )


def test_processes_compute_together_and_hear_each_other():
    for done in together("sum", devices=2):
        assert done.code == 0, done.said
        assert "sum 6 of 4 devices, said ['', 'x']" in done.said


@pytest.mark.parametrize("count", [1, 2])
def test_processes_meet_by_the_variables_of_jax(count):
    place = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    spawned = [spawn("sum", "auto", JAX_PROCESS_ID=str(i), **place) for i in range(count)]
    for done in finish(spawned):
        assert done.code == 0, done.said
        assert f"of {count} devices, said" in done.said


@pytest.mark.slow
def test_processes_whose_rows_interleave_train_as_one_does():
    """As on a TPU pod, where a host is a block of chips and the mesh follows the torus."""
    rows, whole, numbers = json.loads(two_steps(range(4)))
    assert rows == list(range(8))
    dones = together("interleaved", devices=2)
    for done, mine in zip(dones, ([0, 1, 4, 5], [2, 3, 6, 7]), strict=True):
        assert done.code == 0, done.said
        (line,) = (line for line in done.said.splitlines() if line.startswith("[["))
        got = json.loads(line)
        assert got[0] == mine
        assert got[1] == whole, "the same sequences in the same rows"
        np.testing.assert_allclose(got[2], numbers, rtol=1e-5)


def test_each_process_hashes_the_files_of_a_checkpoint_that_it_wrote(tmp_path):
    for index, done in enumerate(together("checkpoint", DIRECTORY=str(tmp_path))):
        assert done.code == 0, done.said
        assert f"hashed ['ocdbt.process_{index}']" in done.said, done.said
        assert "saved True False 1" in done.said, done.said
    manifest = (tmp_path / "1" / "manifest.json").read_text()
    assert "ocdbt.process_0/" in manifest and "ocdbt.process_1/" in manifest
    assert not list((tmp_path / "1").glob("hashes*"))
    assert damage(tmp_path / "1") is None


@pytest.mark.slow
@pytest.mark.parametrize("fails", [0, 1])
def test_a_process_that_cannot_write_a_checkpoint_ends_all(tmp_path, fails):
    """Orbax by itself waits, in each process at another barrier, for six hours."""
    dones = together("failed save", DIRECTORY=str(tmp_path), FAILS=str(fails))
    assert "OSError: The checkpoint of step 1 cannot be written" in dones[fails].said
    assert "cannot write; no checkpoint is complete" in dones[fails].said
    assert all(done.code not in (0, None) for done in dones)


def test_settings_that_differ_are_refused_by_all():
    for done in together("differ", count=3):
        assert done.code == 1, done.said
        assert "process 1 differs from process 0" in done.said
        assert "config.a.c: 0 -> 1" in done.said and "config.a.b" not in done.said


def test_what_one_refuses_all_refuse():
    first, second = together("refuse")
    assert (first.code, second.code) == (1, 1)
    assert "ValueError: process 1: mine alone" in first.said
    assert "ValueError: mine alone" in second.said


def test_a_second_start_is_refused():
    for done in together("again"):
        assert done.code == 1 and "A process may join only once" in done.said


def test_a_port_that_is_taken_is_refused_by_name():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"--coordinator=localhost:{port}, and port {port}"):
            processes.start("2", 0, f"localhost:{port}")


def watch(scenario, count):
    """Starts processes and waits until all of them print "steps"."""
    port = free_port()
    spawned = [spawn(scenario, count, index, f"localhost:{port}") for index in range(count)]
    for process in spawned:
        assert any(line == "steps\n" for line in process.stdout)
    return spawned


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, [2]),
        pytest.param(signal.SIGTERM, [0, 1, 2], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [1], marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_all_after_the_same_step(number, to):
    spawned = watch("signal", 3)
    for index in to:
        spawned[index].send_signal(number)
    dones = finish(spawned)
    assert [done.code for done in dones] == [0, 0, 0], dones[0].said
    stops = {re.search(r"signal \d+ after \d+", done.said)[0] for done in dones}
    assert len(stops) == 1 and stops.pop().startswith(f"signal {signal.SIGTERM:d} after")


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_one_is_killed_the_others_end(lost):
    spawned = watch("endless", 3)
    spawned[lost].kill()
    dones = finish(spawned)
    for index in {0, 1, 2} - {lost}:
        assert dones[index].code not in (0, None), dones[index].said
        assert re.search("detected fatal errors|Gloo .* failed", dones[index].said)


def test_a_silent_process_is_lost_after_as_many_seconds_as_asked_for(monkeypatch):
    """The value that JAX gets; how long JAX takes to notice depends on the machine."""

    def join(place, limits):
        raise InterruptedError(limits["heartbeat_timeout_seconds"])

    monkeypatch.setattr(processes, "_join", join)
    monkeypatch.setattr(processes, "order_collectives", lambda *_, **__: None)
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    with pytest.raises(InterruptedError, match=r"^7$"):
        processes.start("2", 1, "localhost:1", lost_after_seconds=7)


@pytest.mark.slow
def test_at_the_end_of_the_work_the_others_are_waited_for():
    for done in together("wait"):
        assert done.code == 0, done.said


@pytest.mark.slow
def test_one_that_compiles_longer_than_gloo_waits_is_waited_for():
    for done in together("slow compiler", count=4):
        assert done.code == 0, done.said
        assert "sum 16.0 at once" in done.said, "compiled once"


@pytest.mark.slow
def test_one_that_leaves_early_does_not_leave_the_others_hanging():
    dones = together("alone", count=3)
    assert all(done.code != 0 for done in dones)
    assert re.search(r"^mine alone$", dones[2].said, re.MULTILINE)
    assert "Shutdown barrier" in dones[0].said


@pytest.mark.slow
def test_processes_on_cpus_read_no_program_from_the_cache(tmp_path):
    """Cached programs run their collectives in no fixed order: see `_compile_anew_on_cpu`."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    assert finish([spawn("sum", "1", **cache)])[0].code == 0
    alone = set(tmp_path.iterdir())
    place = f"localhost:{free_port()}"
    for done in finish([spawn("sum", 2, index, place, **cache) for index in range(2)]):
        assert done.code == 0, done.said
    assert alone and set(tmp_path.iterdir()) == alone, "one process keeps its cache, two have none"


def test_a_host_of_a_slice_that_has_not_joined_is_refused(monkeypatch):
    """Libtpu by itself joins hosts to a slice that computes together but agrees on nothing else."""
    processes.require_joined("--processes=auto")
    monkeypatch.setattr(processes.jax, "process_count", lambda: 64)
    with pytest.raises(ValueError, match=r"one of 64 .* Pass --processes=auto on each"):
        processes.require_joined("--processes=auto")
    with pytest.raises(ValueError, match="Run this command on a machine of its own"):
        processes.require_joined("")
