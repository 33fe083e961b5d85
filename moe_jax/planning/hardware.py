"""Published rates of accelerators, and the measured matmul rate of a CPU."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published facts of one chip (a GPU is one chip); every rate is per chip.

    Attributes:
      name: as in the name of a topology: "v5p", "h100".
      platform: "tpu" or "gpu".
      device_kinds: the `device_kind` of its JAX devices; compared in full, so that no other chip
        with a similar name gets its rates.
      devices: JAX devices per chip; each has an equal share of everything.
      flops: dense bfloat16 FLOP/s, without sparsity.
      hbm_bytes: memory.
      usable_hbm_bytes: memory that the compiler lets a program use.
      hbm_bandwidth: bytes/s between memory and chip.
      interconnect: bytes/s that the chip can send to chips of its slice (TPU) or node (GPU), over
        all its links, in one direction: half of a published bidirectional rate. A collective over
        one axis of a torus reaches only a part of it.
      network: bytes/s that it can send to other slices or nodes, in one direction.
      source: where the numbers are published.
      assumed: fields that no vendor publishes, and the reason for their values.
    """

    name: str
    platform: str
    device_kinds: tuple[str, ...]
    devices: int
    flops: float
    hbm_bytes: float
    usable_hbm_bytes: float
    hbm_bandwidth: float
    interconnect: float
    network: float
    source: str
    assumed: str = ""


CLOUD = "cloud.google.com/tpu/docs/"
OF_TPU = "usable_hbm_bytes is what libtpu 0.0.42.1 says when a program does not fit"
OF_GPU = "usable_hbm_bytes is 92 % of the memory: CUDA, NCCL and XLA's own need the rest"
USABLE = 0.92

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "tpu", ("TPU v4",), 1, 275e12, 32 * GIB, 30.75 * GIB, 1200e9, 300e9, 6.25e9,
            CLOUD + "v4 (275 TFLOP/s, 32 GiB, 1,200 GB/s); interconnect: Jouppi et al. 2023, "
            "arXiv:2304.01433, table 4 (6 links of 50 GB/s)",
            OF_TPU + "; network is that of v5p",
        ),
        Chip(
            "v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 1, 197e12, 16 * GIB, 15.75 * GIB, 819e9,
            200e9, 3.125e9,
            CLOUD + "v5e (197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s both directions, 6.4 Tbit/s "
            "network a pod of 256)",
            OF_TPU,
        ),
        Chip(
            "v5p", "tpu", ("TPU v5", "TPU v5p"), 1, 459e12, 95 * GIB, 95.74 * GIB, 2765e9, 600e9,
            6.25e9,
            CLOUD + "v5p (459 TFLOP/s, 95 GiB, 2,765 GB/s, 1,200 GB/s both directions, 50 Gbit/s "
            "network)",
            OF_TPU,
        ),
        Chip(
            "v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 1, 918e12, 32 * GIB, 31.25 * GIB, 1638e9,
            400e9, 12.5e9,
            CLOUD + "tpu7x (918 TFLOP/s, 32 GiB, 1,638 GB/s, 800 GB/s both directions, 100 Gbit/s "
            "network)",
            OF_TPU,
        ),
        Chip(
            "tpu7x", "tpu", ("TPU7x",), 2, 2307e12, 192 * GIB, 2 * 94.75 * GIB, 7380e9, 600e9,
            12.5e9,
            CLOUD + "tpu7x (2,307 TFLOP/s, 192 GiB, 7,380 GB/s, 1,200 GB/s both directions, "
            "100 Gbit/s network; a chip is two devices)",
            OF_TPU,
        ),
        Chip(
            "a100", "gpu", ("NVIDIA A100-SXM4-80GB",), 1, 312e12, 80e9, USABLE * 80e9, 2039e9,
            300e9, 25e9,
            "NVIDIA A100 80GB SXM data sheet (312 TFLOP/s, 80 GB, 2,039 GB/s, NVLink 600 GB/s both "
            "directions); DGX A100: one 200 Gbit/s InfiniBand card a GPU",
            OF_GPU,
        ),
        Chip(
            "h100", "gpu", ("NVIDIA H100 80GB HBM3",), 1, 989.4e12, 80e9, USABLE * 80e9, 3350e9,
            450e9, 50e9,
            "NVIDIA H100 SXM data sheet (1,979 TFLOP/s with sparsity, half without; 80 GB, "
            "3.35 TB/s, NVLink 900 GB/s both directions); DGX H100: one 400 Gbit/s card a GPU",
            OF_GPU,
        ),
        Chip(
            "h200", "gpu", ("NVIDIA H200", "NVIDIA H200 141GB HBM3e"), 1, 989.4e12, 141e9,
            USABLE * 141e9, 4800e9, 450e9, 50e9,
            "NVIDIA H200 SXM data sheet (1,979 TFLOP/s with sparsity, half without; 141 GB, "
            "4.8 TB/s, NVLink 900 GB/s both directions); DGX H200: one 400 Gbit/s card a GPU",
            OF_GPU,
        ),
        Chip(
            "b200", "gpu", ("NVIDIA B200",), 1, 2250e12, 180e9, USABLE * 180e9, 8000e9, 900e9, 50e9,
            "NVIDIA DGX B200 data sheet, an eighth of it (2.25 PFLOP/s without sparsity, 1,440 GB, "
            "64 TB/s, NVLink 14.4 TB/s both directions, one 400 Gbit/s card a GPU)",
            OF_GPU,
        ),
    )
}  # fmt: skip

# Devices with the FLOP rate of a chip in the table, but another memory.
SAME_FLOPS = {"NVIDIA A100-SXM4-40GB": "a100"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this `device_kind`, or None if the table does not have it."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def peak_flops(device: jax.Device | None = None) -> float | None:
    """FLOP/s that one device can reach in matmuls.

    Args:
      device: the device; None: the first one.

    Returns:
      The published bfloat16 rate of an accelerator; for the CPU, the float32 rate measured once per
      process (half a second), divided by the number of devices, which share its cores; None for an
      accelerator that is not in the table.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return cpu_rate() / jax.local_device_count()
    kind = device.device_kind
    chip = CHIPS[SAME_FLOPS[kind]] if kind in SAME_FLOPS else chip_of(kind)
    return None if chip is None else chip.flops / chip.devices


@functools.cache
def cpu_rate() -> float:
    """`measured_matmul_rate` of this process, measured at the first call."""
    return measured_matmul_rate()


def measured_matmul_rate(size: int = 2048, seconds: float = 0.5) -> float:
    """FLOP/s of a float32 matmul of `size`^3 on the default device: the best of repeated runs."""
    a = jnp.ones((size, size), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    matmul(a, a).block_until_ready()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        matmul(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
