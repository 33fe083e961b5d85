"""The whole block against the float64 oracle, and what must not change its output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.activations import GeGLU, Gelu, SwiGLU
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.block import moe_block, tokens_per_group
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import (
    FlaxformerLoadBalance,
    HuggingFaceLoadBalance,
    LoadBalance,
    SwitchLoadBalance,
)
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import BatchPrioritized, ByProbability, ChoiceMajor, TokenMajor
from moe_jax.moe.routing.logits import Linear, Sigmoid, SoftmaxOverSelected
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS, plan_experts
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, Dims, Own
from tests import moe_oracle
from tests.slow import slow_but

# Relative to the largest entry: sums of products in float32, through router and experts.
FLOAT32 = 5e-6
# Two roundings to 8 bits in the experts and one in the gate.
BFLOAT16 = 5e-2

BATCH, LENGTH, MODEL_DIM = 2, 6, 4
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)


RUN = [way for way in IMPLEMENTATIONS if way != "auto"]


def make_block(**settings):
    settings = {"num_experts": 5, "num_selected_experts": 2, "expert_dim": 3} | settings
    return MoE(**({"run_experts": "einsum"} | settings))


def make_values(moe, seed=0, batch=BATCH):
    """Parameters (biases too), tokens and an output gradient, near 1."""
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda s: random.normal(size=s.shape).astype(np.float32), moe.specs(Dims(MODEL_DIM))
    )
    x, dy = random.normal(size=(2, batch, LENGTH, MODEL_DIM)).astype(np.float32)
    return params, x, dy


def calls(moe, factor, valid, bias):
    """The block's arguments; the default capacity factor is that of training."""
    factor = moe.capacity.train_factor if factor is None else factor
    segments = None if valid is None else jnp.asarray(valid, jnp.int32)
    state = None if bias is None else {"bias_E": bias}
    return Call(capacity=factor, segments_BL=segments), Own(state=state)


@functools.partial(jax.jit, static_argnames=("moe", "factor"))
def run(params, x, moe, factor=None, valid=None, bias=None):
    return moe_block(params, x, moe, *calls(moe, factor, valid, bias))


def of_one_layer(aux):
    """A block's aux, as a stack of one such layer returns it."""
    return jax.tree.map(lambda a: a[None], aux)


def said(moe, aux):
    """What the block reports for one call, by the oracle's names."""
    metrics = {name: value[0] for name, value in moe.metrics(of_one_layer(aux)).items()}
    num_tokens = jnp.maximum(aux.sums["num_tokens"], 1)
    return {
        "assigned_KE": aux.sums["assigned_KE"],
        "kept_KE": aux.sums["kept_KE"],
        "assigned_BE": aux.sequences["assigned_BE"],
        "num_tokens": aux.sums["num_tokens"],
        "mean_prob_E": aux.sums["prob_sum_E"] / num_tokens,
        "max_logit": aux.maxima["max_logit"],
        "load_balance_loss": metrics["load_balance_loss"],
        "router_z_loss": metrics["router_z_loss"],
        "router_loss": metrics["router_loss"],
        "router_entropy": metrics["router_entropy"],
        "max_violation": metrics["max_violation"],
        "dropped_fraction_K": metrics["dropped_fraction_by_choice"],
    }


WEIGHTS = (0.7, 0.3)  # balance and z-loss weights in the objective of the gradient tests


@functools.partial(jax.jit, static_argnames="moe")
def run_with_gradients(params, x, valid, bias, dy, moe):
    def objective(params, x):
        y, aux = moe_block(params, x, moe, *calls(moe, None, valid, bias))
        metrics = moe.metrics(of_one_layer(aux))
        losses = WEIGHTS[0] * metrics["load_balance_loss"] + WEIGHTS[1] * metrics["router_z_loss"]
        return jnp.sum(y * dy) + losses[0], (y, aux)

    return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)


def close(got, expected, what="", tolerance=FLOAT32):
    expected = np.asarray(expected, np.float64)
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    difference = np.abs(np.asarray(got, np.float64) - expected).max(initial=0) / scale
    assert difference <= tolerance, f"{what}: off by {difference:.2e} of {scale:.3g}"


def close_trees(got, expected, what):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, one), wanted in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        close(one, wanted, f"{what}{jax.tree_util.keystr(path)}")


def tight(**settings):
    return Capacity(train_factor=0.6, **settings)


# Each differs from the default in the setting that names it.
BLOCKS = {
    "plain": {},
    "one choice": {"num_selected_experts": 1},
    "every expert": {"num_selected_experts": 5},
    "one expert": {"num_experts": 1, "num_selected_experts": 1, "use_bias": True},
    "renormalized": {"router": TokenChoice(renormalize=True, scaling_factor=2.5)},
    "after top-k": {"router": TokenChoice(score=SoftmaxOverSelected())},
    "sigmoid": {"router": TokenChoice(score=Sigmoid(), renormalize=True)},
    "biased logits": {"router": TokenChoice(projection=Linear(use_bias=True))},
    "grouped": {
        "num_experts": 6,
        "router": TokenChoice(groups=ExpertGroups(3, num_selected=2, worth="top2_sum")),
    },
    "gelu, biases": {"activation": Gelu(), "use_bias": True},
    "swiglu": {"activation": SwiGLU()},
    "geglu, biases": {"activation": GeGLU(), "use_bias": True},
    "shared": {"shared_expert_dim": 6},
    "shared, gated": {
        "shared_expert_dim": 3,
        "shared_expert_gate": True,
        "activation": SwiGLU(),
        "use_bias": True,
    },
    "choice-major": {"capacity": tight(queue=ChoiceMajor())},
    "prioritized": {"capacity": tight(queue=BatchPrioritized())},
    "probability": {"capacity": tight(queue=ByProbability())},
    "dropless": {"capacity": Capacity(train_factor=0)},
    "two slots": {"capacity": Capacity(slots=2)},
    "small groups": {"group_size": 3, "capacity": tight()},
    "large groups": {"group_size": 12, "capacity": tight()},
    "flaxformer": {
        "capacity": Capacity(preset="flaxformer"),
        "losses": (FlaxformerLoadBalance(weight=0.01, scope="sequence"), RouterZ()),
    },
}


QUICK_BLOCKS = [
    "plain", "one expert", "sigmoid", "grouped", "geglu, biases", "shared, gated", "prioritized",
    "dropless", "small groups", "flaxformer",
]  # fmt: skip


@pytest.mark.parametrize("name", slow_but(QUICK_BLOCKS, BLOCKS))
def test_output_aux_and_every_gradient_equal_the_oracle(name):
    moe = make_block(**BLOCKS[name])
    params, x, dy = make_values(moe)
    bias = np.linspace(0.2, -0.2, moe.num_experts, dtype=np.float32)
    decided = moe_oracle.moe_block(params, x, moe, valid_BL=VALID, bias_E=bias)
    (grads, dx), (y, aux) = run_with_gradients(params, x, VALID, bias, dy, moe)

    close(y, decided.y_BLM, "output")
    for field, value in said(moe, aux).items():
        close(value, getattr(decided, field), field)
    value, expected, expected_dx = moe_oracle.gradients(params, x, moe, decided, dy, *WEIGHTS)
    # The oracle's two ways, loops and dense algebra, agree with each other.
    by_loops = np.sum(decided.y_BLM * dy) + np.dot(
        WEIGHTS, [decided.load_balance_loss, decided.router_z_loss]
    )
    assert value == pytest.approx(by_loops, rel=1e-12)
    close_trees(grads, expected, "gradient of ")
    close(dx, expected_dx, "gradient of the input")


def test_the_tight_blocks_drop_and_the_dropless_does_not():
    for name in ("choice-major", "prioritized", "probability", "small groups", "large groups"):
        moe = make_block(**BLOCKS[name])
        params, x, _ = make_values(moe)
        assert moe_oracle.moe_block(params, x, moe).dropped_fraction_K.max() > 0.1
    moe = make_block(**BLOCKS["dropless"])
    params, x, _ = make_values(moe)
    assert not moe_oracle.moe_block(params, x, moe).dropped_fraction_K.any()


@pytest.mark.parametrize("way", ["gather", "ragged"])
@pytest.mark.parametrize(
    "name",
    slow_but(QUICK_BLOCKS, ["shared, gated", "probability", "small groups", "large groups"]),
)
def test_experts_run_in_any_way_serve_the_whole_block(name, way):
    moe = make_block(**BLOCKS[name], run_experts=way)
    params, x, dy = make_values(moe)
    decided = moe_oracle.moe_block(params, x, moe, valid_BL=VALID)
    (grads, dx), (y, aux) = run_with_gradients(params, x, VALID, None, dy, moe)
    close(y, decided.y_BLM, "output")
    close(aux.sums["kept_KE"], decided.kept_KE, "kept_KE")
    _, expected, expected_dx = moe_oracle.gradients(params, x, moe, decided, dy, *WEIGHTS)
    close_trees(grads, expected, "gradient of ")
    close(dx, expected_dx, "gradient of the input")


def test_auto_is_a_known_way():
    assert plan_experts(make_block(run_experts="auto")).rows in RUN
    assert plan_experts(make_block()).rows == "einsum"


@pytest.mark.parametrize("way", RUN)
def test_bfloat16_tokens_keep_a_float32_router(way):
    moe = make_block(run_experts=way, shared_expert_dim=3, shared_expert_gate=True)
    params, x, _ = make_values(moe)
    x16 = jnp.asarray(x, jnp.bfloat16)
    y, aux = run(params, x16, moe, valid=VALID)
    assert y.dtype == jnp.bfloat16
    decided = moe_oracle.moe_block(params, np.asarray(x16, np.float32), moe, valid_BL=VALID)
    close(y, decided.y_BLM, "output", BFLOAT16)
    # For the same tokens, what the router reports is exact to float32.
    for field, value in said(moe, aux).items():
        assert value.dtype in (jnp.float32, jnp.int32)
        close(value, getattr(decided, field), field)


def test_a_gate_that_underflows_still_takes_its_slot():
    # Both tokens choose expert 0, then 1. Expert 1's probability is exp(-200), which is 0 in
    # float32. The first token still takes expert 1's only slot.
    moe = make_block(num_experts=2, capacity=Capacity(train_factor=0.5))
    params, _, _ = make_values(moe)
    params["router"]["weight"] = np.zeros((MODEL_DIM, 2), np.float32)
    params["router"]["weight"][0] = 100, -100
    _, aux = run(params, np.ones((1, 2, MODEL_DIM), np.float32), moe)
    assert aux.sums["kept_KE"].tolist() == [[1, 0], [0, 1]]


def test_a_fully_dropped_token_gets_exactly_zero():
    # All tokens choose expert 0 first and 1 second. With one slot per expert, token 0 gets both.
    for way in RUN:
        moe = make_block(
            num_experts=2, capacity=Capacity(train_factor=0.1), use_bias=True,
            run_experts=way,
        )  # fmt: skip
        params, _, _ = make_values(moe)
        y, aux = run(params, np.ones((BATCH, LENGTH, MODEL_DIM), np.float32), moe)
        assert np.asarray(y)[:, 0].all() and not np.asarray(y)[:, 1:].any()
        np.testing.assert_allclose(said(moe, aux)["dropped_fraction_K"], 5 / 6, rtol=FLOAT32)


def test_padding_gets_zero_even_from_shared_experts():
    moe = make_block(shared_expert_dim=3, use_bias=True)
    params, x, _ = make_values(moe)
    y, _ = run(params, x, moe, valid=VALID)
    assert np.asarray(y)[VALID].any(axis=-1).all()
    assert not np.asarray(y)[~VALID].any()


@pytest.mark.parametrize("queue", [TokenMajor(), ChoiceMajor(), BatchPrioritized()], ids=str)
def test_what_padding_holds_changes_nothing(queue):
    moe = make_block(capacity=tight(queue=queue))
    params, x, _ = make_values(moe)
    valid = np.array([[0, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1]], bool)
    y, aux = run(params, x, moe, valid=valid)
    other = np.where(valid[..., None], x, 5.0).astype(np.float32)
    other_y, other_aux = run(params, other, moe, valid=valid)
    np.testing.assert_array_equal(y, other_y)
    jax.tree.map(np.testing.assert_array_equal, aux, other_aux)


def test_a_batch_of_padding_alone_gives_zeros_and_no_nan():
    moe = make_block(shared_expert_dim=3)
    params, x, dy = make_values(moe)
    nothing = np.zeros((BATCH, LENGTH), bool)
    (grads, dx), (y, aux) = run_with_gradients(params, x, nothing, None, dy, moe)
    for leaf in jax.tree.leaves((grads, dx, y, aux)):
        assert not np.any(leaf)


@pytest.mark.parametrize("seed", range(5))
def test_renaming_the_experts_leaves_the_output_unchanged(seed):
    moe = make_block(capacity=tight(), use_bias=True)
    params, x, _ = make_values(moe, seed)
    order = np.random.default_rng(seed).permutation(5)
    renamed = {
        "router": jax.tree.map(lambda v: v[:, order], params["router"]),
        "experts": jax.tree.map(lambda v: v[order], params["experts"]),
    }
    y, aux = run(params, x, moe, valid=VALID)
    renamed_y, renamed_aux = run(renamed, x, moe, valid=VALID)
    close(renamed_y, y, "output")
    got, expected = said(moe, renamed_aux), said(moe, aux)
    for field in ("assigned_KE", "kept_KE", "assigned_BE"):
        np.testing.assert_array_equal(got[field], expected[field][:, order])
    close(got["mean_prob_E"], expected["mean_prob_E"][order])
    for field in ("load_balance_loss", "router_z_loss", "router_entropy", "max_violation"):
        close(got[field], expected[field], field)


@pytest.mark.parametrize("queue", [TokenMajor(), ChoiceMajor(), ByProbability()], ids=str)
@pytest.mark.parametrize("way", RUN)
def test_a_sequence_does_not_depend_on_the_rest_of_its_batch(queue, way):
    moe = make_block(capacity=tight(queue=queue), run_experts=way)
    params, x, _ = make_values(moe)
    y, aux = run(params, x, moe)
    assert said(moe, aux)["dropped_fraction_K"].max() > 0
    other = np.stack([x[0], -3 * x[1]])
    close(run(params, other, moe)[0][0], y[0])
    close(run(params, x[::-1], moe)[0], y[::-1])
    assigned_BE = run(params, x[::-1], moe)[1].sequences["assigned_BE"]
    np.testing.assert_array_equal(assigned_BE, aux.sequences["assigned_BE"][::-1])


def test_groups_of_two_sequences_share_their_slots():
    # This option depends on the batch: the second sequence finds slots taken.
    moe = make_block(group_size=12, capacity=tight())
    params, x, _ = make_values(moe)
    y, _ = run(params, x, moe)
    other_y, _ = run(params, np.stack([-3 * x[0], x[1]]), moe)
    assert np.abs(other_y[1] - y[1]).max() > 0.01


@pytest.mark.parametrize(
    ("batch", "length", "group_size", "tokens"),
    [(4, 6, 0, 6), (4, 6, 6, 6), (4, 6, 3, 3), (4, 6, 12, 12), (4, 6, 24, 24)],
)
def test_groups_that_fit(batch, length, group_size, tokens):
    assert tokens_per_group(batch, length, group_size) == tokens


@pytest.mark.parametrize("group_size", [4, 5, 9, 18, 48])
def test_groups_that_do_not_fit_are_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size}, batch of 4 sequences of 6"):
        tokens_per_group(4, 6, group_size)


def test_capacity_defaults_to_that_of_training_or_of_evaluation():
    moe = make_block(capacity=Capacity(train_factor=0.6, eval_factor=0.4))
    params, x, _ = make_values(moe)

    @functools.partial(jax.jit, static_argnames="factor")
    def output(factor, rng):
        return moe_block(params, x, moe, Call(capacity=factor, rng=rng))[0]

    for rng, factor in ((jax.random.key(0), 0.6), (None, 0.4)):
        np.testing.assert_array_equal(output(None, rng), output(factor, rng))
    assert np.abs(output(0.6, None) - output(0.4, None)).max() > 0
    _, aux = run(params, x, moe, 0.0)
    np.testing.assert_array_equal(aux.sums["kept_KE"], aux.sums["assigned_KE"])


def test_no_router_for_one_expert():
    specs = make_block(num_experts=1, num_selected_experts=1).specs(Dims(MODEL_DIM))
    assert "router" not in specs


PARTS = [
    LoadBalance(weight=0.1),
    SwitchLoadBalance(weight=0.1),
    FlaxformerLoadBalance(weight=0.1),
    HuggingFaceLoadBalance(weight=0.1),
    LoadBalance(weight=0.1, scope="group"),
    FlaxformerLoadBalance(weight=0.1, scope="sequence"),
]


def merged(parts):
    """Merges the aux of a batch's parts: sums are added, and the largest maximum is kept."""
    first, *rest = [part._replace(sequences={}) for part in parts]
    for part in rest:
        first = first._replace(
            sums=jax.tree.map(jnp.add, first.sums, part.sums),
            maxima=jax.tree.map(jnp.maximum, first.maxima, part.maxima),
        )
    return first


def assert_merged(moe, parts, whole, layers=False):
    """Asserts that the parts' merged aux, its metrics and loss equal those of the whole batch."""
    auxes = [*parts, whole] if layers else [of_one_layer(aux) for aux in (*parts, whole)]
    got, expected = merged(auxes[:-1]), auxes[-1]._replace(sequences={})
    close_trees(got, expected, "aux")
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(got)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(expected)
    ]
    close_trees(moe.metrics(got), moe.metrics(expected), "metrics")
    num_tokens = expected.sums["num_tokens"][0].astype(jnp.float32)
    losses = [moe.loss(aux, num_tokens, expected.sums) for aux in auxes]
    close(sum(losses[:-1]), losses[-1], "loss")


@pytest.mark.parametrize("loss", PARTS, ids=str)
def test_aux_of_parts_merges_to_the_aux_of_the_whole(loss):
    moe = make_block(capacity=tight(), group_size=3, losses=(loss, RouterZ(weight=0.2)))
    params, x, _ = make_values(moe, batch=6)
    # Parts with 8, 6 and 4 tokens; sequences 3 and 4 are padding only.
    valid = np.ones((6, LENGTH), bool)
    valid[1, 2:] = valid[3:] = False
    valid[5, :4] = True
    _, whole = run(params, x, moe, valid=valid)
    parts = [run(params, x[i : i + 2], moe, valid=valid[i : i + 2])[1] for i in (0, 2, 4)]
    assert_merged(moe, parts, whole)


@pytest.mark.parametrize("scope", slow_but(["global"], ["global", "group"]))
def test_aux_of_parts_with_layers_merges_layer_by_layer(scope):
    moe = make_block(losses=(LoadBalance(weight=0.1, scope=scope), RouterZ()))
    params, x, _ = make_values(moe, batch=4)
    layers = [params, make_values(moe, seed=9)[0]]

    def stacked(x):
        return jax.tree.map(lambda *a: jnp.stack(a), *[run(p, x, moe)[1] for p in layers])

    assert_merged(moe, [stacked(x[:2]), stacked(x[2:])], stacked(x), layers=True)


def test_counts_add_up():
    moe = make_block(capacity=tight())
    params, x, _ = make_values(moe)
    _, aux = run(params, x, moe, valid=VALID)
    assigned_KE, assigned_BE = aux.sums["assigned_KE"], aux.sequences["assigned_BE"]
    assert int(aux.sums["num_tokens"]) == VALID.sum()
    np.testing.assert_array_equal(assigned_KE.sum(axis=1), [VALID.sum()] * 2)
    np.testing.assert_array_equal(assigned_BE.sum(axis=1), 2 * VALID.sum(axis=1))
    np.testing.assert_array_equal(assigned_BE.sum(axis=0), assigned_KE.sum(axis=0))
    assert (aux.sums["kept_KE"] <= assigned_KE).all()
    np.testing.assert_allclose(said(moe, aux)["mean_prob_E"].sum(), 1, rtol=FLOAT32)


def test_the_bias_moves_by_the_choices_of_its_own_layer():
    moe = make_block(bias=SignUpdate(rate=0.5))
    state = {"bias_E": jnp.zeros((2, 5))}
    assert moe.state_specs(Dims(MODEL_DIM))["bias_E"].shape == (5,)
    assigned_XKE = jnp.array([[[3, 0, 1, 1, 1], [0, 1, 1, 1, 1]]] * 2).at[1].set(2)
    sums = {"assigned_KE": assigned_XKE, "bias": {}}
    new = moe.next_state(state, sums, jnp.int32(0), 10)
    np.testing.assert_array_equal(new["bias_E"][0], [-0.5, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(new["bias_E"][1], np.zeros(5))


def test_parameters_are_drawn_from_their_own_keys():
    specs = make_block(activation=SwiGLU()).specs(Dims(MODEL_DIM))
    params = init_parameters(jax.random.key(0), specs)
    assert jax.tree.structure(params) == jax.tree.structure(specs)
    assert np.abs(params["experts"]["wi"] - params["experts"]["wg"]).max() > 0.1
