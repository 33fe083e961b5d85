"""What a signal does in a run of a program that is not a command; `test_interrupts` has those."""

import os
import signal
import time

import numpy as np
import pytest

from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.files import complete_steps
from moe_jax.training.signals import SignalFlag


@pytest.fixture
def came():
    """What was there before: it notes the signals that it gets."""
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


def test_under_nohup_a_closed_terminal_is_ignored(came):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalFlag() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.stops_after(1) is None


@pytest.mark.parametrize("inside", [True, False], ids=["in the evaluation", "in the step before"])
def test_a_checkpoint_is_complete_before_a_signal_acts(inside, came, tmp_path, monkeypatch):
    """By default SIGTERM kills: nothing after it would wait."""
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
