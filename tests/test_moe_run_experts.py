"""Every way of running experts gives the same values and gradients.

The oracle decides which choices are kept, and in which slots; these tests see nothing else.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.activations import Relu
from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, FeedForward, gated
from moe_jax.moe.run_experts.gather import run_gather
from moe_jax.moe.run_experts.rows import run_sorted_rows
from moe_jax.moe.run_experts.slots import run_einsum
from tests import moe_oracle
from tests.slow import slow_but

# Sums of a few products of numbers near 1 in float32 (epsilon 1.2e-7), against float64.
FLOAT32 = 2e-6
# bfloat16 keeps 8 bits (epsilon 7.8e-3), and each token is rounded three times.
BFLOAT16 = 5e-2

GROUPS, TOKENS, MODEL_DIM, HIDDEN = 2, 12, 4, 6
ORDERS = ("token_major", "choice_major", "batch_prioritized", "probability", "random")
SIZES = [
    *((1, 1), (2, 1), (2, 2)),
    *((5, k) for k in range(1, 6)),
    *((8, 1), (8, 2), (8, 7), (8, 8)),
    *((64, 1), (64, 6), (64, 64)),
]
FEED_FORWARD = FeedForward(Relu())
QUICK_SIZES = [(1, 1), (5, 2), (8, 8), (64, 6)]


WAYS = {
    "einsum": run_einsum,
    "gather": run_gather,
    "ragged": functools.partial(run_sorted_rows, kernel="loop"),
    # The way of other platforms, with the kernel that runs fastest on a CPU.
    "ragged, dense": functools.partial(run_sorted_rows, kernel="dense"),
}


def every_way(test):
    return pytest.mark.parametrize("name", WAYS)(test)


@functools.partial(jax.jit, static_argnames=("name", "capacity", "dtype", "experts"))
def run(
    name, x_GSM, weights, index_GSK, gate_GSK, slot_GSK, kept_GSK, dy_GSM, capacity, dtype,
    experts=FEED_FORWARD,
):  # fmt: skip
    """The output, and the gradients of sum(y * dy) by name."""
    num_experts = weights["wi"].shape[0]

    def output(x_GSM, gate_GSK, weights):
        assignment = Assignment(
            index_GSK, jnp.where(kept_GSK, gate_GSK, 0), slot_GSK, kept_GSK, capacity, num_experts
        )
        y_GSM = WAYS[name](x_GSM.astype(dtype), assignment, weights, experts)
        assert y_GSM.dtype == dtype
        return y_GSM

    y_GSM, vjp = jax.vjp(output, x_GSM, gate_GSK, weights)
    dx, dgate, dweights = vjp(dy_GSM.astype(dtype))
    return y_GSM, {"x": dx, "gate": dgate} | dweights


class GatesOutputs(Experts):
    """The same network, as one that only computes rows."""

    def __call__(self, x, weights, layout, gate=None):
        return gated(FeedForward(self.activation)(x, weights, layout), gate)


def products_of_a_step(name, experts):
    """Matrix products of the forward and backward pass under remat, before any compiler."""
    x_GSM, weights, dy_GSM = make_values(num_experts=5)
    *choices, slots = make_case(5, 2)
    index_GSK, gate_GSK, slot_GSK, kept_GSK = map(jnp.asarray, choices)

    @jax.checkpoint
    def output(x_GSM, gate_GSK, weights):
        assignment = Assignment(index_GSK, gate_GSK, slot_GSK, kept_GSK, slots, 5)
        return WAYS[name](x_GSM, assignment, weights, experts)

    def step(x_GSM, gate_GSK, weights, dy_GSM):
        y_GSM, vjp = jax.vjp(output, x_GSM, gate_GSK, weights)
        return y_GSM, vjp(dy_GSM)

    lowered = jax.jit(step).lower(x_GSM, gate_GSK, weights, dy_GSM)
    return len(re.findall(r"stablehlo.dot_general|ragged_dot", lowered.as_text()))


def make_case(num_experts, num_selected, order="token_major", padding=0.0, slots=None, seed=0):
    """A random routing and what the oracle keeps of it; `slots` defaults to 3/4 of the mean."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(GROUPS, TOKENS, num_experts)).astype(np.float32)
    logits[..., 0] += 0.5  # a favourite, whose queue overflows
    probs = np.apply_along_axis(moe_oracle.softmax, -1, logits)
    index = np.argsort(-logits, axis=-1)[..., :num_selected]
    gate = np.take_along_axis(probs, index, axis=-1).astype(np.float32)
    valid = random.random((GROUPS, TOKENS)) >= padding
    if slots is None:
        slots = max(1, 3 * TOKENS * num_selected // (4 * num_experts))
    kept, slot = np.zeros(index.shape, bool), np.zeros(index.shape, np.int32)
    for g in range(GROUPS):
        if order == "random":
            pairs = [divmod(int(p), num_selected) for p in random.permutation(index[g].size)]
        else:
            pairs = moe_oracle.queue(order, probs[g], gate[g])
        kept[g], slot[g] = moe_oracle.serve(index[g], pairs, slots, valid[g])
    return index.astype(np.int32), gate, slot, kept, slots


def make_values(num_experts, seed=1):
    """Tokens, expert weights, and the output's gradient."""
    random = np.random.default_rng(seed)
    shapes = {
        "wi": (num_experts, MODEL_DIM, HIDDEN), "bi": (num_experts, HIDDEN),
        "wo": (num_experts, HIDDEN, MODEL_DIM), "bo": (num_experts, MODEL_DIM),
    }  # fmt: skip
    weights = {n: random.normal(size=s).astype(np.float32) / 2 for n, s in shapes.items()}
    x, dy = random.normal(size=(2, GROUPS, TOKENS, MODEL_DIM)).astype(np.float32)
    return x, weights, dy


def oracle(x, weights, index, gate, kept, dy):
    y, grads = moe_oracle.relu_experts(
        x.reshape(-1, MODEL_DIM).astype(np.float64),
        {name: np.asarray(value, np.float64) for name, value in weights.items()},
        index.reshape(-1, index.shape[-1]),
        gate.reshape(-1, index.shape[-1]).astype(np.float64),
        kept.reshape(-1, index.shape[-1]),
        dy.reshape(-1, MODEL_DIM).astype(np.float64),
    )
    grads["x"], grads["gate"] = grads["x"].reshape(x.shape), grads["gate"].reshape(gate.shape)
    return y.reshape(x.shape), grads


def check(name, case, values, tolerance=FLOAT32, dtype="float32", experts=FEED_FORWARD):
    """Compares one way with the oracle; returns its output and gradients."""
    (index, gate, slot, kept, slots), (x, weights, dy) = case, values
    y, grads = run(name, x, weights, index, gate, slot, kept, dy, slots, dtype, experts)
    expected_y, expected_grads = oracle(x, weights, index, gate, kept, dy)
    compare(y, expected_y, "output", tolerance)
    assert sorted(grads) == sorted(expected_grads)
    for key, expected in expected_grads.items():
        compare(grads[key], expected, key, tolerance)
    return np.asarray(y), jax.tree.map(np.asarray, grads)


def compare(got, expected, what, tolerance):
    """Asserts that the largest difference is small next to the largest expected entry."""
    scale = max(1.0, float(np.abs(expected).max()))
    difference = np.abs(np.asarray(got, np.float64) - expected).max() / scale
    assert difference <= tolerance, f"{what}: off by {difference:.2e} of {scale:.3g}"


@every_way
@pytest.mark.parametrize(("num_experts", "num_selected"), slow_but(QUICK_SIZES, SIZES))
def test_every_size_order_and_padding_agrees_with_the_oracle(name, num_experts, num_selected):
    values = make_values(num_experts)
    dropped = 0
    for seed, order in enumerate(ORDERS):
        for padding in (0.0, 0.3):
            case = make_case(num_experts, num_selected, order, padding, seed=seed)
            check(name, case, values)
            dropped += np.sum(~case[3])
    assert dropped > 0  # by overflow or as padding, so the cases are not trivial


@every_way
def test_a_network_may_gate_its_outputs(name):
    check(name, make_case(5, 2), make_values(5), experts=GatesOutputs(Relu()))


@pytest.mark.parametrize("name", ["gather", "ragged, dense"])
def test_remat_computes_no_output_again(name):
    """2 products forward, 4 for the gradients, and 1 for the hidden units again."""
    assert products_of_a_step(name, FEED_FORWARD) == 2 + 4 + 1
    assert products_of_a_step(name, GatesOutputs(Relu())) == 2 + 4 + 2


@every_way
@pytest.mark.parametrize(("num_experts", "num_selected"), [(5, 2), (8, 8)])
def test_dropless_agrees_with_the_oracle(name, num_experts, num_selected):
    case = make_case(num_experts, num_selected, slots=TOKENS)
    assert case[3].all()
    check(name, case, make_values(num_experts))


@every_way
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_choices_are_summed_in_float32_whatever_the_dtype(name, tokens):
    """256 + 1 + 1 = 258, but 256 + 1 is 256 in bfloat16. A token's gradient is a sum too."""
    one = np.ones((1, tokens, MODEL_DIM), np.float32)
    index = np.broadcast_to(np.arange(3, dtype=np.int32), (1, tokens, 3))
    slot = np.broadcast_to(np.arange(tokens, dtype=np.int32)[:, None], index.shape)
    _, weights, _ = make_values(3)
    for order in ([256, 1, 1], [1, 1, 256]):
        scale_E = np.array(order, np.float32)
        weights = {key: np.zeros_like(value) for key, value in weights.items()}
        weights["wi"] += scale_E[:, None, None] * np.eye(MODEL_DIM, HIDDEN, dtype=np.float32)
        weights["wo"] += np.eye(HIDDEN, MODEL_DIM, dtype=np.float32)
        gate, kept = np.ones(index.shape, np.float32), np.ones(index.shape, bool)
        y, grads = run(name, one, weights, index, gate, slot, kept, one, tokens, "bfloat16")
        np.testing.assert_array_equal(np.float32(y), 258 * one)
        np.testing.assert_array_equal(grads["x"], 258 * one)


@every_way
@pytest.mark.parametrize("slots", [1, TOKENS])
def test_all_tokens_may_choose_one_expert_and_leave_the_others_empty(name, slots):
    index, gate, slot, kept, _ = make_case(5, 1)
    index[:] = 3
    for g in range(GROUPS):
        pairs = [(s, 0) for s in range(TOKENS)]
        kept[g], slot[g] = moe_oracle.serve(index[g], pairs, slots, np.ones(TOKENS, bool))
    assert kept.sum() == GROUPS * slots
    _, grads = check(name, (index, gate, slot, kept, slots), make_values(5))
    for weight in ("wi", "bi", "wo", "bo"):
        assert not grads[weight][[0, 1, 2, 4]].any()
        assert grads[weight][3].any()


@every_way
def test_no_choice_kept_gives_zeros_everywhere(name):
    index, gate, slot, kept, slots = make_case(5, 2, padding=1.0)
    assert not kept.any()
    y, grads = check(name, (index, gate, slot, kept, slots), make_values(5))
    assert not y.any()
    assert not any(grad.any() for grad in grads.values())


@every_way
@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "bfloat16"]))
def test_a_fully_dropped_token_gets_exactly_zero_and_gives_no_gradient(name, dtype):
    index, gate, slot, kept, slots = make_case(8, 2, "random", padding=0.3)
    x, weights, dy = make_values(8)
    y, grads = run(name, x, weights, index, gate, slot, kept, dy, slots, dtype)
    dropped = ~kept.any(axis=-1)
    assert dropped.any()
    assert not np.asarray(y)[dropped].any()
    assert not np.asarray(grads["x"])[dropped].any()
    assert np.asarray(y)[~dropped].all(axis=-1).all()


@every_way
def test_a_dropped_choice_contributes_exactly_zero(name):
    index, gate, slot, kept, slots = make_case(5, 2)
    x, weights, dy = make_values(5)
    partly = kept[..., 0] != kept[..., 1]
    assert partly.any()
    y, _ = run(name, x, weights, index, gate, slot, kept, dy, slots, "float32")
    # The expert, slot and gate of a dropped choice do not change a bit of the output.
    changed_index = np.where(kept, index, 4 - index)
    changed_gate = np.where(kept, gate, 7.0).astype(np.float32)
    changed_slot = np.where(kept, slot, slots + 3)
    changed, _ = run(
        name, x, weights, changed_index, changed_gate, changed_slot, kept, dy, slots, "float32"
    )
    np.testing.assert_array_equal(changed, y)


@every_way
def test_a_gate_that_underflowed_to_zero_keeps_its_slot(name):
    # A mask "combine > 0" would lose this choice, and with it the gradient of its gate.
    index, gate, slot, kept, slots = make_case(5, 2)
    zeroed = kept & (np.arange(2) == 1)
    gate[zeroed] = 0.0
    _, grads = check(name, (index, gate, slot, kept, slots), make_values(5))
    assert np.abs(grads["gate"][zeroed]).min() > 0


@every_way
@pytest.mark.parametrize(("num_experts", "num_selected"), slow_but([(5, 2)], [(5, 2), (8, 7)]))
def test_bfloat16_agrees_with_the_oracle(name, num_experts, num_selected):
    # The oracle's inputs are rounded to bfloat16, so only the arithmetic differs.
    rounded = jax.tree.map(
        lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32), make_values(num_experts)
    )
    case = make_case(num_experts, num_selected, "choice_major", padding=0.2)
    check(name, case, rounded, BFLOAT16, "bfloat16")


@every_way
def test_slots_may_be_used_in_any_order(name):
    index, gate, slot, kept, slots = make_case(5, 2)
    values = make_values(5)
    y, _ = check(name, (index, gate, slot, kept, slots), values)
    backwards = np.where(kept, slots - 1 - slot, slot).astype(np.int32)
    y_backwards, _ = check(name, (index, gate, backwards, kept, slots), values)
    compare(y_backwards, y.astype(np.float64), "output", FLOAT32)
