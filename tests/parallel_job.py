"""A command as several processes on this machine, for tests that watch, signal and kill them."""

import os
import socket
import subprocess
import sys
import time

from tests.tiny_run import CACHE, ROOT

# Two processes start, compile and train in about twenty seconds; the margin is for a busy machine.
LIMIT_SECONDS = 300


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Job:
    """Processes that run one command. Their output goes to files, so a full pipe never blocks them.

    Args:
      directory: folder for the output.
      count: number of processes.
      devices: CPU devices per process.
      module: name of the command's module in moe_jax.
      *arguments: arguments of the command.
      last: extra arguments for the last process.
    """

    def __init__(self, directory, count, devices, module, *arguments, last=()):
        self.commands = []
        for index in range(count):
            place = [f"--processes={count}", f"--process_id={index}"] if count > 1 else []
            self.commands.append(
                [sys.executable, "-m", f"moe_jax.{module}", *arguments, *place]
                + (list(last) if index == count - 1 else [])
            )
        if count > 1:
            port = free_port()
            for command in self.commands:
                command.append(f"--coordinator=localhost:{port}")
        self._directory = directory
        self.processes = []
        for index, command in enumerate(self.commands):
            with self._file(index, "out").open("w") as out, self._file(index, "err").open("w") as e:
                self.processes.append(
                    subprocess.Popen(
                        command, stdout=out, stderr=e, cwd=ROOT, env=environment(devices)
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()

    def _file(self, index, name):
        return self._directory / f"process_{index}.{name}"

    def printed(self, index):
        """Standard output of a process, without gloo's own messages."""
        lines = self._file(index, "out").read_text().splitlines()
        return "\n".join(line for line in lines if "peer ranks" not in line)

    def said(self, index):
        """Output and errors of a process."""
        return self.printed(index) + "\n" + self._file(index, "err").read_text()

    def wait(self):
        """Waits until all have ended; returns the exit codes."""
        return [process.wait(timeout=LIMIT_SECONDS) for process in self.processes]

    def succeed(self):
        codes = self.wait()
        assert not any(codes), "\n".join(self.said(index) for index in range(len(codes)))

    def wait_until(self, condition):
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self.said(index)
            assert time.monotonic() < deadline, self.said(0)
            time.sleep(0.005)


def environment(devices):
    # Reuse programs that an earlier process compiled.
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
