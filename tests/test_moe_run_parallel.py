"""Experts on many devices equal experts on one, and each device receives what it must."""

import contextlib
import dataclasses
import functools
import importlib
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from moe_jax.config import MeshConfig
from moe_jax.moe.activations import GeGLU, Gelu, Relu, SwiGLU
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Assignment, Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.run_experts import gathered_for, parallel, run_experts
from moe_jax.moe.run_experts.buffer import most_received_rows
from moe_jax.moe.run_experts.exchange import ByAllToAll, ByConstraint
from moe_jax.moe.run_experts.fsdp_weights import AllGathered
from moe_jax.moe.run_experts.gather import run_gather
from moe_jax.moe.run_experts.grouped_matmul import says_how_it_varies
from moe_jax.moe.run_experts.parallel import run_parallel
from moe_jax.moe.run_experts.plan import Plan, plan_experts
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding, partition_spec
from moe_jax.parameters import grouped
from moe_jax.part import Call, Dims
from moe_jax.planning.hlo import read_program
from moe_jax.weights.quantised import Quantised
from tests.networks import Network
from tests.slow import slow_but

# On a mesh the same float32 products are summed in another order: a few roundings (epsilon 1.2e-7)
# of the largest entry.
FLOAT32 = 1e-6

BATCH, LENGTH, MODEL_DIM, HIDDEN, NUM_EXPERTS = 8, 12, 8, 8, 8

MESHES = {
    "expert 8": MeshConfig(data=1, expert=8),
    "data 2, expert 4": MeshConfig(data=2, expert=4),
    "fsdp 2, expert 2, tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "experts over slices 2, expert 2, tensor 2": MeshConfig(
        slices=2, data=1, expert=2, tensor=2, experts_span_slices=True
    ),
}


WAYS = {
    "einsum by constraint": Plan("einsum", "compiler"),
    "gather by constraint": Plan("gather", "compiler"),
    "einsum": Plan("einsum", "explicit"),
    "gather": Plan("gather", "explicit"),
    "ragged": Plan("ragged", "explicit", kernel="loop"),
    "ragged, dense": Plan("ragged", "explicit", kernel="dense"),
}
EXPLICIT = [name for name, way in WAYS.items() if way.exchange == "explicit"]


class Case(NamedTuple):
    """A block's settings, its capacity factor, and whether choices are dropped."""

    settings: dict
    factor: float
    drops: bool


CASES = [
    Case({"activation": Relu(), "use_bias": True}, 1.0, True),
    Case(
        {"num_selected_experts": 2, "activation": Gelu(), "use_bias": True, "group_size": 6},
        0.0,
        False,
    ),
    Case(
        {
            "num_selected_experts": 2,
            "activation": SwiGLU(),
            "use_bias": True,
            "shared_expert_dim": 2 * HIDDEN,
            "shared_expert_gate": True,
        },
        1.25,
        True,
    ),
    Case({"activation": GeGLU(), "shared_expert_dim": HIDDEN}, 0.0, False),
    Case(
        {
            "num_selected_experts": 2,
            "activation": SwiGLU(),
            "use_bias": True,
            "router": TokenChoice(score=Sigmoid()),
            "gate_on_input": True,
        },
        0.75,
        True,
    ),
]


def make_block(case, way, num_chunks=1):
    return MoE(
        num_experts=NUM_EXPERTS,
        expert_dim=HIDDEN,
        run_experts=way.rows,
        exchange=way.exchange,
        exchange_chunks=num_chunks,
        grouped_matmul=way.kernel or "auto",
        capacity=Capacity(train_factor=case.factor),
        **case.settings,
    )


def block_inputs(moe):
    """Parameters, tokens, the output's gradient, and a mask of tokens that are not padding."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: (random.normal(size=spec.shape) / 2).astype(np.float32),
        moe.specs(Dims(MODEL_DIM)),
    )
    x, dy = random.normal(size=(2, BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
    return params, x, dy, random.random((BATCH, LENGTH)) < 0.8


def run_block(moe, mesh=None):
    """Output and gradients by name, and everything that the block reports on its routing."""
    params, x, dy, valid = block_inputs(moe)
    call = Call(segments_BL=jnp.asarray(valid, jnp.int32), capacity=moe.capacity.train_factor)

    def objective(params, x):
        y, aux = moe_block(params, x, moe, call)
        metrics = moe.metrics(jax.tree.map(lambda a: a[None], aux))
        losses = metrics["load_balance_loss"] + metrics["router_z_loss"]
        return jnp.sum(y * dy) + losses[0], (y, aux, metrics)

    in_use = contextlib.nullcontext()
    if mesh is not None:
        in_use = jax.set_mesh(mesh)
        params = jax.tree.map(
            lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)),
            moe.specs(Dims(MODEL_DIM)), params,
        )  # fmt: skip
    with in_use:
        run = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        (d_params, d_x), (y, aux, metrics) = run(params, x)
    return jax.tree.map(np.asarray, ({"output": y, "x": d_x, "params": d_params}, aux, metrics))


@functools.cache
def on_one_device(case_index):
    return run_block(make_block(CASES[case_index], WAYS["einsum by constraint"]))


def every_way_on_every_mesh():
    """Each way on each mesh with both numbers of chunks, cases in turn; a quarter is quick."""
    turns = []
    for w, way in enumerate(WAYS):
        for m, mesh in enumerate(MESHES):
            for first in (True, False):
                num_chunks = 1 if ((w + m // 2) % 2 == 0) == first else 3
                case_index = (w + m + (not first)) % len(CASES)
                marks = () if first and (w + m) % 2 == 0 else pytest.mark.slow
                turns.append(pytest.param(way, mesh, num_chunks, case_index, marks=marks))
    return turns


@pytest.mark.parametrize(("way", "mesh", "num_chunks", "case_index"), every_way_on_every_mesh())
def test_the_block_is_that_of_one_device(way, mesh, num_chunks, case_index):
    case, way = CASES[case_index], WAYS[way]
    expected, *said = on_one_device(case_index)
    counts = said[0].sums
    assert (counts["kept_KE"].sum() < counts["assigned_KE"].sum()) == case.drops
    moe = make_block(case, way, num_chunks)
    got, *got_said = run_block(moe, make_mesh(MESHES[mesh]))
    for path, value in jax.tree.leaves_with_path(expected):
        assert np.abs(value).max() > 1e-3, f"{jax.tree_util.keystr(path)}: nothing to compare"
    assert_same(got, expected)
    assert_same(got_said, said)


@pytest.mark.parametrize(
    ("way", "buffer_factor"),
    slow_but([("ragged", 0.0)], [("ragged", 0.0), ("ragged, dense", 0.0), ("ragged", 1.0)]),
)
def test_what_no_row_fills_is_never_read(way, buffer_factor, monkeypatch):
    """The exchange writes into zeros. NaN in their place changes nothing."""
    moe = dataclasses.replace(make_block(CASES[0], WAYS[way]), buffer_factor=buffer_factor)
    mesh = make_mesh(MESHES["data 2, expert 4"])
    expected = run_block(moe, mesh)
    exchange, filled = parallel.ragged_all_to_all, []

    def into_nan(operand, output, *runs, axis_name):
        filled.append(output.shape)
        return exchange(operand, jnp.full_like(output, jnp.nan), *runs, axis_name=axis_name)

    monkeypatch.setattr(parallel, "ragged_all_to_all", into_nan)
    got = run_block(moe, mesh)
    assert len(filled) >= 2, "there and back"
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("remat", [False, True])
def test_matrices_come_to_their_slots_in_either_pass(remat):
    """They are gathered over fsdp in each pass, so none is kept for the backward pass.

    With remat, the backward pass gathers once, both to recompute and for its own products.
    """
    case = Case({"activation": SwiGLU(), "num_selected_experts": 2}, 1.0, True)
    moe = make_block(case, WAYS["gather by constraint"])
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    params, x, dy, _ = block_inputs(moe)

    def block(x, params):
        return x + moe_block(params, x, moe, Call(capacity=1.0))[0], None

    def objective(params, x):
        layer = jax.checkpoint(block, prevent_cse=False) if remat else block
        return jnp.sum(jax.lax.scan(layer, x, params)[0] * dy)

    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda spec, value: jax.device_put(
                np.stack([value, value]), named_sharding((None, *spec.axes), mesh)
            ),
            moe.specs(Dims(MODEL_DIM)), params,
        )  # fmt: skip
        text = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(placed, x).compile().as_text()
    of_an_expert_shard = 4 * NUM_EXPERTS // 2 * MODEL_DIM * HIDDEN
    gathered = [
        one.count
        for one in read_program(text).collectives
        if one.operation == "all-gather" and one.group_size == 4 and one.bytes == of_an_expert_shard
    ]
    assert sum(gathered) == 2 * 2 * 3  # layers, passes, matrices: wi, wg, wo


@pytest.mark.parametrize(
    ("mesh", "model_dim", "gathers"),
    [
        (MeshConfig(data=1, expert=2), 8, False),  # nothing is split
        (MeshConfig(data=1, fsdp=4, expert=2), 8, True),
        (MeshConfig(data=1, fsdp=4, expert=2), 16, False),
        (MeshConfig(data=2, fsdp=4), 8, False),  # four slots among four devices, four elsewhere
        (MeshConfig(data=2, fsdp=4), 4, True),
    ],
)
def test_few_slots_come_to_the_matrices(mesh, model_dim, gathers):
    x_GSM, weights = jnp.zeros((8, 1, model_dim)), {"wi": jnp.zeros((8, model_dim, 8))}
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.num_devices])):
        found = gathered_for(1, weights, {"wi": ("expert", "model", "hidden")}, x_GSM)
    assert isinstance(found["wi"], AllGathered) == gathers


COPYING_MESHES = {
    "fsdp 4, expert 2": MeshConfig(data=1, fsdp=4, expert=2),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "fsdp 2, expert 2, tensor 2": MESHES["fsdp 2, expert 2, tensor 2"],
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
    "data 8": MeshConfig(data=8),
}


@pytest.mark.parametrize(
    ("kernel", "mesh"),
    slow_but(
        [("megablox", "fsdp 2, expert 2, tensor 2")],
        [(kernel, mesh) for kernel in ("megablox", "triton") for mesh in COPYING_MESHES],
    ),
)
def test_gradients_of_kernels_that_are_not_checked(kernel, mesh):
    """`jax.shard_map` cannot check how their results vary, and hence where gradients are summed.

    On some of these meshes, matrices, biases and tokens are copied along each axis.
    """
    assert not says_how_it_varies(kernel) and says_how_it_varies("dense")
    case_index = 2
    expected, _, _ = on_one_device(case_index)
    moe = make_block(CASES[case_index], Plan("ragged", "explicit", kernel=kernel))
    got, _, _ = run_block(moe, make_mesh(COPYING_MESHES[mesh]))
    assert_same(got, expected)


def assert_same(got, expected):
    """Asserts that integers are equal, and other numbers equal up to rounding."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, wanted), value in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if np.issubdtype(wanted.dtype, np.integer):
            np.testing.assert_array_equal(value, wanted, err_msg=name)
        else:
            compare(value, wanted, name)


def compare(got, expected, what):
    """Asserts that the largest difference is small next to the largest expected entry."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = max(1.0, float(np.abs(expected).max()))
    difference = np.abs(got.astype(np.float64) - expected).max() / scale
    assert difference <= FLOAT32, f"{what}: off by {difference:.2e} of {scale:.3g}"


# The exchange of slots.

GROUPS, SLOTS = 2, 3  # groups of one device; slots of an expert in a group


def numbered_slots(num_devices):
    """Distinct numbers, [E, all groups, C, M]: no slot can be mistaken for another."""
    shape = (NUM_EXPERTS, GROUPS * num_devices, SLOTS, MODEL_DIM)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def all_to_all(mesh, axes):
    """A function of all slots: what each device gets for its experts, and what comes back."""
    exchange = ByAllToAll(axes)
    by_groups = partition_spec((None, "group", None, None), mesh)
    arrived = jax.P(mesh.axis_names)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=by_groups, out_specs=(arrived, by_groups))
    def there_and_back(x_EGCM):
        y_EGCM = exchange.to_experts(x_EGCM)
        return y_EGCM[None], exchange.to_tokens(y_EGCM)

    return jax.jit(there_and_back)


SPANNED = MeshConfig(slices=2, data=1, expert=4, experts_span_slices=True)


@pytest.mark.parametrize(
    ("config", "axes", "sharing"),
    [
        (MeshConfig(data=1, expert=8), ("expert",), [range(8)]),
        (MeshConfig(data=2, expert=4), ("expert",), [range(4), range(4, 8)]),
        # Two hops deliver what one hop does.
        (SPANNED, ("expert_slice", "expert"), [range(8)]),
        (SPANNED, (("expert_slice", "expert"),), [range(8)]),
        # Experts that are not split stay in place.
        (MeshConfig(data=8), (), [[device] for device in range(8)]),
    ],
)
def test_each_device_gets_the_slots_of_its_experts_and_they_come_back(config, axes, sharing):
    """`sharing`: the devices that share the experts, in each copy of the model."""
    slots = numbered_slots(8)
    arrived, back = all_to_all(make_mesh(config), axes)(slots)
    np.testing.assert_array_equal(back, slots)
    for devices in sharing:
        groups = [GROUPS * device + g for device in devices for g in range(GROUPS)]
        own = NUM_EXPERTS // len(devices)
        for i, device in enumerate(devices):
            got = np.asarray(arrived)[device]
            got = got[:, np.argsort(got[0, :, 0, 0])]  # the groups come in any order
            np.testing.assert_array_equal(got, slots[i * own : (i + 1) * own, groups])


@pytest.mark.parametrize("mesh", MESHES)
def test_constraints_lay_slots_with_their_experts_and_back(mesh):
    mesh = make_mesh(MESHES[mesh])
    slots = numbered_slots(8)
    with jax.set_mesh(mesh):
        there = jax.jit(ByConstraint().to_experts)(slots)
        back = jax.jit(ByConstraint().to_tokens)(there)
    with_experts = named_sharding(("expert", "expert_group", None, None), mesh)
    assert there.sharding.is_equivalent_to(with_experts, 4)
    assert back.sharding.is_equivalent_to(named_sharding((None, "group", None, None), mesh), 4)
    np.testing.assert_array_equal(there, slots)
    np.testing.assert_array_equal(back, slots)


# The exchange of rows: how many can arrive.


def rows_received(expert_QJK, num_experts, slots):
    """Kept rows that each device receives if experts serve `slots` rows per sender, by NumPy."""
    num_devices = len(expert_QJK)
    received = np.zeros(num_devices, int)
    for expert_JK in expert_QJK:
        loads = np.bincount(expert_JK.reshape(-1), minlength=num_experts)
        received += np.minimum(loads, slots).reshape(num_devices, -1).sum(axis=1)
    return received


def random_choices(tokens, num_choices, num_experts, random):
    """Distinct experts for every token, some much more popular than others, [J, K]."""
    worth = random.normal(size=(tokens, num_experts)) + 3 * random.normal(size=num_experts)
    return np.argsort(-worth, axis=-1)[:, :num_choices]


@pytest.mark.parametrize("num_own", [1, 2, 3])
@pytest.mark.parametrize("num_choices", [1, 2, 4])
@pytest.mark.parametrize("slots", [1, 3, 8, 12])
def test_no_device_receives_more_rows_than_there_is_room_for(num_own, num_choices, slots):
    tokens, num_devices = 12, 4
    num_experts = num_own * num_devices
    most = most_received_rows(tokens, num_choices, num_own, num_devices, slots)
    random = np.random.default_rng(0)
    for _ in range(20):
        expert_QJK = np.stack(
            [random_choices(tokens, num_choices, num_experts, random) for _ in range(num_devices)]
        )
        assert rows_received(expert_QJK, num_experts, slots).max() <= most

    # The worst router sends as many choices of each token as possible to device 2's experts.
    turn = np.arange(tokens * num_choices).reshape(tokens, num_choices)
    there = 2 * num_own + turn % num_own
    elsewhere = (turn % (num_experts - num_own)) + 3 * num_own
    is_there = np.arange(num_choices) < num_own
    if num_choices > num_own:
        there = 2 * num_own + np.tile(np.arange(num_choices), (tokens, 1))
    worst_JK = np.where(is_there, there, elsewhere % num_experts)
    assert rows_received(np.stack([worst_JK] * num_devices), num_experts, slots)[2] == most


AXES = {"wi": ("expert", "model", "hidden")}


def run_everything_on_two_experts(mesh, way, num_chunks=1):
    """Output if all tokens choose experts 0 and 1, with gates of their own, and the oracle's.

    With expert=4 both experts are on one device. It then receives all rows: its own and those of
    every other device.
    """
    random = np.random.default_rng(0)
    shape = (BATCH, LENGTH, 2)
    x = random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
    gate = random.random(shape, np.float32)
    slot = np.broadcast_to(np.arange(LENGTH)[:, None], shape)
    index = np.broadcast_to(np.arange(2), shape)
    weights = {"wi": random.normal(size=(NUM_EXPERTS, MODEL_DIM, MODEL_DIM)).astype(np.float32)}

    def output(x, index, gate, slot, weights):
        kept = jnp.ones(shape, bool)
        assignment = Assignment(index, gate, slot, kept, LENGTH, NUM_EXPERTS)

        def linear(rows, weights, layout):
            return layout.matmul(rows, weights["wi"])

        plan = dataclasses.replace(way, num_chunks=num_chunks)
        return run_parallel(x, assignment, weights, AXES, Network(compute=linear), plan).y

    with jax.set_mesh(mesh):
        y = jax.jit(output)(x, index, gate, slot, weights)
    mixed = gate[..., 0, None] * (x @ weights["wi"][0]) + gate[..., 1, None] * (
        x @ weights["wi"][1]
    )
    return np.asarray(y), mixed


@pytest.mark.parametrize("name", EXPLICIT)
def test_every_token_may_go_to_one_device(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    y, expected = run_everything_on_two_experts(mesh, WAYS[name])
    compare(y, expected, "output")


def test_with_room_for_one_row_less_a_row_would_be_lost():
    """So the bound above is the smallest, also for the program that runs."""
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    way = WAYS["ragged, dense"]
    with mock.patch.object(
        parallel, "most_received_rows", lambda **sizes: most_received_rows(**sizes) - 1
    ):
        y, expected = run_everything_on_two_experts(mesh, way)
    right = np.abs(y - expected).max(axis=-1) <= 1e-3
    assert (~right).sum() == 2  # one in each copy of the model


@pytest.mark.slow
def test_one_text_that_is_generated_has_fewer_tokens_than_chunks():
    """Each of two devices has one token, which travels in one of the two chunks."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 1, MODEL_DIM)).astype(np.float32)
    weights = {"wi": random.normal(size=(2, MODEL_DIM, MODEL_DIM)).astype(np.float32)}
    ones = np.ones((2, 1, 1), np.float32)
    assignment = Assignment(np.int32([[[1]], [[0]]]), ones, 0 * ones.astype(int), ones > 0, 1, 2)

    def product(rows, weights, layout):
        return layout.matmul(rows, weights["wi"])

    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])):
        plan = Plan("ragged", "explicit", num_chunks=2, kernel="dense")
        y = run_parallel(x, assignment, weights, AXES, Network(compute=product), plan).y
    compare(np.asarray(y), np.stack([x[0] @ weights["wi"][1], x[1] @ weights["wi"][0]]), "output")


def test_scales_of_quantised_experts_stay_what_they_are():
    """127 x 1.003 (in float16) is 127.37, or 127.5 in bfloat16. A bfloat16 scale would give 127."""
    scales = np.full((2, 1, 1), 1.003, np.float16)
    weights = {"wi": Quantised(np.full((2, 1, 1), 127, np.int8), jnp.asarray(scales))}
    ones = jnp.ones((2, 1, 1))
    index = jnp.int32([[[1]], [[0]]])
    assignment = Assignment(index, ones, 0 * index, ones > 0, 1, 2)

    def product(rows, weights, layout):
        return grouped(rows, weights["wi"], layout)

    operands = (ones.astype(jnp.bfloat16), assignment, weights)
    expected = run_gather(*operands, Network(compute=product))
    assert expected.tolist() == [[[127.5]], [[127.5]]]
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])):
        y = run_parallel(*operands, AXES, Network(compute=product), Plan("gather", "explicit")).y
    assert y.dtype == jnp.bfloat16 and y.tolist() == expected.tolist()


# Randomness in the experts.


def draw_from_experts(name, config, seed, num_chunks=1):
    """Every expert device draws numbers for its rows; under tensor, each fills its own half."""
    way, mesh = WAYS[name], make_mesh(config)
    random = np.random.default_rng(1)
    index = random.integers(0, NUM_EXPERTS, (BATCH, LENGTH, 1)).astype(np.int32)
    slot = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[:, None], index.shape)
    half = MODEL_DIM // 2

    def draw(rows, weights, layout):
        drawn = jax.random.uniform(layout.rng, (*rows.shape[:-1], half))
        place = (0,) * (rows.ndim - 1) + (half * jax.lax.axis_index("tensor"),)
        return jax.lax.dynamic_update_slice(jnp.zeros_like(rows), drawn, place)

    def output(x, index, slot, weights, rng):
        ones = jnp.ones(index.shape)
        assignment = Assignment(index, ones, slot, ones > 0, LENGTH, NUM_EXPERTS)
        plan = dataclasses.replace(way, num_chunks=num_chunks)
        return run_parallel(x, assignment, weights, AXES, Network(compute=draw), plan, rng).y

    x = np.ones((BATCH, LENGTH, MODEL_DIM), np.float32)
    weights = {"wi": np.ones((NUM_EXPERTS, MODEL_DIM, HIDDEN), np.float32)}
    with jax.set_mesh(mesh):
        run = jax.jit(output)
        return [np.asarray(run(x, index, slot, weights, jax.random.key(s))) for s in seed]


@pytest.mark.parametrize("name", EXPLICIT)
def test_no_two_devices_draw_the_same_and_equal_keys_do(name):
    config = MESHES["fsdp 2, expert 2, tensor 2"]
    first, again, other = draw_from_experts(name, config, [0, 0, 1], num_chunks=3)
    np.testing.assert_array_equal(first, again)
    assert not (first == other).any()
    # One device's draw for a token: under tensor, half of the output.
    drawn = first.reshape(-1, MODEL_DIM // 2)
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 2 * BATCH * LENGTH


def run_with_dropout(way, mesh=None):
    case = Case({"num_selected_experts": 2, "expert_dropout_rate": 0.5}, 1.25, True)
    moe = make_block(case, way)
    params, x, _, valid = block_inputs(moe)
    call = Call(segments_BL=jnp.asarray(valid, jnp.int32), rng=jax.random.key(0))
    in_use = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with in_use:
        run = jax.jit(lambda *args: moe_block(*args, moe, call))
        return np.asarray(run(params, x)[0])


def test_what_the_compiler_places_is_dropped_as_on_one_device():
    """Masks cover one array of all slots, wherever it is placed; explicit ways draw their own."""
    expected = run_with_dropout(WAYS["einsum by constraint"])
    mesh = make_mesh(MESHES["data 2, expert 4"])
    compare(run_with_dropout(WAYS["einsum by constraint"], mesh), expected, "output")
    assert np.abs(run_with_dropout(WAYS["einsum"], mesh) - expected).max() > 0.1


# What is refused.


@pytest.mark.parametrize(
    ("groups", "num_experts", "message"),
    [
        (
            6,
            8,
            r"split groups of tokens evenly: 6 over 8 devices\. Change the mesh, training",
        ),
        (8, 6, r"must split experts evenly: 6 over 8 devices\. .* or num_experts"),
    ],
)
def test_what_the_mesh_does_not_split_evenly_is_refused(groups, num_experts, message):
    choices = jnp.zeros((groups, LENGTH, 1), jnp.int32)
    assignment = Assignment(choices, choices * 1.0, choices, choices > 0, LENGTH, num_experts)
    x = jnp.zeros((groups, LENGTH, MODEL_DIM))
    weights = {"wi": jnp.zeros((num_experts, MODEL_DIM, HIDDEN))}
    with jax.set_mesh(make_mesh(MESHES["expert 8"])), pytest.raises(ValueError, match=message):
        run_parallel(x, assignment, weights, AXES, None, Plan("gather", "explicit"))


def test_without_a_mesh_there_is_no_expert_parallelism():
    assignment = Assignment(*[jnp.zeros((1, 1, 1), jnp.int32)] * 4, 1, 1)
    with pytest.raises(AssertionError, match="one device there is nothing to exchange"):
        run_parallel(jnp.zeros((1, 1, 1)), assignment, {}, {}, None, Plan("gather", "explicit"))


# What the backward pass keeps.


def kept_matrices(name, num_chunks):
    """Shapes of the expert matrices that the backward pass receives, over all devices."""
    way = WAYS[name]
    moe = MoE(
        num_experts=4, expert_dim=20, activation=SwiGLU(), use_bias=True,
        run_experts=way.rows, exchange="explicit", exchange_chunks=num_chunks,
        grouped_matmul=way.kernel or "auto",
    )  # fmt: skip
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), moe.specs(Dims(MODEL_DIM))
    )
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, MODEL_DIM), jnp.float32)

    def backward(params, x):
        return jax.vjp(lambda params, x: moe_block(params, x, moe)[0], params, x)[1]

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    with jax.set_mesh(mesh):
        kept = jax.tree.leaves(jax.eval_shape(backward, params, x))
    matrices = [leaf.shape for leaf in kept if sorted(leaf.shape[1:]) == [MODEL_DIM, 20]]
    return sorted(matrices)


SPLIT = [(4, 8, 20), (4, 8, 20), (4, 20, 8)]  # wi, wg and wo: each entry on one device
GATHERED = [(16, 8, 20), (16, 8, 20), (16, 20, 8)]  # each on the four devices of fsdp


# JAX keeps whatever enters a loop. This includes the matrices of sorted rows on a CPU, whose
# devices share one memory anyway.
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("name", [name for name in EXPLICIT if name != "ragged"])
def test_gathered_matrices_are_not_kept_for_the_backward_pass(name, num_chunks):
    assert kept_matrices(name, num_chunks) == SPLIT


def test_without_the_rule_gathered_matrices_would_be_kept():
    with mock.patch.object(parallel, "all_but_gathered", lambda *_, **__: True):
        assert kept_matrices("gather", 1) == GATHERED


# Which rows and which exchange.


def devices_of(platform):
    """A mesh of four devices of a platform, which need not exist here."""
    device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    mesh = AbstractMesh((4,), ("expert",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("platform", "dropless"),
    [("cpu", "gather"), ("tpu", "ragged"), ("cuda", "ragged"), ("metal", "gather")],
)
def test_auto_is_ragged_where_nothing_is_dropped_and_there_is_a_kernel(platform, dropless):
    # Slots that drop nothing are E / K times as many as the rows.
    with devices_of(platform):
        assert plan_experts(MoE(), dropless=True).rows == dropless
        assert plan_experts(MoE(), dropless=False).rows == "gather"
        assert plan_experts(MoE(capacity=Capacity(train_factor=0))).rows == dropless
        only_evaluation = MoE(capacity=Capacity(eval_factor=0))
        assert plan_experts(only_evaluation).rows == "gather"
        assert plan_experts(only_evaluation, training=False).rows == dropless
        assert plan_experts(MoE(exchange="compiler"), dropless=True).rows == "gather"


def test_auto_is_ragged_on_one_cpu_and_gather_elsewhere():
    assert plan_experts(MoE()).rows == "ragged"
    with mock.patch.object(jax, "default_backend", lambda: "tpu"):
        assert plan_experts(MoE()).rows == "gather"
    for platform in ("cpu", "tpu", "cuda"):
        with devices_of(platform):
            assert plan_experts(MoE()).rows == "gather"
            for name in ("einsum", "gather", "ragged"):
                assert plan_experts(MoE(run_experts=name)).rows == name


@pytest.mark.parametrize(
    ("rows", "exchange", "resolved"),
    [
        ("einsum", "auto", "compiler"),
        ("gather", "auto", "compiler"),
        ("auto", "auto", "compiler"),
        ("ragged", "auto", "explicit"),
        ("einsum", "compiler", "compiler"),
        ("gather", "compiler", "compiler"),
        ("auto", "compiler", "compiler"),
        ("einsum", "explicit", "explicit"),
        ("gather", "explicit", "explicit"),
        ("auto", "explicit", "explicit"),
        ("ragged", "explicit", "explicit"),
    ],
)
def test_the_exchange_that_is_chosen(rows, exchange, resolved):
    moe = MoE(run_experts=rows, exchange=exchange, exchange_chunks=3)
    with devices_of("cpu"):
        plan = plan_experts(moe)
    rows, kernel = "gather" if rows == "auto" else rows, "loop" if rows == "ragged" else ""
    assert plan == Plan(rows, resolved, num_chunks=3, kernel=kernel)


@pytest.mark.parametrize(
    ("plan", "by", "chunks"),
    [
        (Plan("gather", "explicit", 3), "run_parallel", 3),
        (Plan("ragged", "explicit", 3), "run_parallel", 3),
        (Plan("gather", "compiler", 3), "gather", 3),
        (Plan("einsum", "compiler", 3), "einsum", 3),
        # On one device nothing is exchanged.
        (Plan("einsum", "none", 3), "einsum", 1),
        (Plan("ragged", "none", 3), "run_sorted_rows", None),
    ],
    ids=str,
)
def test_a_plan_is_followed(plan, by, chunks):
    told = {}

    def follow(name):
        def run(*args, **_):
            chunks = (getattr(arg, "num_chunks", None) for arg in args)  # of a plan or an exchange
            told[name] = next(filter(None, chunks), None)

        return run

    module = importlib.import_module("moe_jax.moe.run_experts")
    with (
        mock.patch.object(module, "run_parallel", follow("run_parallel")),
        mock.patch.object(module, "run_sorted_rows", follow("run_sorted_rows")),
        mock.patch.dict(module.RUN_BY_SLOTS, {n: follow(n) for n in ("einsum", "gather")}),
    ):
        run_experts(None, mock.Mock(spec=["capacity", "kept_GSK"]), {}, {}, None, plan)
    assert told == {by: chunks}


@pytest.mark.parametrize("exchange", ["auto", "compiler", "explicit"])
def test_on_one_device_nothing_is_exchanged(exchange):
    moe = MoE(run_experts="einsum", exchange=exchange)
    assert plan_experts(moe) == Plan("einsum")
    with jax.set_mesh(make_mesh(MeshConfig(data=1))):
        assert plan_experts(moe) == Plan("einsum")


def test_auto_is_explicit_where_experts_span_slices():
    # Between slices the compiler sends whole slots; the explicit exchange is hierarchical.
    device = AbstractDevice(device_kind="any", num_cores=1, platform="tpu")
    for outer, resolved in (("expert_slice", "explicit"), ("slice", "compiler")):
        mesh = AbstractMesh((2, 4), (outer, "expert"), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert plan_experts(MoE()).exchange == resolved
            for name in ("compiler", "explicit"):
                assert plan_experts(MoE(exchange=name)).exchange == name


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (Plan("ragged", kernel="megablox"), "ragged rows by megablox"),
        (Plan("einsum", "compiler"), "einsum rows, exchanged by the compiler"),
        (
            Plan("gather", "explicit", 2, gate_on_input=True),
            "gather rows, exchanged by explicit collectives in 2 chunks, gates on the input",
        ),
    ],
)
def test_a_plan_prints(plan, line):
    assert str(plan) == line
