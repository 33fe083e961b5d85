"""Matmul rates of devices: published for accelerators, measured for a CPU."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device as JAX counts devices, from the makers' data sheets:
# cloud.google.com/tpu/docs (v4: 275, v5e: 197, v5p: 459, v6e: 918 TFLOP/s a chip; a TPU7x chip has
# 2,307 and is two devices), nvidia.com (A100, H100 SXM, H200, B200 without sparsity).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device | None = None) -> float | None:
    """FLOP/s that one device can reach in matmuls.

    Args:
      device: the device; None: the first one.

    Returns:
      The published bfloat16 rate of an accelerator, the longest name that the device's kind starts
      with; for the CPU, whose devices share its cores, the float32 rate measured now (half a
      second) over their number; None for an accelerator that is not in the table.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return measured_matmul_rate() / jax.local_device_count()
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


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
