"""A bounded buffer for received rows is exact for rows that fit, and counts the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Assignment, Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts import buffer
from moe_jax.moe.run_experts.buffer import buffer_rows, keep_first, rows_that_fit
from moe_jax.moe.run_experts.parallel import run_parallel
from moe_jax.moe.run_experts.plan import Plan, plan_experts
from moe_jax.moe.run_experts.sorting import UngroupedChoices, sort_by_expert
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.part import Call, Dims
from tests.networks import Network

BATCH, LENGTH, MODEL_DIM, NUM_EXPERTS = 8, 12, 8, 8
TWO_COPIES = MeshConfig(data=2, expert=4)
NO_PADDING = np.random.default_rng(2).random((BATCH, LENGTH)) < 0.9


@pytest.fixture(autouse=True)
def buffers_of_any_size(monkeypatch):
    """Allows buffers of any number of rows."""
    monkeypatch.setattr(buffer, "TILE", 1)


# Buffer size.


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (0, 8000),  # the worst case
        (1, 1024),  # 8 tiles
        (1.25, 1280),  # for 1250 rows
        (1.28, 1280),  # exactly: no extra tile for 1280.0000000000002
        (7.9, 7936),
        (9, 8000),  # no more can arrive
    ],
)
def test_a_bounded_buffer_is_whole_tiles_of_the_factor_over_the_mean(factor, expected, monkeypatch):
    monkeypatch.setattr(buffer, "TILE", 128)
    assert buffer_rows(mean=1000, most=8000, factor=factor) == expected


# Which rows have room.


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (10, [[5, 1], [3, 9]]),  # all
        (6, [[3, 1], [3, 5]]),  # expert 0: six rows after three turns; expert 1: 1 + 5
        (5, [[3, 1], [2, 4]]),  # in expert 0's third turn only the first sender has room
        (1, [[1, 1], [0, 0]]),
    ],
)
def test_runs_take_turns_until_the_buffer_is_full(room, expected):
    rows_QE = jnp.array([[5, 1], [3, 9]])
    np.testing.assert_array_equal(rows_that_fit(rows_QE, num_own=1, room=room), expected)


def in_turns(rows_QE, num_own, room):
    """Row by row, in Python."""
    fitting = np.zeros_like(rows_QE)
    for first in range(0, rows_QE.shape[1], num_own):
        experts = range(first, first + num_own)
        while fitting[:, experts].sum() < min(room, rows_QE[:, experts].sum()):
            for sender in range(len(rows_QE)):
                for expert in experts:
                    has_more = fitting[sender, expert] < rows_QE[sender, expert]
                    if has_more and fitting[:, experts].sum() < room:
                        fitting[sender, expert] += 1
    return fitting


@pytest.mark.parametrize("num_own", [1, 3])
def test_no_run_gets_a_row_out_of_turn(num_own):
    random = np.random.default_rng(0)
    fit = jax.jit(rows_that_fit, static_argnums=(1, 2))
    for room in (1, 7, 20, 64):
        for _ in range(5):
            rows_QE = random.poisson(random.exponential(4, size=(4, 4 * num_own))).astype(np.int32)
            np.testing.assert_array_equal(
                fit(rows_QE, num_own, room), in_turns(rows_QE, num_own, room)
            )


def test_kept_rows_close_the_gaps_of_those_that_are_lost():
    #         token 0  1        2        3
    expert_JK = jnp.array([[0, 1], [1, 0], [2, 1], [1, 2]])
    kept_JK = jnp.array([[True, True], [True, False], [True, True], [True, True]])
    choices = UngroupedChoices(expert_JK, jnp.ones((4, 2)), kept_JK)
    order = sort_by_expert(choices, 3)
    assert order.rows_E.tolist() == [1, 4, 2]
    assert order.choice_R.tolist() == [0, 1, 2, 5, 6, 4, 7, 3]  # token * K + k
    choices, order = keep_first(choices, order, jnp.array([1, 2, 1]))
    assert order.rows_E.tolist() == [1, 2, 1]
    assert order.choice_R[:4].tolist() == [0, 1, 2, 4]
    kept = choices.kept_JK
    assert kept.tolist() == [[True, True], [True, False], [True, False], [False, False]]
    assert order.row_JK[kept].tolist() == [0, 1, 2, 3]


# Exact if all rows have room.


def make_block(**settings):
    return MoE(
        **{
            "num_experts": NUM_EXPERTS, "num_selected_experts": 2, "expert_dim": 8,
            "activation": SwiGLU(), "run_experts": "ragged", "capacity": Capacity(train_factor=0.0),
        } | settings
    )  # fmt: skip


@functools.cache
def run_block(moe, config):
    """Output, gradients and metrics of a training step with uneven expert loads."""
    random = np.random.default_rng(0)
    specs = moe.specs(Dims(MODEL_DIM))
    params = jax.tree.map(
        lambda spec: (random.normal(size=spec.shape) / 2).astype(np.float32), specs
    )
    x, dy = random.normal(size=(2, BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
    call = Call(segments_BL=jnp.asarray(NO_PADDING, jnp.int32), rng=jax.random.key(0))

    def objective(params, x):
        y, aux = moe_block(params, x, moe, call)
        return jnp.sum(y * dy), (y, moe.metrics(jax.tree.map(lambda a: a[None], aux)))

    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)),
            specs,
            params,
        )
        grads, (y, metrics) = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(params, x)
    return jax.tree.map(np.asarray, ((y, grads), metrics))


ROOMY = [
    (TWO_COPIES, {}),
    pytest.param(
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        {"exchange_chunks": 3, "gate_on_input": True, "use_bias": True},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        MeshConfig(slices=2, data=1, expert=4, experts_span_slices=True),
        {"exchange_chunks": 2, "capacity": Capacity(train_factor=1.5), "num_zero_experts": 2},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("mesh", "settings"), ROOMY)
def test_with_room_for_all_values_and_gradients_are_those_of_the_worst_case(mesh, settings):
    exact = make_block(**settings)
    expected, said = run_block(exact, mesh)
    assert "buffer_overflow" not in said  # no bounded buffer
    _, tight = run_block(dataclasses.replace(exact, buffer_factor=1.0), mesh)
    assert tight["buffer_overflow"] > 0
    enough = dataclasses.replace(exact, buffer_factor=float(tight["buffer_factor"][0]) + 1e-6)
    got, metrics = run_block(enough, mesh)
    assert metrics["buffer_overflow"] == 0
    for name in said:
        np.testing.assert_array_equal(metrics[name], said[name], err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_lost_choice_is_a_dropped_one():
    exact = make_block()
    _, said = run_block(exact, TWO_COPIES)
    _, metrics = run_block(dataclasses.replace(exact, buffer_factor=1.0), TWO_COPIES)
    assert said["dropped_fraction"] == 0
    choices = metrics["buffer_overflow"] / metrics["dropped_fraction"]
    np.testing.assert_allclose(choices, 2 * NO_PADDING.sum(), rtol=1e-5)
    # Each device has 12 tokens with 2 choices each.
    assert metrics["buffer_rows"] == pytest.approx(24 * metrics["buffer_factor"])


# Rows without room.

AXES = {"wi": ("expert", "model", "hidden"), "wo": ("expert", "hidden", "model")}
WEIGHTS = np.random.default_rng(1).normal(size=(NUM_EXPERTS, MODEL_DIM, MODEL_DIM))
IDENTITY = np.broadcast_to(np.eye(MODEL_DIM, dtype=np.float32), WEIGHTS.shape)


@functools.cache
def run_all_on_two_experts(num_chunks, kernel, mesh=TWO_COPIES):
    """All tokens choose experts 0 and 1, on one device in each copy of the model; factor 1.

    Returns:
      Tokens, gates, their `Combined` output, and the gradients of its sum by tokens and gates.
    """
    random = np.random.default_rng(0)
    shape = (BATCH, LENGTH, 2)
    x = random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
    gate = random.random(shape, np.float32) + 0.5
    index = np.broadcast_to(np.arange(2, dtype=np.int32), shape)

    weights = {"wi": WEIGHTS.astype(np.float32), "wo": IDENTITY}

    def products(rows, weights, layout):
        return layout.matmul(layout.matmul(rows, weights["wi"]), weights["wo"])

    def output(x, gate):
        kept = jnp.ones(shape, bool)
        assignment = Assignment(index, gate, index, kept, LENGTH, NUM_EXPERTS)
        plan = Plan("ragged", "explicit", num_chunks, buffer_factor=1.0, kernel=kernel)
        out = run_parallel(x, assignment, weights, AXES, Network(compute=products), plan)
        return jnp.sum(out.y), out

    with jax.set_mesh(make_mesh(mesh)):
        grads, out = jax.jit(jax.grad(output, (0, 1), has_aux=True))(x, gate)
    return jax.tree.map(np.asarray, (x, gate, out, grads))


@pytest.mark.parametrize(
    ("num_chunks", "kernel"),
    [(1, "loop"), (3, "loop"), pytest.param(1, "dense", marks=pytest.mark.slow)],
)
def test_what_has_no_room_gives_nothing_and_learns_nothing(num_chunks, kernel):
    """Four devices send 12 tokens twice each to one device: 96 rows, four times the mean of 24.

    That device has room for 24 rows, so every sender keeps 3 rows per expert. With three chunks of
    4 tokens, each chunk has room for 8 of 32 rows: one per sender and expert.
    """
    x, gate, out, (dx, dgate) = run_all_on_two_experts(num_chunks, kernel)
    has_room = np.zeros(LENGTH, bool)
    has_room[[0, 1, 2] if num_chunks == 1 else [0, 4, 8]] = True
    np.testing.assert_array_equal(out.kept, np.broadcast_to(has_room[:, None], out.kept.shape))
    assert out.buffer.rows == 96 // num_chunks and out.buffer.factor == 4
    assert out.buffer.overflow == np.sum(~out.kept)

    products = np.einsum("GSM,KMO->GSKO", x, WEIGHTS[:2])
    expected = np.einsum("GSKO,GSK->GSO", products, gate) * has_room[:, None]
    np.testing.assert_allclose(out.y, expected, atol=1e-5)
    np.testing.assert_array_equal(out.y[:, ~has_room], 0)
    np.testing.assert_allclose(dgate, products.sum(-1) * has_room[:, None], atol=1e-5)
    np.testing.assert_array_equal(dgate[:, ~has_room], 0)
    d_tokens = np.einsum("GSK,KMO->GSM", gate, WEIGHTS[:2]) * has_room[:, None]
    np.testing.assert_allclose(dx, d_tokens, atol=1e-5)
    np.testing.assert_array_equal(dx[:, ~has_room], 0)


def test_devices_that_split_the_hidden_dim_count_a_lost_choice_once():
    """Two devices send 24 tokens twice each to one: 96 rows, twice the mean of 48.

    Every sender keeps 12 rows per expert: the first of its two sequences.
    """
    mesh = MeshConfig(data=2, expert=2, tensor=2)
    x, gate, out, _ = run_all_on_two_experts(1, "loop", mesh)
    has_room = np.arange(BATCH) % 2 == 0
    np.testing.assert_array_equal(out.kept, np.broadcast_to(has_room[:, None, None], gate.shape))
    assert (out.buffer.rows, out.buffer.factor, out.buffer.overflow) == (96, 2, np.sum(~out.kept))
    expected = np.einsum("GSM,KMO,GSK->GSO", x, WEIGHTS[:2], gate) * has_room[:, None, None]
    np.testing.assert_allclose(out.y, expected, atol=1e-5)


# What is declared, and what is refused.


@pytest.mark.parametrize(
    ("settings", "in_training", "in_evaluation"),
    [
        ({}, False, False),
        ({"buffer_factor": 2.0}, True, False),  # evaluation stays exact
        ({"buffer_factor": 2.0, "stop_at_overflow": True}, False, False),
        ({"eval_buffer_factor": 2.0}, False, True),
    ],
)
def test_whether_there_is_room_depends_on_later_tokens(settings, in_training, in_evaluation):
    moe = make_block(**settings)
    assert (moe.looks_ahead(True), moe.looks_ahead(False)) == (in_training, in_evaluation)
    assert moe.depends_on_microbatches == in_training


def test_only_rows_of_the_explicit_exchange_have_a_buffer():
    settings = {"buffer_factor": 2.0, "eval_buffer_factor": 3.0}
    assert plan_experts(make_block(**settings)).buffer_factor == 0  # one device
    with jax.set_mesh(make_mesh(TWO_COPIES)):
        plan = plan_experts(make_block(**settings))
        assert plan.buffer_factor == 2 and str(plan).endswith("buffer of 2 times the mean")
        assert plan_experts(make_block(**settings), training=False).buffer_factor == 3
        by_slots = dataclasses.replace(make_block(**settings), run_experts="auto")
        assert plan_experts(by_slots).buffer_factor == 0
        resolved = by_slots.resolved("float32")
        assert (resolved.run_experts, resolved.buffer_factor) == ("gather", 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"buffer_factor": 0.5},
            r"buffer_factor must be 0 .* or at least 1.*: buffer_factor=0\.5\. ",
        ),
        ({"eval_buffer_factor": 0.9}, r"must be 0 .*: eval_buffer_factor=0\.9\. Set"),
        (
            {"buffer_factor": 2.0, "run_experts": "gather"},
            r"buffer_factor is for .* run_experts='gather'\. Set run_experts='ragged'",
        ),
        (
            {"stop_at_overflow": True},
            r"stop_at_overflow needs a buffer that can overflow: .*buffer_factor=0\. Set",
        ),
    ],
)
def test_a_buffer_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_block(**settings)
