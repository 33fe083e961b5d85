"""One of several processes that meet, agree and end; run by test_parallel_processes.py."""

import os
import re
import sys
import time

import jax
import numpy as np

from moe_jax.parallel import processes
from moe_jax.training import files
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.signals import SignalFlag

# How long gloo waits for a process that has not come to a group of devices yet.
GLOO_SECONDS = 30


def main(scenario: str, *place: str) -> None:
    where = (*place[:1], *map(int, place[1:2]), *place[2:])
    processes.start(*where, startup_seconds=60, lost_after_seconds=10)
    index, count = jax.process_index(), jax.process_count()
    if scenario == "sum":
        mesh = jax.make_mesh((jax.device_count(),), ("all",))
        sharding = jax.sharding.NamedSharding(mesh, jax.P("all"))
        x = jax.make_array_from_callback(
            (jax.device_count(),), sharding, lambda where: np.arange(jax.device_count())[where]
        )
        print(
            f"sum {int(jax.jit(jax.numpy.sum)(x))} of {jax.device_count()} devices,",
            f"said {processes.gather('x' * index)}",
        )
    elif scenario == "interleaved":  # the devices of a process are no neighbours in the mesh
        from tests import process_step

        print(process_step.two_steps([0, 2, 1, 3]))
    elif scenario == "differ":
        processes.require_same("config", {"a": {"b": 1, "c": index}, "d": [index // 2]})
    elif scenario == "refuse":
        with processes.all_or_none():
            if index == 1:
                raise ValueError("mine alone")
    elif scenario == "again":
        processes.start(*where)
    elif scenario == "signal":  # with steps of different lengths
        with SignalFlag() as signals:
            print("steps", flush=True)
            step = 0
            while (number := signals.stops_after(step)) is None:
                step += 1
                time.sleep(0.01 * (1 + index))
        print(f"signal {number} after {step}")
    elif scenario == "endless":
        print("steps", flush=True)
        while True:
            processes.gather("")
    elif scenario == "slow compiler":  # of the last, on a mesh of two by two
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        sharding = jax.sharding.NamedSharding(mesh, jax.P("a", "b"))
        ones = np.ones((4, 4), np.float32)
        x = jax.make_array_from_callback((4, 4), sharding, lambda where: ones[where])

        @jax.jit
        def sums(x):
            if index == count - 1:
                time.sleep(GLOO_SECONDS + 5)
            return x.sum(axis=0), x.sum(axis=1), x.sum()

        processes.compile_in_all(sums, x)
        began = time.monotonic()
        print("sum", float(sums(x)[2]), "at once" if time.monotonic() - began < 20 else "late")
    elif scenario == "wait":  # for all, longer than anybody waits elsewhere
        time.sleep(GLOO_SECONDS + 5 if index == 0 else 0)
    elif scenario == "checkpoint":
        mesh = jax.make_mesh((count,), ("all",))
        sharding = jax.sharding.NamedSharding(mesh, jax.P("all"))
        ones = np.ones((count, 64), np.float32)
        x = jax.make_array_from_callback(ones.shape, sharding, lambda where: ones[where])
        read, hashed = [], files._sha256_of_one
        files._sha256_of_one = lambda file: read.append(str(file)) or hashed(file)
        with Checkpoints(os.environ["DIRECTORY"], keep=2) as checkpoints:
            first = checkpoints.save(1, {"x": x}, wait=True)
            print("hashed", sorted(set(re.findall(r"ocdbt\.process_\d+", " ".join(read)))))
            if index == 1:  # whose listing lags
                Checkpoints.steps = lambda self: []
            print("saved", first, checkpoints.save(1, {"x": x}), checkpoints.newest_whole())
    elif scenario == "alone":
        if index == count - 1:
            print("mine alone", flush=True)
            processes.leave()
    processes.wait_for_all()
    processes.leave()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        print(f"ValueError: {error}")
        processes.leave()
        sys.exit(1)
