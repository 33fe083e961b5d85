"""A step's memory is counted before the step starts; running out is reported in one line."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import MeshConfig
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training import memory
from moe_jax.training.loop import train
from moe_jax.training.memory import (
    PROFILE_FILE,
    available_bytes,
    check_memory,
    in_units,
    needed_bytes,
    out_of_memory_explained,
)
from moe_jax.training.placement import new_state
from tests.tiny_run import tiny_config

ONE = MeshConfig(data=1)
MIXED = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


def bytes_on_a_device(tree):
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("mesh", [ONE, MIXED], ids=["one device", "eight devices"])
def test_the_bytes_of_the_state_are_those_of_its_arrays(mesh):
    config = dataclasses.replace(tiny_config({"training": {"batch_size": 8}}), mesh=mesh)
    devices = make_mesh(mesh)
    needed, state = needed_bytes(config, devices), new_state(config, devices)
    assert needed["parameters"] == needed["gradients"] == bytes_on_a_device(state.params)
    assert needed["optimizer"] == bytes_on_a_device(state.opt_state)
    sequences, vocab = (8, 384) if mesh == ONE else (2, 192)
    assert needed["logits"] == sequences * 16 * vocab * 4


def test_microbatches_have_fewer_logits_and_keep_a_sum_of_gradients():
    one, two = (
        needed_bytes(tiny_config({"training": {"num_microbatches": n}}), make_mesh(ONE))
        for n in (1, 2)
    )
    assert two["logits"] == one["logits"] / 2 and two["gradients"] == 2 * one["gradients"]


def test_the_memory_of_a_cpu_is_shared_by_its_devices():
    assert 2**28 < available_bytes(make_mesh(ONE)) < 2**50
    assert available_bytes(make_mesh(MIXED)) == available_bytes(make_mesh(ONE)) // 8


def test_a_device_that_does_not_say_its_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda mesh: None)
    check_memory(tiny_config({"model": {"model_dim": 10**8}}), make_mesh(ONE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {"model_dim": 10**8}},
            r"parameters 386\.3 GiB, optimizer 772\.6 GiB, gradients 386\.3 GiB, .* on one device "
            r"of .*\. For the state, split it by mesh\.fsdp .*largest array: embedding \(384, 1000",
        ),
        (
            {"model": {"parts": {"moe": {"expert_dim": 10**9}}}},
            r"largest array: stack/unit/0/moe/experts/wi \(2, 4, 16, 1000000000\)",
        ),
        (
            {"training": {"batch_size": 10**8}},
            r"logits 2\.2 TiB, .*\. Lower training\.batch_size \(now 100000000\), or raise training"
            r"\.num_microbatches \(now 1\), or raise training\.logits_chunks \(now 1\), or lower",
        ),
        (
            {"data": {"sequence_length": 10**9}},
            r"GiB\. Lower data\.sequence_length \(now 1000000000\), or raise training\.logits_chu"
            r"nks \(now 1\): the logits of one sequence are 1\.4 TiB\.$",
        ),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        train(tiny_config(settings), tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def out_of_memory():
    return jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.\nBuffers:\n..."
    )


def test_running_out_of_memory_is_one_line_with_what_takes_it(tmp_path):
    config = tiny_config({"training": {"num_microbatches": 2}})
    held = jnp.ones(1000)
    with (
        pytest.raises(MemoryError) as error,
        out_of_memory_explained(config, make_mesh(ONE), tmp_path),
    ):
        raise out_of_memory()
    message = str(error.value)
    assert "\n" not in message and held.size == 1000
    assert re.search(
        r"ran out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes; it needs "
        r"parameters .* KiB, optimizer .* KiB, gradients .* KiB, logits .* KiB, and activations, "
        r"on one device of .*\. For activations, raise training\.num_microbatches \(now 2\), .*"
        r"For the state, split it by mesh\.fsdp",
        message,
    )
    assert f"{tmp_path / PROFILE_FILE} (pprof)" in message
    assert (tmp_path / PROFILE_FILE).stat().st_size > 0


def test_remedies_that_are_taken_already_are_not_named(tmp_path):
    config = tiny_config({"training": {"num_microbatches": 4}, "model": {"remat": "full"}})
    context = out_of_memory_explained(config, make_mesh(ONE), tmp_path / "absent")
    with pytest.raises(MemoryError, match="For activations, lower training") as error:
        with context:
            raise out_of_memory()
    assert "pprof" not in str(error.value), "the folder is not there"


def test_another_error_stays_what_it_is(tmp_path):
    context = out_of_memory_explained(tiny_config(), make_mesh(ONE), tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError, match="collective"), context:
        raise jax.errors.JaxRuntimeError("INTERNAL: collective timed out")


def test_sizes_are_said_in_units():
    sizes = (0, 1023, 1024, 3 * 2**30 // 2, 2**60)
    assert [in_units(size) for size in sizes] == [
        "0.0 B", "1023.0 B", "1.0 KiB", "1.5 GiB", "1024.0 PiB",
    ]  # fmt: skip
