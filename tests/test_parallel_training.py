"""Sharding changes only the speed: whole training steps, on every mesh, run in every way.

The compiled step also has the collectives that the design expects, no more and no larger.
"""

import functools
import pathlib
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.parallel.batches import from_whole
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.hlo import by_operation, read_program
from moe_jax.training.placement import BATCH_AXES, compile_train_step, state_shardings
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step
from tests.slow import slow_but
from tests.tiny_run import MLP, cut, quick_jit, tiny_batch, tiny_config, tiny_state

MESHES = {
    "data=8": {"data": 8},
    "expert=8": {"data": 1, "expert": 8},
    "data=2 expert=4": {"data": 2, "expert": 4},
    "fsdp=2 expert=2 tensor=2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "slices=2 expert=2 tensor=2": {
        "slices": 2, "data": 1, "expert": 2, "tensor": 2, "experts_span_slices": True,
    },
}  # fmt: skip
WAYS = [
    ("einsum", "compiler"),
    ("gather", "compiler"),
    ("einsum", "explicit"),
    ("gather", "explicit"),
    ("ragged", "explicit"),
]
# Compiling takes the time, so all other ways on all other meshes are slow tests.
QUICK = [
    ("data=2 expert=4", "ragged", "explicit"),
    ("fsdp=2 expert=2 tensor=2", "gather", "explicit"),
]
CASES = slow_but(QUICK, [(mesh, *way) for mesh in MESHES for way in WAYS])

# float32 sums in another order (epsilon 1.2e-7). Gradients are sums over some thousand terms,
# compared relative to the largest entry of each array.
ONE_STEP = 2e-5
# Twenty steps of Adam: normalised updates keep the relative error of small gradients.
TWENTY_STEPS = 2e-3
COLLECTIVES = pathlib.Path(__file__).parent / "hlo" / "collectives.txt"


def make_config(mesh, run_experts="einsum", exchange="auto", parts=1):
    """Uses every part of the state and of the losses, with clipping in force."""
    return tiny_config(
        {
            "model": {
                "parts": {
                    "mlp": MLP,
                    "moe": {
                        "num_experts": 8,
                        "activation": "swiglu",
                        "use_bias": True,
                        "shared_expert_dim": 32,
                        "run_experts": run_experts,
                        "exchange": exchange,
                        "bias": {"kind": "sign", "rate": 0.01},
                        "losses": {
                            "load_balance": {"weight": 0.1, "scope": "global"},
                            "router_z": {"weight": 0.01},
                        },
                    },
                },
                "stack": {"first": [["attention", "mlp"]]},
                "tie_embeddings": False,
                "scan_layers": True,
            },
            "optimizer": {"clip_norm": 0.1, "schedule": "constant"},
            "training": {"batch_size": 16, "num_microbatches": parts},
            "mesh": mesh,
        }
    )


def placed_state(config, mesh):
    """`tiny_state` on a mesh; its routers overload experts so that choices are dropped."""
    return jax.tree.map(jax.device_put, tiny_state(config), state_shardings(config, mesh))


def batches(parts, num_steps):
    return [cut(tiny_batch(16, seed=seed), parts) for seed in range(num_steps)]


@functools.cache
def expected(parts, num_steps):
    """State and metrics after the steps on one device, by the reference."""
    config = make_config({"data": 1}, parts=parts)
    state, step = tiny_state(config), quick_jit(make_train_step(config))
    for batch in batches(parts, num_steps):
        state, metrics = step(state, batch)
    return jax.tree.map(np.asarray, (state, metrics))


@functools.cache
def compiled_step(mesh, run_experts, exchange, parts):
    """The config, its mesh and its training step: one program for all tests."""
    config = make_config(MESHES[mesh], run_experts, exchange, parts)
    mesh = make_mesh(config.mesh)
    state, batch = jax.eval_shape(lambda: (init_state(config), cut(tiny_batch(16), parts)))
    with jax.set_mesh(mesh):
        lowered = compile_train_step(config, mesh).lower(state, batch)
    # Without optimising the machine code, compilation takes a third of the time.
    return config, mesh, lowered.compile({"xla_backend_optimization_level": 0})


def on_mesh(where, num_steps, parts=1):
    config, mesh, step = compiled_step(*where, parts)
    state = placed_state(config, mesh)
    for batch in batches(parts, num_steps):
        state, metrics = step(state, from_whole(batch, mesh, BATCH_AXES))
    assert_copies_agree((state, metrics))
    return jax.tree.map(np.asarray, (state, metrics))


def assert_copies_agree(tree):
    """Asserts that devices with the same part of an array hold the same bits.

    NumPy reads one of them, so it does not show a copy that lacks a sum over devices.
    """
    for path, array in jax.tree.leaves_with_path(tree):
        first = {}
        for shard in array.addressable_shards:
            copy = first.setdefault(str(shard.index), shard.data)
            np.testing.assert_array_equal(shard.data, copy, err_msg=jax.tree_util.keystr(path))


def assert_same(got, expected, tolerance):
    """Asserts equal integers, and floats within `tolerance` of their array's largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if np.issubdtype(b.dtype, np.integer):
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            scale = max(np.abs(b).max(), 1e-6)
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize(("mesh", "run_experts", "exchange"), CASES)
def test_one_step_is_that_of_one_device(mesh, run_experts, exchange):
    """Loss, gradients (as Adam's first moments), counts, balance losses, bias, clipped update."""
    want = expected(1, 1)
    assert np.all(want[1].of_parts["moe/dropped_fraction_by_choice"][:, 1] > 0)
    assert want[1].grad_norm > 0.1  # so that clipping is in force
    assert np.any(want[0].model_state["moe"]["bias_E"] != 0)
    assert_same(on_mesh((mesh, run_experts, exchange), 1), want, ONE_STEP)


@pytest.mark.parametrize(
    ("mesh", "run_experts", "exchange"),
    slow_but(
        [("data=2 expert=4", "gather", "explicit")],
        [("data=2 expert=4", *way) for way in WAYS],
    ),
)
def test_microbatches_are_those_of_one_device(mesh, run_experts, exchange):
    got = on_mesh((mesh, run_experts, exchange), 1, parts=2)
    assert_same(got, expected(2, 1), ONE_STEP)


@pytest.mark.parametrize(("mesh", "run_experts", "exchange"), CASES)
def test_twenty_steps_are_those_of_one_device(mesh, run_experts, exchange):
    assert_same(on_mesh((mesh, run_experts, exchange), 20), expected(1, 20), TWENTY_STEPS)


def test_a_batch_that_is_not_split_over_the_expert_axis_is_refused():
    config = make_config(MESHES["data=2 expert=4"])
    mesh = make_mesh(config.mesh)
    step = compile_train_step(config, mesh)
    wrong = NamedSharding(mesh, PartitionSpec(None, ("slice", "data"), None))
    batch = {name: jax.device_put(x, wrong) for name, x in cut(tiny_batch(16)).items()}
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="does not match the sharding"):
        step(placed_state(config, mesh), batch)


@functools.cache
def collectives(mesh, run_experts, exchange):
    """The collectives of the compiled training step."""
    return read_program(compiled_step(mesh, run_experts, exchange, 1)[2].as_text()).collectives


def golden_line(mesh, run_experts, exchange):
    """A line of the golden file: the number of each operation, and its bytes."""
    totals = by_operation(collectives(mesh, run_experts, exchange))
    cells = [f"{kind} {count} x, {size} bytes" for kind, (count, size) in sorted(totals.items())]
    return f"{mesh} | {run_experts} | {exchange} | " + "; ".join(cells)


@pytest.mark.parametrize(("mesh", "run_experts", "exchange"), CASES)
def test_the_step_has_the_collectives_of_the_golden_file(mesh, run_experts, exchange):
    """`python -m tests.hlo.make_collectives` makes the file.

    Another JAX may compile other collectives. Continuous integration, with the newest JAX for
    Python 3.11, must match the file. A remade file shows what a new JAX changed.
    """
    version, *lines = COLLECTIVES.read_text(encoding="utf-8").splitlines()
    if version != f"jax {jax.__version__}":
        # A newer Python has a newer JAX, whose collectives are in no file yet.
        end = pytest.fail if sys.version_info < (3, 12) else pytest.skip
        end(f"the golden file is of {version}. Make it anew")
    assert golden_line(mesh, run_experts, exchange) in lines


@pytest.mark.parametrize(("mesh", "run_experts", "exchange"), CASES)
def test_nothing_is_gathered_that_should_stay_where_it_is(mesh, run_experts, exchange):
    """Parameters are gathered over fsdp only; tokens are not gathered.

    The exception is the emulation of the ragged all-to-all, which a CPU needs.
    """
    sizes = MESHES[mesh]
    fsdp = sizes.get("fsdp", 1)
    gathered = [c for c in collectives(mesh, run_experts, exchange) if c.operation == "all-gather"]
    if run_experts == "ragged":
        gathered = [c for c in gathered if "/run_experts/shard_map/" not in c.op_name]
    assert all(c.group_size == fsdp for c in gathered), [(c.shape, c.op_name) for c in gathered]


@pytest.mark.parametrize(
    ("mesh", "run_experts", "exchange"),
    slow_but(
        QUICK,
        [
            (mesh, *way)
            for mesh in ("expert=8", "data=2 expert=4", "fsdp=2 expert=2 tensor=2")
            for way in WAYS
            if way[0] != "ragged"
        ],
    ),
)
def test_slots_travel_by_two_all_to_alls_forward_and_two_backward(mesh, run_experts, exchange):
    """Two MoE layers; each slot has model_dim floats, and with gather a gate that goes one way."""
    totals = by_operation(collectives(mesh, run_experts, exchange))
    config = make_config(MESHES[mesh])
    experts, length, model_dim = 8, config.data.sequence_length, config.model.model_dim
    slots = -(-length * 2 * 5 // (experts * 4))  # K = 2, factor 1.25, a group is one sequence
    own_sequences = 16 // config.mesh.batch_shards
    payload = experts * own_sequences * slots * model_dim * 4
    gates = 2 * 2 if run_experts == "gather" else 0
    assert totals["all-to-all"] == (2 * 4 + gates, 2 * 4 * payload + gates * payload // model_dim)
