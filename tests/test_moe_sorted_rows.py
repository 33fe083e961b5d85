"""Rows sorted by expert, with groups of any size and any garbage in unused rows.

`expert_loop` is the way of CPUs, `SortedRows` that of other platforms, with any of its kernels
(`test_moe_grouped_matmul`).
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.moe.activations import Relu
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.run_experts import rows
from moe_jax.moe.run_experts.expert_loop import (
    block_sizes,
    expert_loop,
    for_each_block,
    one_by_one,
)
from moe_jax.moe.run_experts.gather import combine, fill, fill_gates
from moe_jax.moe.run_experts.rows import FEW_CHOICES, SortedRows, through_sorted_rows
from moe_jax.moe.run_experts.sorting import UngroupedChoices, sort_by_expert
from tests import moe_oracle
from tests.slow import slow_but

# Sums of up to a few hundred float32 products, relative to the largest.
FLOAT32 = 5e-6
PROPERTIES = settings(max_examples=40)

MODEL_DIM, HIDDEN, EXPERTS = 3, 5, 4
# Rows per expert.
GROUPS = {
    "even": [16, 16, 16, 16],
    "one row": [1, 0, 0, 0],
    "no rows": [0, 0, 0, 0],
    "empty in front": [0, 0, 64, 0],
    "empty behind": [64, 0, 0, 0],
    "empty between": [20, 0, 0, 30],
    "odd": [7, 9, 1, 33],
}
LARGEST = block_sizes(1000, EXPERTS)[-1]
LARGE = {
    "past the largest block": [LARGEST + 1, 0, 300, 0],
    "many largest blocks": [0, 1000, 0, 0],
    "a multiple of the largest block": [2 * LARGEST, 0, 0, 200],
}

EXPERT = FeedForward(Relu())


def make_values(num_rows, seed=0):
    random = np.random.default_rng(seed)
    shapes = {
        "wi": (EXPERTS, MODEL_DIM, HIDDEN), "bi": (EXPERTS, HIDDEN),
        "wo": (EXPERTS, HIDDEN, MODEL_DIM), "bo": (EXPERTS, MODEL_DIM),
    }  # fmt: skip
    weights = {n: random.normal(size=s).astype(np.float32) / 2 for n, s in shapes.items()}
    x, dy = random.normal(size=(2, num_rows, MODEL_DIM)).astype(np.float32)
    return weights, x, dy, random


def loop(x, gate, weights, expert, kept):
    """`expert_loop` with one choice per token."""
    order = sort_by_expert(UngroupedChoices(expert, gate, kept), EXPERTS)
    return expert_loop(EXPERT, weights, None, x, gate, kept, order)


def sorted_rows(kernel, x, gate, weights, expert, kept):
    """The same by `SortedRows`."""
    order = sort_by_expert(UngroupedChoices(expert, gate, kept), EXPERTS)
    layout = SortedRows(None, order.rows_E, len(order.choice_R), kernel)
    y = EXPERT(x[order.choice_R], weights, layout)[order.row_JK[:, 0]]
    return jnp.where(kept, y * gate, 0)


def each_alone(x, gate, weights, expert, kept):
    """The same by `one_by_one`, which is meant for few rows."""
    return one_by_one(x, UngroupedChoices(expert, gate, kept), weights, EXPERT, None)


WAYS = {"loop": loop} | {
    kernel: functools.partial(sorted_rows, kernel) for kernel in ("dense", "megablox", "triton")
}
every_way = pytest.mark.parametrize("way", slow_but(["loop", "dense"], WAYS))


@functools.partial(jax.jit, static_argnames="way")
def run(way, x, gate, weights, expert, kept, dy):
    def output(x, gate, weights):
        return {**WAYS, "one by one": each_alone}[way](x, gate, weights, expert, kept)

    y, vjp = jax.vjp(output, x, gate, weights)
    dx, dgate, dweights = vjp(dy)
    return y, {"x": dx, "gate": dgate} | dweights


def check(way, group_sizes, num_rows):
    """Compares with the oracle: rows in random order, `group_sizes` of them kept per expert."""
    weights, x, dy, random = make_values(num_rows)
    owners = np.repeat(np.arange(EXPERTS), group_sizes)
    expert, kept = np.zeros(num_rows, np.int32), np.zeros(num_rows, bool)
    places = random.permutation(num_rows)[: len(owners)]
    expert[places], kept[places] = owners, True
    gate = random.random((num_rows, 1)).astype(np.float32)
    y, grads = run(way, x, gate, weights, expert[:, None], kept[:, None], dy)
    expected_y, expected = moe_oracle.relu_experts(
        x.astype(float),
        {n: w.astype(float) for n, w in weights.items()},
        expert[:, None], gate.astype(float), kept[:, None], dy.astype(float),
    )  # fmt: skip
    for key, wanted in ({"y": expected_y} | expected).items():
        got = np.asarray(y if key == "y" else grads[key])
        scale = max(1.0, np.abs(wanted).max())
        np.testing.assert_allclose(got / scale, wanted / scale, atol=FLOAT32, err_msg=key)
    for e, size in enumerate(group_sizes):
        assert np.any(grads["wi"][e]) == np.any(expected["wi"][e]) and (
            size or not grads["wi"][e].any()
        )


@every_way
@pytest.mark.parametrize("name", GROUPS)
def test_values_and_gradients_of_groups_of_any_size(way, name):
    check(way, GROUPS[name], 64)


@every_way
@pytest.mark.parametrize("name", LARGE)
def test_groups_larger_than_the_largest_block(way, name):
    assert LARGEST < max(LARGE[name]) and sum(LARGE[name]) <= 1000
    check(way, LARGE[name], 1000)


@every_way
def test_garbage_in_rows_of_no_expert_never_leaks(way):
    # Rows of dropped choices are past the last group; they may hold NaN, as unused memory does.
    weights, x, dy, random = make_values(64)
    expert = random.integers(0, EXPERTS, (64, 1)).astype(np.int32)
    kept = random.random((64, 1)) < 0.5
    gate = random.random((64, 1)).astype(np.float32)
    clean_y, clean = run(way, x, gate, weights, expert, kept, dy)
    x = np.where(kept, x, np.nan).astype(np.float32)
    y, grads = run(way, x, gate, weights, expert, kept, dy)
    np.testing.assert_array_equal(y, clean_y)
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, clean[name], err_msg=name)
    assert not np.asarray(y)[~kept[:, 0]].any()


@every_way
def test_a_bad_row_of_one_expert_does_not_reach_another(way):
    # Blocks overlap the next expert's rows; a NaN there must stay with its owner.
    weights, x, dy, _ = make_values(64)
    expert = np.repeat(np.arange(EXPERTS), 16)[:, None].astype(np.int32)
    kept, gate = np.ones((64, 1), bool), np.ones((64, 1), np.float32)
    x[20] = np.nan  # expert 1
    y, grads = run(way, x, gate, weights, expert, kept, dy)
    assert np.isnan(np.asarray(y)[20]).all()
    assert np.isfinite(np.delete(np.asarray(y), 20, axis=0)).all()
    for name in ("wi", "wo"):
        assert np.isfinite(np.asarray(grads[name])[[0, 2, 3]]).all()


@jax.custom_vjp
def careless_ragged_dot(x, weight, sizes_E):
    """A permissible kernel: rows of no expert come out NaN, and its gradients read them."""
    owner_RE, own_R1 = owners(sizes_E, len(x))
    y = jnp.einsum("RI,RE,EIO->RO", x, owner_RE, weight)
    return jnp.where(own_R1, y, jnp.nan)


def owners(sizes_E, num_rows):
    ends = jnp.cumsum(sizes_E)
    rows = jnp.arange(num_rows)
    owner = jnp.minimum(jnp.searchsorted(ends, rows, side="right"), EXPERTS - 1)
    return jax.nn.one_hot(owner, EXPERTS), (rows < ends[-1])[:, None]


def careless_backward(residuals, dy):
    x, weight, sizes_E = residuals
    owner_RE, own_R1 = owners(sizes_E, len(x))
    dx = jnp.where(own_R1, jnp.einsum("RO,RE,EIO->RI", dy, owner_RE, weight), jnp.nan)
    return dx, jnp.einsum("RI,RE,RO->EIO", x, owner_RE, dy), None


careless_ragged_dot.defvjp(lambda *args: (careless_ragged_dot(*args), args), careless_backward)


def test_what_a_kernel_leaves_in_rows_of_no_expert_never_leaks():
    weights, x, dy, random = make_values(16)
    expert = random.integers(0, EXPERTS, (16, 1)).astype(np.int32)
    kept = random.random((16, 1)) < 0.5
    gate = random.random((16, 1)).astype(np.float32)
    # Tokens of dropped choices are infinite; products with them must not reach a gradient.
    x = np.where(kept, x, np.inf).astype(np.float32)
    clean_y, clean = run("loop", x, gate, weights, expert, kept, dy)
    with mock.patch.object(jax.lax, "ragged_dot", careless_ragged_dot):
        y, grads = run.__wrapped__("dense", x, gate, weights, expert, kept, dy)
    np.testing.assert_allclose(y, clean_y, atol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, clean[name], atol=1e-5, err_msg=name)


def test_matmul_of_sorted_rows_is_zero_past_the_last_group():
    _, x, _, _ = make_values(8)
    weight = np.ones((EXPERTS, MODEL_DIM, HIDDEN), np.float32)
    layout = SortedRows(None, jnp.array([2, 0, 3, 0]), 8, "dense")
    y = np.asarray(layout.matmul(jnp.asarray(x), jnp.asarray(weight)))
    np.testing.assert_allclose(y[:5], x[:5] @ weight[0], rtol=1e-5)
    assert not y[5:].any()
    bias = jnp.arange(EXPERTS)[:, None]
    assert layout.expand(bias)[:5, 0].tolist() == [0, 0, 2, 2, 2]


def test_choices_are_sorted_by_expert_then_token_and_dropped_ones_come_last():
    # Choices 0..5 of three tokens: experts 2 0 | 1 2 | 0 1. Token 1's first choice is dropped.
    expert = jnp.array([[2, 0], [1, 2], [0, 1]])
    kept = jnp.array([[True, True], [False, True], [True, True]])
    choice, row, sizes = sort_by_expert(UngroupedChoices(expert, kept.astype(jnp.float32), kept), 3)
    assert choice.tolist() == [1, 4, 5, 0, 3, 2]
    assert row.tolist() == [[3, 0], [5, 4], [1, 2]]
    assert sizes.tolist() == [2, 1, 2]


def test_more_choices_than_int32_can_sort_are_refused():
    expert = jax.ShapeDtypeStruct((2**23, 1), jnp.int32)
    kept = jax.ShapeDtypeStruct((2**23, 1), jnp.bool_)
    with pytest.raises(ValueError, match=r"fit in int32: num_experts=512.*run_experts='gather'"):
        jax.eval_shape(lambda e, k: sort_by_expert(UngroupedChoices(e, k, k), 512), expert, kept)


@functools.partial(jax.jit, static_argnames="blocks")
def visits(sizes_E, blocks):
    """How many blocks own each row, the expert of each row, and the end of the last block."""

    def body(carry, operand, block):
        count, owner, last = carry
        rows = jnp.arange(64 + blocks[-1])
        own = (rows >= block.start) & (rows < block.start + jnp.minimum(block.size, block.rows))
        end = block.start + block.rows
        return count + own, jnp.where(own, operand, owner), jnp.maximum(last, end)

    zeros = jnp.zeros(64 + blocks[-1], jnp.int32)
    carry = (zeros, zeros - 1, jnp.int32(0))
    return for_each_block(sizes_E, blocks, carry, jnp.arange(EXPERTS), body)


@PROPERTIES
@given(sizes=st.lists(st.integers(0, 16), min_size=EXPERTS, max_size=EXPERTS))
def test_every_row_is_in_one_block_of_its_expert(sizes):
    blocks = (2, 3, 8)
    count, owner, last = visits(jnp.array(sizes, jnp.int32), blocks)
    total = sum(sizes)
    assert np.asarray(count)[:total].tolist() == [1] * total
    assert not np.asarray(count)[total:].any()
    assert np.asarray(owner)[:total].tolist() == np.repeat(np.arange(EXPERTS), sizes).tolist()
    assert last < total + blocks[0]


@pytest.mark.parametrize(("rows", "experts"), [(48, 1), (16, 2), (40, 4)])
def test_fewer_rows_than_were_likely(rows, experts):
    """As on a mesh where an expert gets less than its share: values and gradients stay the same."""
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, rows, MODEL_DIM)).astype(np.float32)
    weights = {
        "wi": random.normal(size=(experts, MODEL_DIM, HIDDEN)).astype(np.float32),
        "wo": random.normal(size=(experts, HIDDEN, MODEL_DIM)).astype(np.float32),
    }
    expert = jnp.asarray(random.integers(experts, size=(rows, 1)), jnp.int32)
    gate = np.ones((rows, 1), np.float32)

    def run(likely_rows):
        def output(x, weights):
            choices = UngroupedChoices(expert, gate, gate > 0)
            return through_sorted_rows(x, choices, weights, EXPERT, None, "loop", likely_rows)

        y, vjp = jax.vjp(output, jnp.asarray(x), weights)
        return y, vjp(jnp.asarray(dy))

    jax.tree.map(np.testing.assert_array_equal, run(2 * rows), run(None))


@pytest.mark.parametrize("rows", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("experts", [1, 8, 512])
def test_block_sizes_ascend_and_are_whole_vectors(rows, experts):
    sizes = block_sizes(rows, experts)
    assert list(sizes) == sorted(set(sizes))
    assert all(size % 8 == 0 and size > 0 for size in sizes)
    assert experts > 1 or sizes[-1] >= rows


def test_few_choices_one_by_one():
    """Two rows of one expert, experts without rows, and rows that no expert gets."""
    check("one by one", [2, 0, 1, 0], num_rows=5)


@pytest.mark.parametrize("few", [FEW_CHOICES, 0])
def test_few_choices_read_weights_where_they_lie(few):
    """In a scan over layers. A loop over experts instead copies all experts of each layer."""
    layers, experts, dim = 3, 16, 32
    weights = {"wi": np.ones((layers, experts, dim, dim), np.float32)}
    weights["wo"] = weights["wi"]
    x, expert, gate = np.ones((1, dim)), np.array([[3, 5]], np.int32), np.ones((1, 2), np.float32)

    def layer(x, weights):
        choices = UngroupedChoices(expert, gate, gate > 0)
        y = through_sorted_rows(x, choices, weights, EXPERT, None, "loop")
        return x + y, None

    with mock.patch.object(rows, "FEW_CHOICES", few):
        program = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(x, weights)
    of_a_layer = weights["wi"].nbytes * 2 // layers
    copied = program.compile().memory_analysis().temp_size_in_bytes
    assert copied < of_a_layer / 2 if few else copied >= of_a_layer


def test_rows_after_the_kept_choices_are_empty():
    """Expert 0 has choice 1, expert 1 choices 0 and 3; choice 2 is dropped."""
    kept_JK = jnp.array([[True, True], [False, True]])
    choices = UngroupedChoices(jnp.array([[1, 0], [0, 1]]), jnp.ones((2, 2)), kept_JK)
    places = sort_by_expert(choices, 2).places(kept_JK)
    assert places.choice_P.tolist() == [1, 0, 3, 4]
    assert fill(jnp.array([[1.0], [10.0]]), places).tolist() == [[1], [1], [10], [0]]
    gate_R1 = fill_gates(jnp.array([[0.1, 0.2], [0.3, 0.4]]), places)
    np.testing.assert_array_equal(gate_R1[:, 0], np.float32([0.2, 0.1, 0.4, 0]))
    # The empty row is not read, whatever is in it; its gradient is 0.
    rows_R1 = jnp.array([[1.0], [2.0], [4.0], [np.nan]])
    y_J1, vjp = jax.vjp(lambda rows: combine(rows, places), rows_R1)
    assert y_J1.tolist() == [[3], [4]]
    assert vjp(jnp.array([[5.0], [7.0]]))[0].tolist() == [[5], [5], [7], [0]]
