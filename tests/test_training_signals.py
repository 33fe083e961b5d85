"""Signals in a run of a program that is not a command; `test_interrupts` covers commands."""

import os
import signal
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from moe_jax.training import signals as signals_module
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.files import complete_steps
from moe_jax.training.signals import SignalFlag


@pytest.fixture
def came():
    """The handlers before a run: they note the signals that they get."""
    numbers = []
    numbered = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {
        number: signal.signal(number, lambda number, frame: numbers.append(number))
        for number in numbered
    }
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_after_its_step(number, came):
    with SignalFlag() as signals:
        assert signals.stops_after(1) is None
        os.kill(os.getpid(), number)
        assert signals.stops_after(2) == number and not came
    os.kill(os.getpid(), number)
    assert came == [number], "the handler before is back"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_acts_unless_it_is_the_first_again(number, came, monkeypatch):
    """A scheduler signals the sweep and its runs, and the sweep forwards the signal."""
    now = 100.0
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(signals_module, "time", clock)
    with SignalFlag() as signals:
        signals.stops_after(1)
        os.kill(os.getpid(), number)
        now += 0.3
        os.kill(os.getpid(), number)
        assert not came and signals.stops_after(2) == number
        now += 0.3
        os.kill(os.getpid(), number)
        assert came == [number]


def test_ctrl_c_of_several_processes_counts_as_sigterm_once(came, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with SignalFlag():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert came == [signal.SIGTERM]


def test_a_run_in_a_thread_leaves_signals_alone(came):
    """Python refuses handlers in a thread."""
    found = []

    def run():
        with SignalFlag() as signals:
            found.append(signals.stops_after(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    os.kill(os.getpid(), signal.SIGTERM)
    assert found == [None] and came == [signal.SIGTERM]


def test_processes_that_resume_count_their_own_steps(monkeypatch):
    """JAX counts from 1: an agreement on a process's step 1 is never met by step 5001."""
    asked = []
    several = types.SimpleNamespace(reached_preemption_sync_point=asked.append)
    monkeypatch.setattr(signals_module, "multihost_utils", several)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    flag = SignalFlag(5000)
    flag.stops_after(5001)
    flag.stops_after(5002)
    assert asked == [1, 2]


def test_orbax_does_not_move_that_count(tmp_path, monkeypatch):
    """Orbax would ask from a thread, about a step that training has already passed."""
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: pytest.fail(str(step))
    )
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, {"a": np.zeros(2)}, wait=True)
    assert complete_steps(tmp_path) == [3]


def test_under_nohup_a_closed_terminal_is_ignored(came):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalFlag() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.stops_after(1) is None


@pytest.mark.parametrize("inside", [True, False], ids=["in the evaluation", "in the step before"])
def test_a_checkpoint_is_complete_before_a_signal_acts(inside, came, tmp_path, monkeypatch):
    """By default SIGTERM kills, so nothing after it would wait."""
    add_manifest = Checkpoints._add_manifest

    def slowly(self):
        time.sleep(0.5)
        add_manifest(self)

    monkeypatch.setattr(Checkpoints, "_add_manifest", slowly)
    found = []
    signal.signal(signal.SIGTERM, lambda *_: found.append(complete_steps(tmp_path)))
    with Checkpoints(tmp_path, keep=1) as checkpoints, SignalFlag() as signals:
        signals.stops_after(3)
        if not inside:
            os.kill(os.getpid(), signal.SIGTERM)
        checkpoints.save(3, {"x": np.zeros(3)})
        with signals.nothing_to_save():
            if inside:
                os.kill(os.getpid(), signal.SIGTERM)
    assert found == [[3]]
