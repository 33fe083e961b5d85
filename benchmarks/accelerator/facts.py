"""The machine: device, versions, and the rates of matmuls and of memory."""

import functools
import importlib.metadata
import pathlib
import platform
import shutil
import statistics
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.attention import refusal
from benchmarks.accelerator.clock import Timed, compiled, in_turn, matmul_program, spread
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.kernels import attention_kernels, grouped_kernels
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS, plan_experts
from moe_jax.planning.hardware import peak_flops

PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "libtpu", "flax", "optax", "numpy", "torch", "transformers", "triton",
    "tokamax",
)  # fmt: skip
SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.sm,clocks.max.sm,"
       "power.draw,power.limit,temperature.gpu", "--format=csv,noheader")  # fmt: skip


def rows(dry: bool) -> list[Row]:
    """The rows; the device is first: without it nothing is measured."""
    if not dry and jax.default_backend() == "cpu":
        return [Row("device", 8, device, first=True)]  # the run ends here
    sizes = (64, 128) if dry else (8192, 4096, 16384)
    wanted: list[tuple[str, int, str | None]] = [("bfloat16", size, None) for size in sizes]
    wanted += [("float32", sizes[0], None), ("float32", sizes[0], "highest")]
    return [
        Row("device", 8, device, first=True),
        *(
            Row(
                f"matmul {dtype} {size}" + (f" {precision}" if precision else ""),
                5,
                functools.partial(matmul_rate, dtype, size, precision, dry),
                first=(dtype, size, precision) == wanted[0],
            )
            for dtype, size, precision in wanted
        ),
        Row("kernels", 2, kernels, first=True),
        Row("copy", 3, functools.partial(copy_rate, 1 << 16 if dry else 1 << 30, dry), first=True),
    ]


def device() -> dict[str, Any]:
    """The device and its versions, from JAX, the driver and the packages."""
    [first, *others] = jax.devices()
    memory = first.memory_stats() or {}
    return {
        "platform": "gpu" if first.platform in ("cuda", "rocm", "gpu") else first.platform,
        "kind": first.device_kind,
        "devices": 1 + len(others),
        "memory_gb": round(memory.get("bytes_limit", 0) / 1e9, 1),
        "peak_tflops": (peak_flops(first) or 0) / 1e12 if first.platform != "cpu" else 0,
        "versions": versions(),
        "python": platform.python_version(),
        "runtime": str(getattr(first.client, "platform_version", "")).splitlines(),
        "card": said_by(SMI),
        "cpu": cpu_name(),
    }


def kernels() -> dict[str, Any]:
    """The library's kernels: which can run here, why others cannot, and what "auto" selects."""
    plans = {}
    for way in IMPLEMENTATIONS:
        try:
            plans[way] = str(plan_experts(MoE(run_experts=way)))
        except ValueError as error:
            plans[way] = str(error)
    attention = {kernel: refusal(kernel) for kernel in attention_kernels()}
    return {"grouped": grouped_kernels(), "attention": attention, "plans": plans}


def versions() -> dict[str, str]:
    """Versions of the installed packages in `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def said_by(command: tuple[str, ...]) -> str:
    """The first line that a command prints; "" if there is no command or it times out."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return (said.stdout.splitlines() or [""])[0]


def cpu_name() -> str:
    """The number and name of the CPUs, from Linux."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def matmul_rate(dtype: str, size: int, precision: str | None, dry: bool) -> dict[str, Any]:
    """TFLOP/s of a square matmul of random numbers."""
    program, flops = matmul_program(size, jnp.dtype(dtype), precision)
    seconds = in_turn({"matmul": program.timed}, dry)["matmul"]
    return {"tflops": flops / statistics.median(seconds) / 1e12, **spread(seconds)}


def copy_rate(size: int, dry: bool) -> dict[str, Any]:
    """GB/s of adding 1 to an array of `size` bytes: read once, written once."""
    x = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
    timed: Timed = compiled(lambda x: x + 1, x).timed
    seconds = in_turn({"copy": timed}, dry)["copy"]
    return {"gb_per_s": 2 * size / statistics.median(seconds) / 1e9, **spread(seconds)}
