"""What the GPU compiler asks about an absent GPU, as text of its GpuTargetConfigProto."""

import dataclasses
import importlib.metadata
import re

from moe_jax.planning.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Processor:
    """Properties of a GPU that `hardware.Chip` lacks.

    Attributes:
      kind: the name of its devices.
      capability: CUDA compute capability, (major, minor).
      cores: streaming multiprocessors.
      l2_bytes: second-level cache.
      shared_bytes: shared memory of a multiprocessor.
      clock_ghz: boost clock.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    l2_bytes: int
    shared_bytes: int
    clock_ghz: float


MIB, KIB = 1024**2, 1024
# From NVIDIA's architecture white papers (Ampere, Hopper, Blackwell) and the CUDA C++ programming
# guide, table of technical specifications per compute capability.
PROCESSORS = {
    "a100": Processor("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 * MIB, 164 * KIB, 1.41),
    "h100": Processor("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 * MIB, 228 * KIB, 1.98),
    "h200": Processor("NVIDIA H200", (9, 0), 132, 50 * MIB, 228 * KIB, 1.98),
    "b200": Processor("NVIDIA B200", (10, 0), 148, 126 * MIB, 228 * KIB, 1.965),
}
CUDNN_PACKAGES = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
CUDNN = (9, 10, 0)  # assumed if none is installed: excludes kernels of newer versions
# Same for all of these compute capabilities; a block may use all shared memory except 1 KiB.
TEMPLATE = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_optin}
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
device_description_str: "{kind}"
"""


def target_config(chip: Chip) -> str:
    """The text that describes a GPU to the compiler."""
    processor = PROCESSORS[chip.name]
    major, minor = processor.capability
    return TEMPLATE.format(
        shared_optin=processor.shared_bytes - KIB,
        shared=processor.shared_bytes,
        cores=processor.cores,
        fpus=64 if major == 8 else 128,
        bandwidth=round(chip.hbm_bandwidth),
        l2=processor.l2_bytes,
        clock=processor.clock_ghz,
        memory=round(chip.hbm_bytes),
        major=major,
        minor=minor,
        kind=processor.kind,
        dnn=cudnn_version() or CUDNN,
    )


def cudnn_text() -> str:
    """The cuDNN version that the compiler is given."""
    version, installed = cudnn_version() or CUDNN, cudnn_version() is not None
    text = f"cuDNN {'.'.join(map(str, version))}"
    return f"{text}, which is installed" if installed else f"{text} is assumed: none is installed"


def cudnn_version() -> tuple[int, ...] | None:
    """Major, minor and patch of the installed cuDNN, which programs will use; None without one."""
    for package in CUDNN_PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = [int(digits) for digits in re.findall(r"\d+", version)]
        return tuple([*numbers, 0, 0][:3])
    return None
