"""Places for parallel processes: each has a share of the cores or of the accelerators."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from moe_jax.config.check import require

ONE_CORE = "--xla_cpu_multi_thread_eigen=false"
# On a CPU, each step allocates its temporary arrays anew: huge pages mean fewer page faults.
ALLOCATOR, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
# The variable that determines which GPUs a process sees.
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "ROCR_VISIBLE_DEVICES"}
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
PROBE = """
import json, jax
version = jax.devices()[0].client.platform_version
print(json.dumps([jax.default_backend(), jax.local_device_count(), version]))
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The resources that processes share.

    Attributes:
      platform: "cpu", "cuda", "rocm", or another accelerator, such as "tpu".
      num_devices: accelerators; 0 on a CPU.
      cores: cores that this process may use; () if unknown.
    """

    platform: str
    num_devices: int
    cores: tuple[int, ...]

    def places(self, num_jobs: int, devices_per_job: int = 1) -> list["Place"]:
        """Makes `num_jobs` places; with 0, one per core, or as many as fit the GPUs.

        More jobs than GPUs share the GPUs and their memory. An accelerator that is not a GPU
        belongs to one process.

        Raises:
          ValueError: several jobs on an accelerator that belongs to one process.
        """
        is_gpu = self.platform in VISIBLE
        if self.platform != "cpu" and not is_gpu:
            require(num_jobs < 2, f"a {self.platform} belongs to one process",
                    f"--jobs={num_jobs}", "Use --jobs=1")  # fmt: skip
        if not num_jobs:
            num_jobs = len(self.cores) or os.cpu_count() or 1
            if self.platform != "cpu":
                num_jobs = max(1, self.num_devices // devices_per_job) if is_gpu else 1
        shares = [self.cores[place::num_jobs] if num_jobs > 1 else () for place in range(num_jobs)]
        if not is_gpu:
            return [Place(cores, self.num_devices) for cores in shares]
        variables = self._gpus_of(num_jobs)
        name = VISIBLE[self.platform]
        return [
            Place(cores, own[name].count(",") + 1, own)
            for cores, own in zip(shares, variables, strict=True)
        ]

    def _gpus_of(self, num_jobs: int) -> list[dict[str, str]]:
        """The variables that give each job its GPUs, and its share of a shared GPU's memory."""
        name = VISIBLE[self.platform]
        known = [one for one in os.environ.get(name, "").split(",") if one]
        names = known or [str(number) for number in range(self.num_devices)]
        if num_jobs <= len(names):
            each = len(names) // num_jobs
            return [{name: ",".join(names[i * each : (i + 1) * each])} for i in range(num_jobs)]
        fraction = 0.9 / -(-num_jobs // len(names))
        return [
            {name: names[place % len(names)], MEMORY: os.environ.get(MEMORY, f"{fraction:.2f}")}
            for place in range(num_jobs)
        ]


@dataclasses.dataclass(frozen=True)
class Place:
    """The resources of one of several processes.

    Attributes:
      cores: cores that it runs on; (): all.
      num_devices: accelerators that it sees; 0 on a CPU.
      variables: additions to its environment.
    """

    cores: tuple[int, ...] = ()
    num_devices: int = 0
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The environment of its process."""
        environment = {ALLOCATOR: HUGE_PAGES} | dict(os.environ) | dict(self.variables)
        if len(self.cores) == 1:
            add_xla_flag(environment, ONE_CORE)
        return environment

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context in which a started process inherits these cores."""
        if not self.cores or not hasattr(os, "sched_setaffinity"):
            yield
            return
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, own)


def this_machine(platform: str = "") -> Machine:
    """Detects this machine in a child process, so that this process takes no accelerator.

    Args:
      platform: value of JAX_PLATFORMS; "cpu" needs no child process.

    Raises:
      ValueError: JAX finds no device.
    """
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    if platform == "cpu":
        return Machine("cpu", 0, cores)
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    require(
        done.returncode == 0,
        "the runs of a sweep need a device",
        "JAX finds none: " + " ".join(done.stderr.splitlines()[-1:]),
        "Set JAX_PLATFORMS=cpu to use the CPU",
    )
    backend, count, version = json.loads(done.stdout.splitlines()[-1])
    if backend == "cpu":
        return Machine("cpu", 0, cores)
    if backend == "gpu":
        backend = "rocm" if "rocm" in version.lower() else "cuda"
    return Machine(backend, count, cores)


def add_xla_flag(environment: MutableMapping[str, str], flag: str) -> None:
    """Adds a compiler flag, which is read when the first array is made."""
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
