"""Names of machines: what is read, and what is refused before a compiler ends the process."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import pytest

from moe_jax.planning import gpu_targets, topology
from moe_jax.planning.hardware import CHIPS
from moe_jax.planning.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "chips", "devices", "island"),
    [
        ("v5p:8x16x16", 2048, 2048, 2048),
        ("v5p:16x16x24", 6144, 6144, 6144),
        ("v5e:4x4", 16, 16, 16),
        ("v6e:8x8", 64, 64, 64),
        ("V5E:1x1", 1, 1, 1),
        ("tpu7x:4x4x4", 64, 128, 128),  # a chip is two devices
        ("v4:2x2x1", 4, 4, 4),  # a chip's two cores are one device
        ("2*v5e:16x16", 512, 512, 256),
        ("h100:8", 8, 8, 8),
        ("h100:4x8", 32, 32, 8),
        ("b200:1", 1, 1, 1),
    ],
)
def test_sizes_follow_from_the_name_alone(name, chips, devices, island):
    machine = parse_topology(name)
    assert (machine.num_chips, machine.num_devices) == (chips, devices)
    assert machine.devices_per_island == island


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "a topology must be CHIP:SHAPE"),
        ("v5p", "a topology must be CHIP:SHAPE"),
        ("v5p:4x4x", "a topology must be CHIP:SHAPE"),
        ("v5p:-4x4x4", "a topology must be CHIP:SHAPE"),
        ("v5p-256", "Write it like v5p:4x4x8: v5p-256 counts cores, 2 a chip, and has 128 chips."),
        ("V4-8", "Write it like v4:2x2x1: V4-8 counts cores, 2 a chip, and has 4 chips."),
        ("v5p-2048", "v5p:8x8x16: "),  # Cloud TPU's own shape of 1,024 chips
        ("v5litepod-16", "Write it like v5e:4x4: v5litepod-16 counts chips."),
        ("v6e-256", "Write it like v6e:16x16: "),
        ("v5p-7", "Write it like v5p:8x16x16, 2"),
        ("v5litepod:4x4", "v5litepod is v5e"),
        ("v9:4x4", "must be one of"),
        ("v5e:32x32", r"such as 2\*v5e:16x16"),  # the compiler would abort the process
        ("v5e:16x20", "a v5e slice has two dims"),
        ("v5e:4x4x4", "a v5e slice has two dims"),
        ("v5e:8x4", "two dims, in ascending order: .*Write v5e:4x8"),
        ("2*v5e:8x4", r"Write 2\*v5e:4x8"),
        ("v5p:1x2x2", "Write v5p:2x2x1"),
        ("v5p:24x24x24", r"Take several slices, such as 2\*v5p:8x16x16"),
        ("v5p:4x4", "The next whole cubes are v5p:4x4x4"),
        ("v5p:3x4x4", "The next whole cubes are v5p:4x4x4"),
        ("v5p:8x4x4", "in ascending order"),
        ("v5p:16x16x28", "6144 chips at most"),
        ("v5p:0x4x4", "multiples of 4"),
        ("0*v5e:4x4", "1 to 64 slices"),
        ("100*v5e:4x4", "1 to 64 slices"),
        ("h100:16", "1 to 8 GPUs a node"),
        ("h100:0", "1 to 8 GPUs a node"),
        ("h100:2x4x8", "CHIP:NODESxGPUS"),
        ("2*h100:8", "CHIP:NODESxGPUS"),
    ],
)
def test_what_does_not_exist_is_refused_with_rule_value_and_fix(name, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_topology(name)
    assert not name or repr(name) in str(error.value) or repr(name.split(":")[0]) in str(error)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "cuda")])
def test_without_the_compiler_the_error_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"pip install .*\[{extra}\]'"):
        topology.devices(parse_topology(name))


def test_the_compiler_of_either_cuda_will_do(monkeypatch):
    installed = {"jax_cuda13_plugin": object()}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    asked = {}
    monkeypatch.setattr(
        topology.topologies,
        "get_topology_desc",
        lambda **given: types.SimpleNamespace(devices=asked.update(given) or ["a device"]),
    )
    assert topology.devices(parse_topology("h100:8")) == ["a device"]
    assert asked["platform"] == "cuda"


@pytest.mark.parametrize("chip", [c for c in CHIPS.values() if c.platform == "gpu"], ids=str)
def test_every_gpu_has_a_target_for_the_compiler(chip):
    text = gpu_targets.target_config(chip)
    assert text.count("{") == text.count("}") == 3
    assert f"device_memory_size: {round(chip.hbm_bytes)}\n" in text
    assert gpu_targets.PROCESSORS[chip.name].kind in chip.device_kinds


@pytest.mark.parametrize(
    ("installed", "written"),
    [
        ({"nvidia-cudnn-cu12": "9.28.0.42"}, "major: 9 minor: 28 patch: 0"),
        ({"nvidia-cudnn-cu13": "9.31"}, "major: 9 minor: 31 patch: 0"),
        ({}, "major: 9 minor: 10 patch: 0"),
    ],
)
def test_the_compiler_is_told_of_the_installed_cudnn(installed, written, monkeypatch):
    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert f"dnn_version_info {{ {written} }}" in gpu_targets.target_config(CHIPS["h100"])
    assert ("assumed" in gpu_targets.cudnn_text()) == (not installed)


def ahead_of_time(names):
    """Numbers and kinds of devices, found in another process to keep compilers out of this one."""
    code = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from moe_jax.planning.topology import devices, parse_topology\n"
        f"for name in {list(names)}:\n"
        "    found = devices(parse_topology(name))\n"
        "    print(name, len(found), found[0].device_kind, sep='|')\n"
        "assert jax.default_backend() == 'cpu'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "names"),
    [
        (
            "libtpu",
            ["v4:2x2x1", "v5e:1x1", "v5e:16x16", "2*v5e:4x4", "v5p:8x16x16", "v6e:8x8",
             "tpu7x:4x4x4", "v6e:1x1"],
        ),
        ("jax_cuda12_plugin", ["a100:8", "h100:8", "h100:2x8", "h200:1", "b200:4x8"]),
    ],
)  # fmt: skip
def test_the_compiler_knows_these_machines_by_the_same_sizes(package, names):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    for name, count, kind in ahead_of_time(names):
        machine = parse_topology(name)
        assert int(count) == machine.num_devices
        assert kind in machine.chip.device_kinds
