"""A signal stops a command at once, with one line and exit code 128 + signal; real processes.

The quick cases stop a stand-in command with the phases of real ones.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from moe_jax import interrupts
from moe_jax.training.saved import CHECKPOINTS
from tests.parallel_job import environment
from tests.tiny_run import ROOT, tiny_flags

# Phases of a command as a signal meets them, after `python -m` has first imported moe_jax.
PHASES = {
    "import": "print('here', flush=True); import time; time.sleep(60)",
    "a call of C that does not come back": (
        "import ctypes; print('here', flush=True); ctypes.CDLL(None).sleep(60)"
    ),
    "threads of others": (
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('here', flush=True); time.sleep(60)"
    ),
}


def command(code):
    """A process like `python -m moe_jax.NAME`: finding the module already imports the package."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.argv[0] = '-m'\nimport moe_jax\nsys.argv[0] = 'train'\n{code}",
    ]


def start(arguments):
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=environment(1) | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_one_line(phase, number):
    with start(command(PHASES[phase])) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        said, _ = process.communicate(timeout=50)
    assert process.returncode == 128 + number
    assert said.split("\n") == ["", f"stopped by {number.name}", ""]


def test_a_real_command_is_one_from_its_first_import_on():
    arguments = ["-X", "importtime", "-m", "moe_jax.plan", "--config=configs/quickstart.py"]
    with start([sys.executable, *arguments]) as process:
        assert any("jax._src" in line for line in process.stdout), "imports are printed"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=50)
    assert process.returncode == 130
    assert "stopped by SIGINT\n" in said and "Traceback" not in said


def test_a_program_that_imports_the_library_keeps_its_signals():
    code = (
        "import moe_jax, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's `&` ignores it
        "print('here', flush=True); time.sleep(60)"
    )
    with start([sys.executable, "-c", code]) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=50)
    assert said.endswith("KeyboardInterrupt\n")


def test_an_error_does_not_wait_for_threads_of_others():
    code = (
        "import threading, time\nfrom moe_jax import interrupts\n"
        "threading.Thread(target=time.sleep, args=(100,)).start()\n"
        "with interrupts.ending_at_once(): sys.exit('error: full')"
    )
    with start(command(code)) as process:
        said, _ = process.communicate(timeout=50)
    assert (process.returncode, said) == (1, "error: full\n")


def test_a_full_disk_in_a_thread_of_others_ends_the_command():
    code = (
        "import errno, threading, time\nfrom moe_jax import interrupts\n"
        "interrupts.say_before_end(lambda: 'last good step: 7')\n"
        "def write(): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "threading.Thread(target=write).start(); time.sleep(60)"
    )
    with start(command(code)) as process:
        said, _ = process.communicate(timeout=50)
    assert process.returncode == 1
    assert said == "\nerror: [Errno 28] No space left on device; last good step: 7\n"


def test_signals_are_left_to_a_process_that_ends_others():
    code = (
        "import signal, time\nfrom moe_jax import interrupts\n"
        "signals = []\n"
        "with interrupts.left_to_handlers():\n"
        "    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))\n"
        "    print('here', flush=True)\n"
        "    while not signals: time.sleep(0.01)\n"
        "    time.sleep(0.2)\n"
        "print('ended the others', flush=True)"
    )
    with start(command(code)) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=50)
    assert (process.returncode, said) == (0, "ended the others\n")


@pytest.mark.parametrize("error", ["ConnectionResetError(104, 'reset')", "TimeoutError('slow')"])
def test_a_connection_that_breaks_in_a_thread_of_others_does_not(error):
    """A tracker never fails a run."""
    code = (
        "import threading, time\nfrom moe_jax import interrupts\n"
        f"def send(): raise {error}\n"
        "one = threading.Thread(target=send); one.start(); one.join()\n"
        "print('goes on', flush=True)"
    )
    with start(command(code)) as process:
        said, _ = process.communicate(timeout=50)
    assert process.returncode == 0
    assert said.endswith("goes on\n")


def deferring(code):
    """A command with unsaved work, which takes its time to save after the first signal."""
    return command(
        "import signal, time\nfrom moe_jax import interrupts\n"
        "interrupts.say_before_end(lambda: 'last good step: 7')\n"
        "with interrupts.deferring(lambda: True):\n"
        "    signal.signal(signal.SIGINT, lambda *_: print('saves', flush=True))\n"
        f"    {code}"
    )


def test_a_signal_while_something_is_unsaved_is_left_to_its_handler_and_a_second_acts():
    code = "print('here', flush=True)\n    for _ in range(600): time.sleep(0.1)"
    with start(deferring(code)) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "saves\n"
        time.sleep(interrupts.SAME_SECONDS + 0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=50)
    assert process.returncode == 130
    assert "stopped by SIGINT; last good step: 7\n" in said


def test_a_signal_that_comes_from_two_sides_is_one(monkeypatch):
    """For example, the scheduler and the sweep both send SIGTERM to a SLURM step."""
    ended = []
    monkeypatch.setattr(interrupts, "end_by", ended.append)
    for number in (signal.SIGTERM, signal.SIGHUP):
        with interrupts.deferring(lambda: True):
            for now in (100.0, 100.05, 100.3):
                interrupts._take(number, now)
            assert not ended
            interrupts._take(number, 100.0 + interrupts.SAME_SECONDS + 0.1)
        assert ended == [number]
        ended.clear()
    with interrupts.deferring(lambda: False):
        interrupts._take(signal.SIGTERM, 100.0)
    assert ended == [signal.SIGTERM], "nothing is unsaved"


@pytest.fixture(scope="module")
def endless():
    """Flags of an endless run."""
    return tiny_flags(num_steps=10**6, checkpoint_every=5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.5, 1.5, 3, 5, 8, 12, 20])
def test_a_run_is_stopped_at_any_moment(endless, tmp_path, seconds, number):
    """The delay counts from when `moe_jax` takes signals, however long Python took to start."""
    code = (
        f"import runpy; sys.argv += {[*endless, f'--workdir={tmp_path}/run']}\n"
        "print('here', flush=True); runpy.run_module('moe_jax.train', run_name='__main__')"
    )
    with start(command(code)) as process:
        assert process.stdout.readline() == "here\n"
        time.sleep(seconds)
        process.send_signal(number)
        said, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    assert len(re.findall(r"stopped by SIG", said)) == 1, said
    folder = tmp_path / "run" / CHECKPOINTS
    if folder.exists():
        assert not [name for name in os.listdir(folder) if "tmp" in name]


def test_a_callback_into_a_closed_event_loop_is_not_printed(capsys):
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
        interrupts._print_unless_late(type(error), error, None)
    assert capsys.readouterr().err == "RuntimeError: another\n"
