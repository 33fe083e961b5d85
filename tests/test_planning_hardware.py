"""Rates of devices: accelerators by table, the CPU by measurement."""

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
        ("TPU7x", 1153.5),  # half a chip
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
    ],
)
def test_a_device_has_the_published_rate_of_its_share_of_the_chip(kind, teraflops):
    assert hardware.peak_flops(device(kind)) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "TPU v99",
        "TPU v4 lite",  # not a TPU v4
        "TPU v5 litepod",
        "TPU v50",
        "NVIDIA H100 PCIe",  # slower than the SXM module
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of one
        "NVIDIA H200 NVL",
        "NVIDIA T4",
        "",
    ],
)
def test_a_device_that_only_sounds_alike_has_no_rate(kind):
    assert hardware.peak_flops(device(kind)) is None
    assert hardware.chip_of(kind) is None


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda chip: chip.name)
def test_every_chip_is_complete_and_plausible(chip):
    assert hardware.CHIPS[chip.name] is chip and chip.platform in ("tpu", "gpu")
    assert chip.source and chip.device_kinds
    assert all(hardware.chip_of(kind) is chip for kind in chip.device_kinds)
    assert 0.9 * chip.hbm_bytes < chip.usable_hbm_bytes < 1.01 * chip.hbm_bytes
    # Per byte, the network is slower than the interconnect, which is slower than memory.
    assert chip.network < chip.interconnect < chip.hbm_bandwidth < chip.flops / 100


def test_device_kinds_are_of_one_chip_only():
    kinds = [kind for chip in hardware.CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_cpu_devices_share_what_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_rate", lambda: 4e9)
    assert jax.local_device_count() == 8
    assert hardware.peak_flops() == 4e9 / 8


def test_the_best_of_repeated_matmuls_is_the_rate(monkeypatch):
    """With a made-up clock: runs of 4, 2 and 8 seconds, then the time is over."""
    ticks = iter([0.0, 0.0, 0.0, 4.0, 4.0, 4.0, 6.0, 6.0, 6.0, 14.0, 20.0])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))
    assert hardware.measured_matmul_rate(size=8, seconds=15) == 2 * 8**3 / 2
