"""The CPU's emulation of the ragged all-to-all, against NumPy; and where it is used.

Values are integers, so sums have no rounding and comparisons are exact.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moe_jax.config import MeshConfig
from moe_jax.parallel.collectives import emulated_ragged_all_to_all, ragged_all_to_all, vary
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import partition_spec

# Rows of a device's operand and output, their width, and the longest run.
SENT, RECEIVED, WIDTH, LONGEST = 12, 40, 3, 4

SPANNED = MeshConfig(slices=2, data=1, expert=4, experts_span_slices=True)
# The mesh, and the axes along which rows travel; other axes form separate groups.
EXCHANGES = {
    "one axis": (MeshConfig(data=1, expert=8), ("expert",)),
    "two axes": (SPANNED, ("expert_slice", "expert")),
    "groups of the inner axis": (MeshConfig(data=2, expert=4), ("expert",)),
    "groups of the outer axis": (SPANNED, ("expert_slice",)),
}
every_exchange = pytest.mark.parametrize("name", EXCHANGES)


def groups_of_devices(name):
    """Mesh places of the devices that exchange with each other, [groups, members]."""
    config, axes = EXCHANGES[name]
    mesh = make_mesh(config)
    dims = [mesh.axis_names.index(axis) for axis in axes]
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    members = math.prod(mesh.shape[axis] for axis in axes)
    return np.moveaxis(places, dims, range(-len(dims), 0)).reshape(-1, members)


def random_runs(members, random):
    """Which rows devices send each other: sizes and both offsets, [senders, receivers].

    Runs may be read from anywhere, repeatedly. They are written in random order of senders, with
    gaps. Many are empty; one device sends nothing, one receives nothing.
    """
    sizes = random.integers(0, LONGEST + 1, (members, members)) * random.integers(
        0, 2, 2 * [members]
    )
    sizes[random.integers(members)] = 0
    sizes[:, random.integers(members)] = 0
    input_offsets = random.integers(0, SENT - sizes + 1)
    output_offsets = np.zeros_like(sizes)
    for receiver in range(members):
        free = RECEIVED - sizes[:, receiver].sum()
        row = 0
        for sender, gap in zip(
            random.permutation(members),
            random.multinomial(free, np.full(members + 1, 1 / (members + 1))),
            strict=False,
        ):
            output_offsets[sender, receiver] = row + gap
            row += gap + sizes[sender, receiver]
    return sizes, input_offsets, output_offsets


def make_case(name, seed):
    """Integer-valued arguments of all devices, [devices, ...]."""
    random = np.random.default_rng(seed)
    groups = groups_of_devices(name)
    devices, members = groups.size, groups.shape[1]
    operand = random.integers(-9, 10, (devices, SENT, WIDTH)).astype(np.float32)
    output = random.integers(100, 200, (devices, RECEIVED, WIDTH)).astype(np.float32)
    runs = np.zeros((4, devices, members), np.int32)
    for group in groups:
        sizes, input_offsets, output_offsets = random_runs(members, random)
        runs[:, group] = input_offsets, sizes, output_offsets, sizes.T
    return operand, output, *runs


def copied_rows(name, input_offsets, sizes, output_offsets):
    """Every row that travels: (sender, row), (receiver, row); devices are places in the mesh."""
    for group in groups_of_devices(name):
        for sender in group:
            for member, receiver in enumerate(group):
                for i in range(sizes[sender, member]):
                    read = input_offsets[sender, member] + i
                    yield (sender, read), (receiver, output_offsets[sender, member] + i)


def oracle(name, operand, output, input_offsets, sizes, output_offsets, recv_sizes):
    expected = output.copy()
    for source, target in copied_rows(name, input_offsets, sizes, output_offsets):
        expected[target] = operand[source]
    return expected


def oracle_gradient(name, dy, operand, output, input_offsets, sizes, output_offsets, recv_sizes):
    """A sent row sums the gradients of its copies; overwritten rows have none."""
    d_operand, d_output = np.zeros_like(operand), dy.copy()
    for source, target in copied_rows(name, input_offsets, sizes, output_offsets):
        d_operand[source] += dy[target]
        d_output[target] = 0
    return d_operand, d_output


@functools.cache
def compiled(name):
    """A function of all devices' arguments and dy: output, gradients of sum(output * dy)."""
    config, axes = EXCHANGES[name]
    mesh = make_mesh(config)
    spec = partition_spec(("batch",), mesh)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def on_devices(*arguments):
        own = (argument[0] for argument in arguments)
        return emulated_ragged_all_to_all(*own, axis_name=axes)[None]

    @jax.jit
    def run(operand, output, *runs_and_dy):
        *runs, dy = runs_and_dy
        y, vjp = jax.vjp(lambda *rows: on_devices(*rows, *runs), operand, output)
        return y, vjp(dy)

    return run


@every_exchange
@pytest.mark.parametrize("seed", range(6))
def test_rows_go_where_numpy_puts_them_and_the_rest_is_kept(name, seed):
    case = make_case(name, seed)
    expected = oracle(name, *case)
    kept = expected == case[1]
    assert kept.any() and not kept.all()
    y, _ = compiled(name)(*case, np.zeros_like(case[1]))
    np.testing.assert_array_equal(y, expected)


@every_exchange
@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_is_the_transpose(name, seed):
    case = make_case(name, seed)
    random = np.random.default_rng(100 + seed)
    dy = random.integers(-9, 10, case[1].shape).astype(np.float32)
    y, (d_operand, d_output) = compiled(name)(*case, dy)
    expected = oracle_gradient(name, dy, *case)
    np.testing.assert_array_equal(d_operand, expected[0])
    np.testing.assert_array_equal(d_output, expected[1])
    # <A x, dy> = <x, A^T dy> for the linear map A of both arguments.
    there = np.vdot(y, dy)
    back = np.vdot(case[0], d_operand) + np.vdot(case[1], d_output)
    assert there == back != 0


@every_exchange
def test_nothing_sent_changes_nothing(name):
    case = make_case(name, 0)
    empty = np.zeros_like(case[3])
    y, _ = compiled(name)(*case[:3], empty, case[4], empty, np.zeros_like(case[1]))
    np.testing.assert_array_equal(y, case[1])


@every_exchange
def test_all_rows_may_go_to_one_device(name):
    operand, output, *runs = make_case(name, 0)
    members = runs[0].shape[1]
    input_offsets, sizes, output_offsets, recv_sizes = np.zeros((4, *runs[0].shape), np.int32)
    for group in groups_of_devices(name):
        sizes[group, 1] = LONGEST
        output_offsets[group, 1] = LONGEST * np.arange(members)
        recv_sizes[group[1]] = LONGEST
    case = (operand, output, input_offsets, sizes, output_offsets, recv_sizes)
    y, _ = compiled(name)(*case, np.zeros_like(output))
    np.testing.assert_array_equal(y, oracle(name, *case))
    for group in groups_of_devices(name):
        received = np.asarray(y)[group[1], : LONGEST * members]
        np.testing.assert_array_equal(
            received.reshape(members, LONGEST, WIDTH), operand[group, :LONGEST]
        )


def test_the_stand_in_takes_what_the_real_one_takes():
    real = inspect.signature(jax.lax.ragged_all_to_all).parameters
    assert list(real)[:7] == list(inspect.signature(emulated_ragged_all_to_all).parameters)
    assert list(real)[:7] == list(inspect.signature(ragged_all_to_all).parameters)


def primitives(jaxpr):
    """The names of all primitives in order, including those of inner programs."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def trace_exchange(platform):
    """Traces the exchange and its transpose as four devices of a platform would run them."""
    device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    mesh = AbstractMesh((4,), ("expert",), (AxisType.Auto,), abstract_device=device)
    rows, runs = jnp.zeros((4 * SENT, WIDTH)), jnp.zeros(16, jnp.int32)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert")
    )
    def exchange(*arguments):
        return ragged_all_to_all(*arguments, axis_name=("expert",))

    def there_and_back(rows, output, *runs):
        received, transpose = jax.vjp(
            lambda rows, output: exchange(rows, output, *runs), rows, output
        )
        return transpose(received)

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(there_and_back).trace(rows, rows, runs, runs, runs, runs)
    return traced


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
def test_where_there_is_a_ragged_all_to_all_it_is_used_there_and_back(platform):
    traced = trace_exchange(platform)
    names = list(primitives(traced.jaxpr.jaxpr))
    assert names.count("ragged_all_to_all") == 2
    assert "all_gather" not in names
    assert "ragged_all_to_all" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_on_a_cpu_it_is_emulated():
    names = list(primitives(trace_exchange("cpu").jaxpr.jaxpr))
    assert "ragged_all_to_all" not in names
    assert "all_gather" in names


@pytest.mark.parametrize(
    ("names", "sums_over"),
    [
        (("expert", None), ("data", "fsdp")),
        (("model", "expert"), ("data",)),
        ((None, None), ("data", "fsdp", "expert")),
        (("batch", None), ()),
    ],
)
def test_the_gradient_of_what_is_shared_is_summed_over_those_who_share_it(names, sums_over):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    spec = partition_spec(names, mesh)
    weight = jnp.arange(64.0).reshape(8, 8)
    # What each device multiplies by: its number in the mesh.
    factors = np.arange(8.0).reshape(2, 2, 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, jax.P()), out_specs=jax.P())
    def on_device(weight, factors):
        place = tuple(jax.lax.axis_index(axis) for axis in ("data", "fsdp", "expert"))
        total = jnp.sum(vary(weight, names)) * factors[place]
        return jax.lax.psum(total, ("data", "fsdp", "expert"))

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(on_device))(weight, factors)
    summed = factors
    for dim, axis in enumerate(("data", "fsdp", "expert")):
        if axis in sums_over:
            summed = np.broadcast_to(summed.sum(dim, keepdims=True), (2, 2, 2))
    expected = jax.NamedSharding(mesh, spec).devices_indices_map((8, 8))
    for device, index in expected.items():
        place = tuple(np.argwhere(mesh.devices == device)[0][1:4])
        np.testing.assert_array_equal(np.asarray(gradient)[index], summed[place])
