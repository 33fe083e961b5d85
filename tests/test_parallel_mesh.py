"""Meshes from configs: inferred sizes, refused sizes, and arrays of devices."""

import dataclasses
import itertools
import logging
import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from moe_jax.config import MeshConfig, from_config_dict
from moe_jax.parallel import mesh as mesh_module
from moe_jax.parallel.mesh import arrange, describe_mesh, make_mesh
from moe_jax.parallel.rules import named_sharding, num_shards

NUM_DEVICES = 8


def test_by_default_every_device_has_a_copy_of_the_model():
    assert MeshConfig().fill(6) == MeshConfig(data=6)
    assert MeshConfig().fill(1) == MeshConfig(data=1)


@pytest.mark.parametrize(
    ("settings", "num_devices", "left"),
    [
        ({"data": -1, "expert": 4}, 8, {"data": 2}),
        ({"data": 1, "fsdp": -1}, 8, {"fsdp": 8}),
        ({"data": 2, "expert": -1, "tensor": 2}, 8, {"expert": 2}),
        ({"data": 1, "fsdp": 2, "tensor": -1}, 8, {"tensor": 4}),
        ({"slices": 2, "data": 1, "expert": -1}, 8, {"expert": 4}),
        ({"data": -1, "fsdp": 2, "expert": 2, "tensor": 2}, 8, {"data": 1}),
        ({"slices": 4, "data": 3, "fsdp": 5, "expert": -1}, 420, {"expert": 7}),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(settings, num_devices, left):
    filled = MeshConfig(**settings).fill(num_devices)
    assert filled == MeshConfig(**(settings | left))
    assert filled.num_devices == num_devices
    assert filled.fill(num_devices) == filled


def test_a_mesh_without_minus_one_may_leave_devices_unused():
    config = MeshConfig(data=1, expert=2)
    assert config.fill(8) is config
    assert config.num_devices == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slices": 0}, r"slices lies in \[1, inf\): slices=0\. The default is 1"),
        ({"slices": -1}, r"slices lies in \[1, inf\): slices=-1\."),
        ({"data": 0}, r"at least 1, or -1 for .*: mesh\.data=0, mesh\.fsdp=1"),
        ({"fsdp": -2}, r"fsdp lies in \[-1, .*: fsdp=-2"),
        ({"expert": 0}, r"at least 1, or -1 .*mesh\.expert=0"),
        ({"tensor": 0}, r"at least 1, or -1 .*mesh\.tensor=0\. Correct"),
        (
            {"data": -1, "expert": -1},
            r"one size of the mesh may be -1: mesh\.data=-1, mesh\.fsdp=1, mesh\.expert=-1, .*Set",
        ),
    ],
)
def test_sizes_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**settings)
    with pytest.raises(ValueError, match=rf"^config\.mesh: .*{message}"):
        from_config_dict({"mesh": settings})


@pytest.mark.parametrize(
    ("settings", "num_devices", "message"),
    [
        (
            {"data": 2, "expert": 8},
            8,
            r"more devices than there are: slices=1, data=2, .*tensor=1 need 16, there are 8\. "
            r"Lower a size of the mesh, or set one to -1",
        ),
        (
            {"expert": 3},
            8,
            r"divide the number of devices: slices=1, data=-1, .*: 3 does not divide 8\. Change",
        ),
        ({"slices": 2, "fsdp": 8}, 8, r"16 does not divide 8\. Change a size of the mesh\."),
        ({"expert": 3}, 1, r"3 does not divide 1\. Change .*; JAX_NUM_CPU_DEVICES=3 makes as many"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(settings, num_devices, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**settings).fill(num_devices)


def test_axes_of_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    expected = {"slice": 1, "data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert list(mesh.shape.items()) == list(expected.items())
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_the_outermost_axis_says_whether_experts_span_slices():
    mesh = make_mesh(MeshConfig(slices=2, data=1, expert=4, experts_span_slices=True))
    assert mesh.axis_names == ("expert_slice", "data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == (2, 1, 1, 4, 1)


def test_neighbours_are_under_tensor_then_expert_then_fsdp_then_data():
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    ids = [device.id for device in jax.devices()]
    np.testing.assert_array_equal(
        np.vectorize(lambda device: device.id)(mesh.devices),
        np.array(ids).reshape(1, 2, 1, 2, 2),
    )


def test_a_smaller_mesh_takes_the_first_devices():
    mesh = make_mesh(MeshConfig(data=1, fsdp=3))
    assert list(mesh.devices.flat) == jax.devices()[:3]


def test_other_devices_than_all_can_be_given():
    devices = jax.devices()[5:1:-1]
    assert list(make_mesh(MeshConfig(expert=2), devices).devices.flat) == devices


def test_several_processes_use_all_their_devices():
    """A process without a device of the mesh would have nothing to run."""
    message = r"must use all their devices: the mesh has 4 of 8\. Set one of its sizes to -1"
    with mock.patch.object(jax, "process_count", lambda: 2):
        with pytest.raises(ValueError, match=message):
            make_mesh(MeshConfig(data=4))
        assert make_mesh(MeshConfig(data=8)).size == NUM_DEVICES


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"data": 1}, "mesh: one device (1 of 8 cpu device)"),
        ({"data": 1, "expert": 8}, "mesh: expert=8 (8 cpu devices)"),
        ({"data": 2, "tensor": 2}, "mesh: data=2, tensor=2 (4 of 8 cpu devices)"),
        (
            {"slices": 2, "data": 1, "expert": 4, "experts_span_slices": True},
            "mesh: expert_slice=2, expert=4 (8 cpu devices)",
        ),
    ],
)
def test_a_mesh_in_a_line(settings, line):
    assert describe_mesh(make_mesh(MeshConfig(**settings))) == line


def all_meshes():
    """Every way to arrange eight devices."""
    for slices, data, fsdp, expert in itertools.product((1, 2, 4, 8), repeat=4):
        tensor, rest = divmod(NUM_DEVICES, slices * data * fsdp * expert)
        if rest == 0:
            for span in (False, True):
                yield MeshConfig(slices, data, fsdp, expert, tensor, span)


def test_shards_of_the_config_are_those_that_jax_makes():
    configs = list(all_meshes())
    assert len(configs) == 2 * 35
    for config in configs:
        mesh = make_mesh(config)
        for name, shards in (("batch", config.batch_shards), ("expert", config.expert_shards)):
            assert num_shards(name, mesh) == shards
            indices = named_sharding((name,), mesh).devices_indices_map((NUM_DEVICES,))
            distinct = {index[0].indices(NUM_DEVICES) for index in indices.values()}
            assert len(distinct) == shards, (config, name)


def tpu_devices(num_slices=1):
    return [
        types.SimpleNamespace(platform="tpu", id=i, slice_index=i % num_slices)
        for i in range(NUM_DEVICES)
    ]


def test_on_a_tpu_the_torus_decides_where_neighbours_are():
    """One slice is one torus; with several, slices are the outermost axis."""
    config = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    with mock.patch.object(mesh_module, "mesh_utils") as mesh_utils:
        arranged = arrange(config, tpu_devices())
        assert arranged is mesh_utils.create_device_mesh.return_value
        assert mesh_utils.create_device_mesh.call_args.args[0] == (1, 1, 2, 2, 2)
        config = dataclasses.replace(config, slices=2, fsdp=1)
        arranged = arrange(config, tpu_devices(2))
        assert arranged is mesh_utils.create_hybrid_device_mesh.return_value
        within, across = mesh_utils.create_hybrid_device_mesh.call_args.args[:2]
        assert (within, across) == ((1, 1, 1, 2, 2), (2, 1, 1, 1, 1))


@pytest.mark.parametrize(("slices", "there"), [(1, 2), (2, 1), (4, 2)])
def test_slices_that_are_not_there_are_refused_before_anything_is_arranged(slices, there):
    config = MeshConfig(slices=slices, data=NUM_DEVICES // slices)
    with pytest.raises(ValueError, match=rf"slices: {slices}, .* are in {there}\. Set .*={there} "):
        arrange(config, tpu_devices(there))


def test_gpus_lie_by_their_ids_whatever_the_order_of_processes():
    dealt = [0, 4, 1, 5, 2, 6, 3, 7]
    devices = [types.SimpleNamespace(platform="gpu", id=i) for i in dealt]
    arranged = arrange(MeshConfig(data=1, fsdp=2, tensor=4), devices)
    assert [device.id for device in arranged.flat] == list(range(8))


@pytest.mark.parametrize("error", [NotImplementedError, AssertionError])
def test_a_torus_that_cannot_be_arranged_is_said_and_taken_in_order(caplog, error):
    devices = tpu_devices()
    with mock.patch.object(mesh_module, "mesh_utils") as mesh_utils:
        mesh_utils.create_device_mesh.side_effect = error("2x3 in 4x4")
        with caplog.at_level(logging.WARNING):
            arranged = arrange(MeshConfig(data=2, expert=4), devices)
    assert "order of the devices, not of the torus: 2x3 in 4x4" in caplog.text
    assert arranged.shape == (1, 2, 1, 4, 1)
    assert list(arranged.flat) == devices
