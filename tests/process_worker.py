"""One of several processes that join, agree and leave; run by test_parallel_processes.py."""

import os
import re
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_jax.parallel import processes
from moe_jax.training import checkpoints, files
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.signals import SignalFlag

# How long gloo waits for a process that has not yet joined a group of devices.
GLOO_SECONDS = 30


def main(scenario: str, *place: str) -> None:
    """Joins the other processes, runs a function of SCENARIOS, and leaves with them."""
    where = (*place[:1], *map(int, place[1:2]), *place[2:])
    processes.SHUTDOWN_SECONDS = 20
    processes.start(*where, startup_seconds=60, lost_after_seconds=10)
    SCENARIOS[scenario](where)
    processes.wait_for_all()
    processes.leave()


def is_last() -> bool:
    return jax.process_index() == jax.process_count() - 1


def add_up(where):
    index, count = jax.process_index(), jax.device_count()
    sharding = NamedSharding(jax.make_mesh((count,), ("all",)), jax.P("all"))
    x = jax.make_array_from_callback((count,), sharding, lambda rows: np.arange(count)[rows])
    print(f"sum {int(jax.jit(jax.numpy.sum)(x))} of {count} devices,", end=" ")
    print(f"said {processes.gather('x' * index)}")


def interleave(where):
    """The devices of a process are not neighbours in the mesh."""
    from tests import process_step

    print(process_step.two_steps([0, 2, 1, 3]))


def differ(where):
    index = jax.process_index()
    processes.require_same("config", {"a": {"b": 1, "c": index}, "d": [index // 2]})


def refuse(where):
    with processes.all_or_none():
        if jax.process_index() == 1:
            raise ValueError("mine alone")


def start_again(where):
    processes.start(*where)


def wait_for_a_signal(where):
    """Takes steps of different lengths until a signal."""
    with SignalFlag() as signals:
        print("steps", flush=True)
        step = 0
        while (number := signals.stops_after(step)) is None:
            step += 1
            time.sleep(0.01 * (1 + jax.process_index()))
    print(f"signal {number} after {step}")


def gather_endlessly(where):
    print("steps", flush=True)
    while True:
        processes.gather("")


def compile_slowly(where):
    """The last process compiles slowly, on a mesh of two by two."""
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=axis_types)
    ones, sharding = np.ones((4, 4), np.float32), NamedSharding(mesh, jax.P("a", "b"))
    x = jax.make_array_from_callback((4, 4), sharding, lambda rows: ones[rows])

    @jax.jit
    def sums(x):
        if is_last():
            time.sleep(GLOO_SECONDS + 5)
        return x.sum(axis=0), x.sum(axis=1), x.sum()

    processes.compile_in_all(sums, x)
    began = time.monotonic()
    print("sum", float(sums(x)[2]), "at once" if time.monotonic() - began < 20 else "late")


def come_late(where):
    """Process 0 comes later than any other wait allows."""
    time.sleep(GLOO_SECONDS + 5 if jax.process_index() == 0 else 0)


def save_checkpoints(where):
    count = jax.process_count()
    ones = np.ones((count, 64), np.float32)
    sharding = NamedSharding(jax.make_mesh((count,), ("all",)), jax.P("all"))
    x = jax.make_array_from_callback(ones.shape, sharding, lambda rows: ones[rows])
    read, hashed = [], files.sha256_of
    files.sha256_of = lambda file: read.append(str(file)) or hashed(file)
    with Checkpoints(os.environ["DIRECTORY"], keep=2) as checkpoints:
        first = checkpoints.save(1, {"x": x}, wait=True)
        print("hashed", sorted(set(re.findall(r"ocdbt\.process_\d+", " ".join(read)))))
        if jax.process_index() == 1:  # its listing lags
            Checkpoints.steps = lambda self: []
        print("saved", first, checkpoints.save(1, {"x": x}), checkpoints.newest_whole())


def fail_to_save(where):
    """One process cannot hash or publish its files; the others stand at a barrier."""

    def fail(*arguments):
        raise RuntimeError("cannot write")  # of another thread, as by Orbax

    if jax.process_index() == int(os.environ["FAILS"]):
        checkpoints.write_hashes = checkpoints.write_manifest = fail
    x = jax.make_array_from_callback((2,), NamedSharding(jax.make_mesh((2,), ("all",)),
                                     jax.P("all")), lambda rows: np.ones(2)[rows])  # fmt: skip
    with Checkpoints(os.environ["DIRECTORY"], keep=2) as saved:
        saved.save(1, {"x": x})
        for _ in range(600):
            saved.check()
            time.sleep(0.1)


def leave_alone(where):
    if is_last():
        print("mine alone", flush=True)
        processes.leave()


SCENARIOS = {
    "sum": add_up,
    "interleaved": interleave,
    "differ": differ,
    "refuse": refuse,
    "again": start_again,
    "signal": wait_for_a_signal,
    "endless": gather_endlessly,
    "slow compiler": compile_slowly,
    "wait": come_late,
    "checkpoint": save_checkpoints,
    "failed save": fail_to_save,
    "alone": leave_alone,
}


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
        processes.leave()
        sys.exit(1)
