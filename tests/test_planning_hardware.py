"""Rates of devices: the table by name, the CPU by measurement."""

import types

import jax
import pytest

from moe_jax.planning import hardware


def device(kind, platform="tpu"):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
    ],
)
def test_the_longest_name_that_fits_counts(kind, teraflops):
    assert hardware.peak_flops(device(kind)) == teraflops * 1e12


def test_an_accelerator_that_is_not_known_has_no_rate():
    assert hardware.peak_flops(device("TPU v99")) is None
    assert hardware.peak_flops(device("NVIDIA T4", "gpu")) is None


def test_cpu_devices_share_what_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "measured_matmul_rate", lambda: 4e9)
    assert jax.local_device_count() == 8
    assert hardware.peak_flops() == 4e9 / 8


def test_the_best_of_repeated_matmuls_is_the_rate(monkeypatch):
    """By a clock that is made up: runs of 4, 2 and 8 seconds, then the time is over."""
    ticks = iter([0.0, 0.0, 0.0, 4.0, 4.0, 4.0, 6.0, 6.0, 6.0, 14.0, 20.0])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))
    assert hardware.measured_matmul_rate(size=8, seconds=15) == 2 * 8**3 / 2
