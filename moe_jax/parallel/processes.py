"""The processes of a run: how they meet, agree, and end together.

A run is one process, or several that each drive the devices of one machine (or one of its devices)
and run the same program. Several find each other through a coordinator, a service in process 0. No
process continues alone: when one dies or falls silent, JAX aborts the others, with a message on
standard error, so that their launcher can restart all of them.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import difference
from moe_jax.config.environment import order_collectives

# Variables that a person, Ray or a job script sets; JAX reads the first by itself.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# How long a process that ends with an error waits for the others to end too. Process 0 may still
# close its trackers (`training.trackers.FINISH_SECONDS`).
SHUTDOWN_SECONDS = 90


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among the processes of its run."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int


def place_of_process(
    processes: str,
    process_id: int | None,
    coordinator: str | None,
    environment: Mapping[str, str],
) -> Place | None:
    """The place that the flags and the environment give, checked; touches no device.

    Args:
      processes: "1", "auto" or a number of processes.
      process_id: index of this process; only with a number of processes.
      coordinator: HOST:PORT; only with a number of processes.
      environment: `os.environ`.

    Returns:
      The place; None for a single process, and for "auto" if `VARIABLES` are not set: JAX then
      looks for the cluster itself.

    Raises:
      ValueError: the flags are incomplete, wrong, or contradict the environment.
    """
    given = {"--process_id": process_id, "--coordinator": coordinator}
    unneeded = [f"{name}={value}" for name, value in given.items() if value is not None]
    if processes == "auto":
        if unneeded:
            raise ValueError(
                "--processes=auto reads everything from the environment: also given "
                f"{', '.join(unneeded)}. Leave that out, or pass --processes=N."
            )
        return _place_in(environment)

    try:
        number = int(processes)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(
            f'--processes must be "auto" or a number from 1: got {processes!r}. '
            "Pass --processes=auto, or --processes=N --process_id=I --coordinator=HOST:PORT."
        )
    if number == 1 and unneeded:
        raise ValueError(
            f"A single process joins no others: --processes=1, but {', '.join(unneeded)}. "
            "Pass --processes=N with the number of all processes."
        )
    stated = environment.get("JAX_NUM_PROCESSES")
    if stated is not None and stated != str(number):
        raise ValueError(
            "--processes and the environment must name the same number of processes: "
            f"--processes={number}, JAX_NUM_PROCESSES={stated}. Pass --processes=auto to use the "
            "environment, or unset JAX_NUM_PROCESSES."
        )
    if number == 1:
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing or process_id is None or coordinator is None:
        raise ValueError(
            "--processes=N, --process_id=I and --coordinator=HOST:PORT must be given together: "
            f"--processes={number} without {' and '.join(missing)}. Pass all three, the first and "
            "the last alike in all processes; or --processes=auto on a cluster."
        )
    names = ("--coordinator", "--processes", "--process_id")
    values = (coordinator, number, process_id)
    for name, value, variable in zip(names, values, VARIABLES, strict=True):
        if environment.get(variable, str(value)) != str(value):
            raise ValueError(
                f"The flags must agree with the environment: {name}={value}, "
                f"{variable}={environment[variable]}. Unset {variable}, or pass --processes=auto "
                "alone."
            )
    return _checked(Place(coordinator, number, process_id), names)


def _place_in(environment: Mapping[str, str]) -> Place | None:
    """The place that `VARIABLES` give; None if they leave it to JAX."""
    address, number, index = (environment.get(name) for name in VARIABLES)
    if number is None and index is None:
        return None
    given = ", ".join(f"{name}={environment.get(name, '(unset)')}" for name in VARIABLES)
    if address is None or number is None or index is None:
        raise ValueError(
            f"{', '.join(VARIABLES)} must be set together: {given}. Set all three, or only the "
            "first where JAX knows the cluster."
        )
    if not (number.isdecimal() and index.isdecimal()):
        raise ValueError(f"The number and the index of processes must be whole numbers: {given}.")
    return _checked(Place(address, int(number), int(index)), VARIABLES)


def _checked(place: Place, names: tuple[str, ...]) -> Place:
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"The coordinator must be HOST:PORT, of process 0: {names[0]}={place.coordinator}. "
            "Name a host that all processes reach, and a free port of it, such as host-0:8476."
        )
    if not 0 <= place.process_id < place.num_processes:
        raise ValueError(
            f"Processes must be numbered from 0 to N - 1: {names[2]}={place.process_id}, "
            f"{names[1]}={place.num_processes}. Number them anew."
        )
    return place


def start(
    processes: str = "1",
    process_id: int | None = None,
    coordinator: str | None = None,
    *,
    startup_seconds: int = 300,
    lost_after_seconds: int = 60,
    catch_sigterm: bool = True,
) -> None:
    """Joins the processes of this run; call it before anything asks for a device.

    Several processes on CPUs communicate over gloo, JAX's default. Their collectives run in one
    order (`order_collectives`), and they compile every program themselves: JAX's compilation cache
    is off, see `_compile_anew_on_cpu`.

    Args:
      processes: "1": a single process; nothing is done. "auto": read from the environment, either
        `VARIABLES` or what JAX finds of SLURM, Open MPI, Cloud TPU and Kubernetes. N: number of
        processes, with the next two arguments.
      process_id: index of this process, from 0.
      coordinator: HOST:PORT of process 0.
      startup_seconds: how long to wait for the others.
      lost_after_seconds: a process that is silent for so long counts as dead, and the others end. A
        broken connection ends them sooner.
      catch_sigterm: with several processes, SIGTERM no longer kills but is announced to all of
        them, for `jax.experimental.multihost_utils.reached_preemption_sync_point`; training needs
        it.

    Raises:
      ValueError: the flags or the environment are wrong, `start` was called before, or the
        processes have different numbers of devices.
      OSError: the coordinator's port is taken.
    """
    if jax.distributed.is_initialized():
        raise ValueError(
            "A process may join only once: moe_jax.parallel.processes.start is called again."
        )
    place = place_of_process(processes, process_id, coordinator, os.environ)
    if place is None and processes != "auto":
        return
    order_collectives(os.environ, processes=True)
    jax.config.update("jax_enable_preemption_service", catch_sigterm)
    limits = {
        "initialization_timeout": startup_seconds,
        "heartbeat_timeout_seconds": lost_after_seconds,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    if place is None:
        _say(f"meets the other processes where the cluster says, within {startup_seconds} s")
        _join_cluster(limits)
    else:
        _say(
            f"process {place.process_id} of {place.num_processes} meets the others at "
            f"{place.coordinator}, within {startup_seconds} s"
        )
        _join(place, limits)
    _require_equal_devices()
    _compile_anew_on_cpu()  # before anything is compiled: JAX decides on its cache once
    # Now, while all are at the same point: gloo gives up on a group of devices if some join it 30 s
    # after the others, but waits without limit in a group that has met.
    wait_for_all()
    _say(
        f"process {jax.process_index()} of {jax.process_count()}, with {jax.local_device_count()} "
        f"of {jax.device_count()} devices. If one process is lost, the others end within about "
        f"{lost_after_seconds} s: start all of them again, and a training run goes on from its "
        "newest checkpoint."
    )


def require_joined(flag: str) -> None:
    """Refuses a host of a TPU slice that has not joined the others.

    libtpu connects such hosts by itself: they compute together, but agree on no checkpoint and no
    signal.

    Args:
      flag: the command's flag that joins them; "" if it is for one process.

    Raises:
      ValueError: naming the flag.
    """
    count = jax.process_count()
    if count > 1 and not jax.distributed.is_initialized():
        way = f"Pass {flag} on each" if flag else "Run this command on a machine of its own"
        raise ValueError(
            f"This host is one of {count} of a TPU slice, and has not joined the others. {way}, or "
            "set JAX_PLATFORMS=cpu."
        )


def wait_for_all() -> None:
    """Returns when all processes have called it."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices("wait_for_all")


def compile_in_all(function: Any, *arguments: Any, **keywords: Any) -> None:
    """Compiles a jitted function in all processes before any runs it; no-op for one process.

    A program's groups of devices meet when it first runs (see `start`), and one process may compile
    much longer than another. The following call does not compile again.
    """
    if jax.distributed.is_initialized():
        function.lower(*arguments, **keywords).compile()
        wait_for_all()


def leave() -> None:
    """Leaves the other processes, which call this too; no-op for a single process.

    Report an error before this call: if the others do not arrive within `SHUTDOWN_SECONDS`, because
    they wait for this process, JAX aborts all of them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    jax.distributed.shutdown()


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; all processes call this together."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]


def of_first(value: Any) -> Any:
    """The JSON-compatible value of process 0, in all processes, which call this together."""
    return json.loads(gather(json.dumps(value))[0])


def require_same(what: str, settings: Mapping[str, Any]) -> None:
    """Refuses, in all processes, settings that differ from those of process 0.

    Args:
      what: name of the settings.
      settings: nested, JSON-compatible dicts.

    Raises:
      ValueError: listing every setting that differs.
    """
    of_each = [json.loads(text) for text in gather(json.dumps(settings))]
    for process, other in enumerate(of_each):
        lines = difference(of_each[0], other, what)
        if lines:
            raise ValueError(
                f"The processes of a run must have the same {what}: process {process} differs from "
                "process 0 (0 -> it):\n  "
                + "\n  ".join(lines)
                + "\nStart all with the same command."
            )


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """If one process refuses in this block, all refuse, so that the others do not wait for it.

    Raises:
      ValueError: the block raised a ValueError or an OSError in another process.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        gather(str(error) or repr(error))
        raise
    for process, message in enumerate(gather("")):
        if message:
            raise ValueError(f"process {process}: {message}")


def _compile_anew_on_cpu() -> None:
    """Turns off JAX's persistent compilation cache on CPUs.

    Gloo matches the collectives of two processes only by their order. XLA's CPU runtime runs
    independent operations in parallel, but keeps collectives in order, since all in a program write
    one resource. In a program that is read from the cache, collectives inside a loop have another
    resource than those around it (jaxlib 0.10.2), and the order is lost. An all-reduce of the
    batch's totals then runs alongside one inside the loop over microbatches, and the processes
    abort ("Received data size doesn't match expected size. Is there a distributed collective
    mismatch?").
    """
    if jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


def _join(place: Place, limits: dict[str, Any]) -> None:
    if place.process_id == 0:
        _require_free(place.coordinator)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        cluster_detection_method="deactivate",  # all is known, and no device is to be left out
        **limits,
    )


def _join_cluster(limits: dict[str, Any]) -> None:
    try:
        jax.distributed.initialize(**limits)
    except ValueError as error:
        raise ValueError(
            "--processes=auto reads SLURM, Open MPI, Cloud TPU, GKE or Kubernetes, or "
            f"{', '.join(VARIABLES)}: not all is there ({error}) Set the variables, pass "
            "--processes=N --process_id=I --coordinator=HOST:PORT, or run one process."
        ) from error


def _require_free(coordinator: str) -> None:
    """Refuses a port that is taken: JAX's service would crash on it."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(
                "Process 0 must listen on the coordinator's port: "
                f"--coordinator={coordinator}, and port {port} of this host cannot be used "
                f"({error.strerror}). Choose another in all processes."
            ) from error


def _require_equal_devices() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1 or len(counts) != jax.process_count():
        numbers = ", ".join(f"{index}: {count}" for index, count in sorted(counts.items()))
        raise ValueError(
            "All processes of a run must have the same number of devices: devices by process "
            f"{{{numbers}}}. Give each the same number (JAX_LOCAL_DEVICE_IDS chooses among a "
            "machine's GPUs, JAX_NUM_CPU_DEVICES makes CPU devices)."
        )


def _say(text: str) -> None:
    """Prints to standard error, in every process; other output comes only from process 0."""
    print(f"[{socket.gethostname()}] {text}", file=sys.stderr, flush=True)
