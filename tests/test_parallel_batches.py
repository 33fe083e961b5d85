"""Every row of a batch lies where its sharding says, whoever read it."""

import types
from unittest import mock

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.parallel import batches
from moe_jax.parallel.batches import from_shares, from_whole, host_share
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding

MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(slices=2, data=1, expert=2, tensor=2, experts_span_slices=True),
    MeshConfig(data=1, tensor=8),
    MeshConfig(data=1),
]


def share_of_process(config, devices, num_rows):
    """`host_share` in a process that has only some of the mesh's devices."""
    mesh = make_mesh(config)

    def as_seen_there(names, mesh):
        spans = named_sharding(names, mesh).devices_indices_map((num_rows,))
        mine = {device: spans[device] for device in mesh.devices.flat[devices]}
        return types.SimpleNamespace(addressable_devices_indices_map=lambda shape: mine)

    with mock.patch.object(batches, "named_sharding", as_seen_there):
        return host_share(mesh, num_rows)


@pytest.mark.parametrize("config", MESHES)
def test_a_single_process_reads_everything(config):
    assert host_share(make_mesh(config), 16) == (0, 1)


@pytest.mark.parametrize(
    ("config", "devices_each", "shares"),
    [
        (MeshConfig(data=8), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(data=8), 4, [(0, 2), (1, 2)]),
        (MeshConfig(data=2, expert=4), 4, [(0, 2), (1, 2)]),
        (MeshConfig(data=2, fsdp=2, expert=2), 1, [(h, 8) for h in range(8)]),
        # Under tensor, devices have the same rows: of a whole process, or of several.
        (MeshConfig(data=4, tensor=2), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(data=2, tensor=4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshConfig(data=1, tensor=8), 4, [(0, 1), (0, 1)]),
        (MeshConfig(slices=2, data=1, fsdp=2, expert=2), 4, [(0, 2), (1, 2)]),
    ],
)
def test_each_of_several_processes_reads_the_rows_of_its_devices(config, devices_each, shares):
    for process, share in enumerate(shares):
        devices = slice(process * devices_each, (process + 1) * devices_each)
        assert share_of_process(config, devices, 16) == share


@pytest.mark.parametrize(
    ("devices", "spans"),
    [
        ([0, 4], r"\[\(0, 2\), \(8, 10\)\]"),  # not one after the other
        ([1, 2], r"\[\(2, 4\), \(4, 6\)\]"),  # the others could not have as many each
        ([0, 1, 2], r"\[\(0, 2\), \(2, 4\), \(4, 6\)\]"),  # 6 do not divide 16
    ],
)
def test_rows_that_are_no_share_are_refused(devices, spans):
    message = rf"consecutive rows .*of 16 rows process 0 has {spans}\. Change the sizes"
    with pytest.raises(ValueError, match=message):
        share_of_process(MeshConfig(data=8), devices, 16)


def test_rows_that_the_devices_do_not_share_evenly_are_refused():
    with pytest.raises(ValueError, match=r"partitioned 8 times, but the dimension size is 12"):
        host_share(make_mesh(MeshConfig(data=8)), 12)


def batch():
    """Two arrays in which every entry says where it was: microbatch, row, position."""
    return {
        "inputs": np.arange(2 * 8 * 3, dtype=np.int32).reshape(2, 8, 3),
        "loss_weights": -np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3),
    }


@pytest.mark.parametrize("make", [from_shares, from_whole])
@pytest.mark.parametrize("config", MESHES)
def test_every_device_has_its_rows(make, config):
    mesh = make_mesh(config)
    rows = 8 // config.batch_shards
    arrays = make(batch(), mesh, (None, "batch", None))
    assert set(arrays) == set(batch())
    for name, expected in batch().items():
        got = arrays[name]
        np.testing.assert_array_equal(got, expected, strict=True)
        shards = {shard.device: shard.data for shard in got.addressable_shards}
        assert set(shards) == set(mesh.devices.flat)
        # Neighbours in the mesh have neighbouring rows; those under tensor have the same.
        for place, device in enumerate(mesh.devices.flat):
            first = place // config.tensor * rows
            np.testing.assert_array_equal(shards[device], expected[:, first : first + rows])


def test_what_has_no_batch_dim_is_on_every_device():
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    whole = {"x": np.arange(5.0)}
    (array,) = from_whole(whole, mesh, (None,)).values()
    assert array.sharding.is_fully_replicated and len(array.addressable_shards) == 8
    np.testing.assert_array_equal(array, jax.numpy.arange(5.0))
