"""The training step: cutting the batch, padding, remat and dtype change memory and speed only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models import Decoder
from moe_jax.moe.statistics import merge_aux
from moe_jax.training.loss import batch_totals
from moe_jax.training.step import gradient, make_train_step
from tests.tiny_run import cut, quick_jit, tiny_batch, tiny_config, tiny_state

FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}  # sums of some hundred float32 terms, in another order
# Of a loss near log(384) = 6: two layers of bfloat16 with its 8 bits of mantissa, before the head.
BFLOAT16_LOSS_ERROR = 0.05
NUM_VALID = 16 + 13 + 0 + 5  # tokens of tiny_batch()
RATE = 0.01


def make(balance=None, **sections):
    moe = {"group_size": 8, **sections.pop("moe", {}), "balance": balance or {}}
    model = {**sections.pop("model", {}), "moe": moe}
    config = tiny_config({"model": model, **sections})
    return config, tiny_state(config)


def all_balance(**settings):
    """Every balance mechanism at once, strong enough to see."""
    strong = {"load_balance_weight": 0.3, "router_z_loss_weight": 0.1, "bias_update_rate": RATE}
    return strong | settings


@functools.partial(quick_jit, static_argnums=(2, 3))
def gradient_in_parts(state, batch, model, num_parts):
    """Loss, cross-entropy, gradient and aux, with the batch in so many parts."""
    parts = cut(batch, num_parts)
    keys = jax.random.split(jax.random.key(0), num_parts)
    loss, grads, said = gradient(state, parts, keys, batch_totals(batch), model)
    return loss, jnp.sum(said.cross_entropy), grads, merge_aux(said.aux, model.moe)


def step_once(config, state, batch):
    parts = cut(batch, config.training.num_microbatches)
    return quick_jit(make_train_step(config))(state, parts)


def assert_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


CUTS = [
    (scope, convention, num_parts)
    for scope in ("group", "sequence", "global")
    for convention in ("megatron", "switch", "flaxformer", "huggingface")
    if scope == "global" or convention != "huggingface"  # the others are refused by the config
    for num_parts in (2, 4)
]
QUICK = {
    ("group", "megatron", 4),
    ("global", "megatron", 2),
    ("global", "megatron", 4),
    ("global", "huggingface", 4),
}


@pytest.mark.parametrize(
    ("scope", "convention", "num_parts"),
    [pytest.param(*cut, marks=() if cut in QUICK else pytest.mark.slow) for cut in CUTS],
)
def test_loss_and_gradient_do_not_depend_on_the_number_of_parts(scope, convention, num_parts):
    """Though rows have 16, 13, 0 and 5 valid tokens, and uneven loss weights."""
    balance = all_balance(load_balance_scope=scope, load_balance_convention=convention)
    config, state = make(balance)
    # Biases that move choices: what convention "megatron" counts is something else then.
    state = state._replace(router_bias_XE=jnp.array([[0.0, 0.3, 0.0, -0.1], [0.2, 0.0, 0.0, 0.0]]))
    batch = tiny_batch()
    whole = gradient_in_parts(state, batch, config.model, 1)
    parts = gradient_in_parts(state, batch, config.model, num_parts)
    assert_close(parts, whole, **FLOAT32)


def test_scope_microbatch_is_the_mean_over_the_parts_by_their_tokens():
    """Here the number of parts is part of the definition: loads are those of one part."""
    config, state = make(all_balance(load_balance_scope="microbatch"))
    model, batch = config.model, tiny_batch()
    alone = [
        gradient_in_parts(state, {n: x[rows] for n, x in batch.items()}, model, 1)[3]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    together = gradient_in_parts(state, batch, model, 2)
    z = jnp.mean(together[3].router_z_loss)
    balance = (together[0] - together[1] - 0.1 * z) / 0.3
    weights = np.array([29, 5]) / NUM_VALID
    expected = sum(w * np.mean(a.load_balance_loss) for w, a in zip(weights, alone, strict=True))
    np.testing.assert_allclose(balance, expected, rtol=1e-4)
    whole = gradient_in_parts(state, batch, model, 1)
    assert abs(whole[0] - together[0]) > 1e-3


def test_a_step_in_microbatches_is_the_same_step():
    """Parameters and bias after it too. SGD-like epsilon: Adam's first step is a sign else."""
    outcomes = []
    for num_microbatches in (1, 4):
        config, state = make(
            all_balance(bias_update="quantile", bias_update_rate=0.5),
            moe={"router": {"score": "sigmoid"}},
            training={"num_microbatches": num_microbatches},
            optimizer={"epsilon": 1.0},
        )
        outcomes.append(step_once(config, state, tiny_batch()))
    (one, one_says), (four, four_says) = outcomes
    assert_close(four_says, one_says, **FLOAT32)
    assert_close(four.params, one.params, **FLOAT32)
    assert_same_bits(four.router_bias_XE, one.router_bias_XE)
    assert np.ptp(four.router_bias_XE, axis=1).min() > 0.01
    assert four_says.aux.needed_bias_EQ is None
    assert int(four.step) == int(one.step) == 1


def test_the_router_bias_is_updated_once_a_step_from_the_counts_of_the_whole_batch():
    config, state = make(all_balance(), training={"num_microbatches": 4})
    old_XE = jnp.array([[0.0, 0.3, 0.0, -0.1], [0.2, 0.0, 0.0, 0.0]])
    state = state._replace(router_bias_XE=old_XE)
    batch = tiny_batch()
    new, says = step_once(config, state, batch)

    aux = quick_jit(
        lambda params: Decoder(config.model).apply(
            {"params": params},
            batch["inputs"],
            batch["positions"],
            batch["segment_ids"],
            router_bias_XE=old_XE,
            capacity_factor=config.model.moe.capacity.train_factor,
        )
    )(state.params).aux
    counts_XE = np.asarray(aux.assigned_KE).sum(axis=1)
    np.testing.assert_array_equal(counts_XE.sum(axis=1), 2 * NUM_VALID)
    np.testing.assert_array_equal(np.asarray(says.aux.assigned_KE).sum(axis=1), counts_XE)
    # An overloaded expert is selected less: its bias falls.
    expected = old_XE + RATE * np.sign(2 * NUM_VALID / 4 - counts_XE)
    assert np.any(expected != old_XE)
    np.testing.assert_allclose(new.router_bias_XE, expected, rtol=1e-6)

    # It is neither a parameter nor has it moments: those have the names of the parameters.
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params)]
    assert not any("bias" in name for name in names)
    adam = new.opt_state[1]
    assert jax.tree.structure(adam.mu) == jax.tree.structure(adam.nu)
    assert jax.tree.structure(adam.mu) == jax.tree.structure(state.params)


def test_no_bias_without_a_rate_or_an_moe_layer():
    assert make({"bias_update_rate": 0.0})[1].router_bias_XE is None
    assert make(all_balance(), moe={"layer_period": 0})[1].router_bias_XE is None


@pytest.mark.parametrize("changed", [{"remat": "full"}, {"remat": "dots"}])
def test_remat_changes_neither_counts_nor_gradient(changed):
    """Counts that were a side effect of the forward pass would double."""
    plain, state = make(all_balance())
    other, _ = make(all_balance(), model=changed)
    batch = tiny_batch()
    expected = gradient_in_parts(state, batch, plain.model, 1)
    got = gradient_in_parts(state, batch, other.model, 1)
    assert_close(got, expected, **FLOAT32)
    np.testing.assert_array_equal(np.asarray(got[3].assigned_KE).sum(axis=(1, 2)), 2 * NUM_VALID)


def test_scanned_layers_are_the_same_layers():
    plain, state = make(all_balance())
    scanned, _ = make(all_balance(), model={"scan_layers": True})
    stack = state.params["first"]

    def scan(tree):
        first = tree.pop("first")
        layers = jax.tree.map(lambda a, b: jnp.stack([a, b])[:, None], *first.values())
        return tree | {"repeated": {"layer_0": jax.tree.map(lambda x: x[:, 0], layers)}}

    assert list(stack) == ["layer_0", "layer_1"]
    batch = tiny_batch()
    loss, _, grads, aux = gradient_in_parts(state, batch, plain.model, 1)
    state = state._replace(params=scan(dict(state.params)))
    got = gradient_in_parts(state, batch, scanned.model, 1)
    assert_close((got[0], got[2], got[3]), (loss, scan(dict(grads)), aux), **FLOAT32)


def test_rows_of_padding_change_nothing():
    config, state = make(all_balance())
    batch = tiny_batch()
    padded = {name: jnp.concatenate([x, jnp.zeros_like(x)]) for name, x in batch.items()}
    expected = gradient_in_parts(state, batch, config.model, 1)
    got = gradient_in_parts(state, padded, config.model, 1)
    assert_close(got, expected, **FLOAT32)


def test_what_stands_in_padding_changes_nothing():
    """Neither by capacity, which is tight here, nor by the losses or counts."""
    config, state = make(all_balance(), moe={"capacity": {"train_factor": 0.5}})
    batch = tiny_batch()
    garbage = batch | {"inputs": jnp.where(batch["segment_ids"] > 0, batch["inputs"], 77)}
    assert jnp.any(garbage["inputs"] != batch["inputs"])
    expected = gradient_in_parts(state, batch, config.model, 1)
    assert np.all(expected[3].dropped_fraction_K > 0)
    got = gradient_in_parts(state, garbage, config.model, 1)
    assert_close(got, expected, **FLOAT32)


def test_a_step_is_a_function_of_state_and_batch():
    """Bit for bit, noise included; the noise is another at the next step."""
    config, state = make(
        all_balance(),
        model={"dropout_rate": 0.1},
        moe={"router": {"input_jitter": 0.1}, "expert_dropout_rate": 0.1},
    )
    step = quick_jit(make_train_step(config))
    batch = cut(tiny_batch())
    once, again = step(state, batch), step(state, batch)
    assert_same_bits(once, again)
    _, says = step(state._replace(step=state.step + 1), batch)
    assert abs(says.loss - once[1].loss) > 1e-4
    other_run = state._replace(key_data=state.key_data + jnp.uint32(1))
    assert abs(step(other_run, batch)[1].loss - once[1].loss) > 1e-4


def test_what_a_step_says():
    settings = {"optimizer": {"learning_rate": 0.25, "schedule": "constant", "clip_norm": 1e-3}}
    config, state = make(all_balance(), **settings)
    batch = tiny_batch()
    loss, cross_entropy, grads, aux = gradient_in_parts(state, batch, config.model, 1)
    _, says = step_once(config, state, batch)
    np.testing.assert_allclose(says.loss, cross_entropy, **FLOAT32)
    np.testing.assert_allclose(says.total_loss, loss, **FLOAT32)
    assert says.total_loss > says.loss
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))
    np.testing.assert_allclose(says.grad_norm, norm, rtol=1e-5, err_msg="before clipping")
    assert says.learning_rate == 0.25
    assert_close(says.aux, aux, **FLOAT32)


def test_a_bfloat16_step_is_finite_and_near_with_float32_parameters():
    losses = []
    for dtype in ("float32", "bfloat16"):
        config, state = make(all_balance(), model={"compute_dtype": dtype})
        new, says = step_once(config, state, tiny_batch())
        losses.append(float(says.loss))
        for leaf in jax.tree.leaves((new.params, new.router_bias_XE, says.loss, says.grad_norm)):
            assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < BFLOAT16_LOSS_ERROR
