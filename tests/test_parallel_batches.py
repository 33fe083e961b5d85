"""Every row of a batch is on the devices of its sharding, whichever process read it."""

import importlib.util
import json
import subprocess
import sys
import types
from unittest import mock

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.parallel import batches
from moe_jax.parallel.batches import from_rows, from_whole, rows_of_process
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.planning import topology
from tests.tiny_run import ROOT

MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(slices=2, data=1, expert=2, tensor=2, experts_span_slices=True),
    MeshConfig(data=1, tensor=8),
    MeshConfig(data=1),
]


def rows_in(devices, mesh, num_rows):
    """`rows_of_process` in a process with only these devices of the mesh."""

    def as_seen_there(names, mesh):
        spans = named_sharding(names, mesh).devices_indices_map((num_rows,))
        mine = {device: spans[device] for device in devices}
        return types.SimpleNamespace(addressable_devices_indices_map=lambda shape: mine)

    with mock.patch.object(batches, "named_sharding", as_seen_there):
        return rows_of_process(mesh, num_rows)


def in_order(config, order):
    """A mesh of the CPU devices with these numbers, in this order."""
    return make_mesh(config, [jax.devices()[number] for number in order])


def hosts(num_devices_each):
    """Each process's devices: the first `num_devices_each`, the next ones, ..."""
    devices = jax.devices()
    return [devices[i : i + num_devices_each] for i in range(0, len(devices), num_devices_each)]


@pytest.mark.parametrize("config", MESHES)
def test_a_single_process_reads_everything(config):
    assert rows_of_process(make_mesh(config), 16) == list(range(16))


IN_LINE = range(8)
# Two hosts with 2 x 2 chips each, side by side: a row of the mesh crosses both (v5e).
BLOCKS = [0, 1, 4, 5, 2, 3, 6, 7]
# A ring crosses one half of a host, then the other host, then the other half (v6e).
RING = [0, 1, 4, 5, 6, 7, 2, 3]
# Neighbours are never on one host.
ALTERNATING = [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("config", "order", "devices_each", "rows"),
    [
        (MeshConfig(data=8), IN_LINE, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (MeshConfig(data=2, fsdp=2, expert=2), IN_LINE, 2, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (MeshConfig(slices=2, data=1, fsdp=2, expert=2), IN_LINE, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (MeshConfig(data=8), BLOCKS, 4, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (MeshConfig(data=1, fsdp=2, expert=4), BLOCKS, 4, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (MeshConfig(data=8), RING, 4, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        (MeshConfig(data=8), ALTERNATING, 2, [[0, 2], [4, 6], [1, 3], [5, 7]]),
        # Devices along tensor have the same rows, in one process or in several.
        (MeshConfig(data=4, tensor=2), IN_LINE, 2, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (MeshConfig(data=2, tensor=4), IN_LINE, 2, [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2),
        (MeshConfig(data=4, tensor=2), BLOCKS, 4, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (MeshConfig(data=1, tensor=8), ALTERNATING, 4, [list(range(8))] * 2),
        # Processes may share some rows, and may have unequal numbers of rows.
        (MeshConfig(data=4, tensor=2), [0, 1, 2, 4, 5, 6, 3, 7], 4,
         [[0, 1, 2, 3, 6, 7], [2, 3, 4, 5, 6, 7]]),
        (MeshConfig(data=4, tensor=2), [0, 4, 1, 5, 2, 3, 6, 7], 4,
         [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]]),
        (MeshConfig(data=4, tensor=2), [0, 2, 1, 3, 4, 5, 6, 7], 2,
         [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5], [6, 7]]),
    ],
)  # fmt: skip
def test_each_process_reads_the_rows_of_its_devices_and_puts_them_there(
    config, order, devices_each, rows
):
    mesh, num_rows = in_order(config, order), 8
    got = [rows_in(devices, mesh, num_rows) for devices in hosts(devices_each)]
    assert got == rows
    assert set().union(*got) == set(range(num_rows))
    for devices, mine in zip(hosts(devices_each), got, strict=True):
        read = {name: value[:, mine] for name, value in batch().items()}

        def put(shape, sharding, held, devices=devices):
            where = sharding.devices_indices_map(shape)
            return shape, [(index, held(index)) for index in map(where.get, devices)]

        with mock.patch.object(jax, "make_array_from_callback", put):
            placed = from_rows(read, mine, num_rows, mesh, (None, "batch", None))
        for name, whole in batch().items():
            shape, shards = placed[name]
            assert shape == whole.shape
            for index, shard in shards:
                np.testing.assert_array_equal(shard, whole[index], strict=True)


# Found with libtpu 0.0.42.1: rows of the first host. Each host has 2 x 2 chips of a torus.
PODS = [
    ("v5e:16x16", {"data": 256}, [0, 1, 16, 17]),
    ("v5e:16x16", {"data": 1, "fsdp": 256}, [0, 1, 16, 17]),
    ("v5e:16x16", {"data": 1, "fsdp": 32, "expert": 8}, [0, 1, 8, 9]),
    ("v5p:4x8x8", {"data": 256}, [0, 8, 64, 72]),
    ("v5p:4x8x8", {"data": 1, "fsdp": 32, "expert": 8}, [0, 1, 64, 65]),
    ("v6e:4x4", {"data": 16}, [0, 1, 6, 15]),
]


def rows_on_a_pod(name, sizes):
    """The rows of each process of a pod, for a batch with one row per device."""
    mesh = make_mesh(MeshConfig(**sizes), topology.devices(topology.parse_topology(name)))
    processes = {}
    for device in mesh.devices.flat:
        processes.setdefault(device.process_index, []).append(device)
    return [rows_in(processes[index], mesh, mesh.size) for index in sorted(processes)]


def test_the_hosts_of_a_tpu_pod_read_every_row_once():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the package libtpu")  # half a GB, which the extra `test` leaves out
    code = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from tests import test_parallel_batches as here\n"
        "for name, sizes, _ in here.PODS: print(here.rows_on_a_pod(name, sizes))\n"
    )  # in another process, which keeps the compiler out of this one
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for (name, sizes, first), line in zip(PODS, done.stdout.splitlines(), strict=True):
        rows = json.loads(line)
        assert rows[0] == first, (name, sizes)
        assert {len(mine) for mine in rows} == {4}
        assert sorted(row for mine in rows for row in mine) == list(range(4 * len(rows)))


def test_rows_that_the_devices_do_not_share_evenly_are_refused():
    with pytest.raises(ValueError, match=r"partitioned 8 times, but the dimension size is 12"):
        rows_of_process(make_mesh(MeshConfig(data=8)), 12)


def batch():
    """Two arrays with distinct entries, which identify microbatch, row and position."""
    return {
        "inputs": np.arange(2 * 8 * 3, dtype=np.int32).reshape(2, 8, 3),
        "loss_weights": -np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3),
    }


def from_all_rows(whole, mesh, names):
    return from_rows(whole, range(8), 8, mesh, names)


@pytest.mark.parametrize("make", [from_all_rows, from_whole])
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
        # Neighbours in the mesh have neighbouring rows; devices along tensor have the same rows.
        for place, device in enumerate(mesh.devices.flat):
            first = place // config.tensor * rows
            np.testing.assert_array_equal(shards[device], expected[:, first : first + rows])


def test_what_has_no_batch_dim_is_on_every_device():
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    whole = {"x": np.arange(5.0)}
    (array,) = from_whole(whole, mesh, (None,)).values()
    assert array.sharding.is_fully_replicated and len(array.addressable_shards) == 8
    np.testing.assert_array_equal(array, jax.numpy.arange(5.0))
