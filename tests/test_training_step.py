"""The training step: microbatches, padding, remat and dtype change only memory and speed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.part import merge_aux
from moe_jax.training import step
from moe_jax.training.loss import batch_totals, call_of_batch
from moe_jax.training.step import gradient, make_train_step
from tests.slow import slow_but
from tests.tiny_run import DENSE, cut, quick_jit, tiny_batch, tiny_config, tiny_state

FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}  # sums of some hundred float32 terms, in another order
# For a loss near log(384) = 6: two layers of bfloat16 with its 8 bits of mantissa, before the head.
BFLOAT16_LOSS_ERROR = 0.05
NUM_VALID = 16 + 13 + 0 + 5  # tokens of tiny_batch()
RATE = 0.01


def make(moe=None, model=None, **sections):
    parts = {"moe": {"group_size": 8, **(moe or {})}}
    config = tiny_config({"model": {"parts": parts, **(model or {})}, **sections})
    return config, tiny_state(config)


def all_balance(convention="load_balance", scope="global", **settings):
    """Every balance mechanism at once, strong enough to be visible."""
    losses = {convention: {"weight": 0.3, "scope": scope}, "router_z": {"weight": 0.1}}
    return {"losses": losses, "bias": {"kind": "sign", "rate": RATE}, **settings}


def with_bias(state, bias_XE):
    return state._replace(model_state={"moe": {"bias_E": jnp.asarray(bias_XE)}})


# Biases that move choices, and so change what the losses count.
OLD_XE = [[0.0, 0.3, 0.0, -0.1], [0.2, 0.0, 0.0, 0.0]]


@functools.partial(quick_jit, static_argnums=(2, 3))
def gradient_in_parts(state, batch, model, num_parts):
    """Loss, cross-entropy, gradient and merged aux, with the batch in this many parts."""
    parts = cut(batch, num_parts)
    keys = jax.random.split(jax.random.key(0), num_parts)
    loss, grads, said = gradient(state, parts, keys, batch_totals(batch), model)
    return loss, jnp.sum(said.cross_entropy), grads, merge_aux(said.aux)


def step_once(config, state, batch):
    parts = cut(batch, config.training.num_microbatches)
    return quick_jit(make_train_step(config))(state, parts)


def assert_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


CONVENTIONS = (
    "load_balance",
    "switch_load_balance",
    "flaxformer_load_balance",
    "huggingface_load_balance",
)
CUTS = [
    (scope, convention, num_parts)
    for scope in ("group", "sequence", "global")
    for convention in CONVENTIONS
    # The config refuses other combinations.
    if scope == "global" or convention != "huggingface_load_balance"
    for num_parts in (2, 4)
]


@pytest.mark.parametrize(
    ("scope", "convention", "num_parts"), slow_but([("global", "load_balance", 4)], CUTS)
)
def test_loss_and_gradient_do_not_depend_on_the_number_of_parts(scope, convention, num_parts):
    """Rows have 16, 13, 0 and 5 valid tokens, and loss weights are uneven."""
    config, state = make(all_balance(convention, scope))
    state = with_bias(state, OLD_XE)
    batch = tiny_batch()
    whole = gradient_in_parts(state, batch, config.model, 1)
    parts = gradient_in_parts(state, batch, config.model, num_parts)
    assert_close(parts, whole, **FLOAT32)


def balance_loss(outcome, num_tokens):
    """The loss of `all_balance` in an outcome of `gradient_in_parts`, without its weight."""
    loss, cross_entropy, _, aux = outcome
    router_z = np.mean(aux["moe"].sums["losses"]["router_z_loss"]["total"]) / num_tokens
    return (loss - cross_entropy - 0.1 * router_z) / 0.3


def test_the_loss_of_a_predictor_does_not_depend_on_the_number_of_parts():
    """It is a mean over the tokens of the batch, of which the halves have 29 and 5."""
    predicted = {"kind": "expert_choice", "predictor_loss_weight": 0.5}
    config, state = make({"router": predicted, "losses": {}}, {"stack": {"allow_lookahead": True}})
    batch = tiny_batch()
    whole = gradient_in_parts(state, batch, config.model, 1)
    assert whole[0] - whole[1] > 0.05
    assert_close(gradient_in_parts(state, batch, config.model, 2), whole, **FLOAT32)


def test_the_z_loss_of_the_head_does_not_depend_on_the_number_of_parts():
    outcomes = []
    for num_microbatches in (1, 2):
        config, state = make(
            training={
                "loss": {"kind": "cross_entropy_z", "z_loss": 0.1},
                "num_microbatches": num_microbatches,
            },
            optimizer={"epsilon": 1.0},  # or Adam's first step is a sign
        )
        new, says = step_once(config, state, tiny_batch())
        outcomes.append((new.params, says))
    assert outcomes[0][1].of_loss["z_loss"] > 0.1
    assert_close(outcomes[1], outcomes[0], **FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_scope_microbatch_is_the_mean_over_the_parts_by_their_tokens(convention):
    """Here the number of parts is part of the definition: loads are those of one part."""
    config, state = make(all_balance(convention, scope="microbatch"))
    model, batch = config.model, tiny_batch()
    alone = [
        gradient_in_parts(state, {n: x[rows] for n, x in batch.items()}, model, 1)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    together = gradient_in_parts(state, batch, model, 2)
    of_parts = [balance_loss(*part) for part in zip(alone, (29, 5), strict=True)]
    expected = np.average(of_parts, weights=[29, 5])
    np.testing.assert_allclose(balance_loss(together, NUM_VALID), expected, rtol=1e-4)
    whole = gradient_in_parts(state, batch, model, 1)
    assert abs(whole[0] - together[0]) > 1e-3


def test_a_step_in_microbatches_is_the_same_step():
    """Parameters and bias after it agree too. With a small epsilon Adam's first step is a sign."""
    outcomes = []
    for num_microbatches in (1, 4):
        config, state = make(
            all_balance(
                bias={"kind": "quantile", "rate": 0.5},
                router={"kind": "token_choice", "score": "sigmoid"},
            ),
            training={"num_microbatches": num_microbatches},
            optimizer={"epsilon": 1.0},
        )
        outcomes.append(step_once(config, state, tiny_batch()))
    (one, one_says), (four, four_says) = outcomes
    assert_close(four_says, one_says, **FLOAT32)
    assert_close(four.params, one.params, **FLOAT32)
    assert_same_bits(four.model_state, one.model_state)
    assert np.ptp(four.model_state["moe"]["bias_E"], axis=1).min() > 0.01
    assert not any("needed" in name for name in four_says.of_parts), "a thousand bins an expert"
    assert int(four.step) == int(one.step) == 1


def test_the_router_bias_is_updated_once_a_step_from_the_counts_of_the_whole_batch():
    tight = {"train_factor": 0.5}
    config, state = make(all_balance(capacity=tight), training={"num_microbatches": 4})
    state = with_bias(state, OLD_XE)
    batch = tiny_batch()
    new, says = step_once(config, state, batch)

    call = call_of_batch(batch, capacity=config.model.part["moe"].capacity.train_factor)
    aux = quick_jit(
        lambda params: config.model.run(params, call, state=state.model_state).aux["moe"]
    )(state.params)
    counts_XE = np.asarray(aux.sums["assigned_KE"]).sum(axis=1)
    np.testing.assert_array_equal(counts_XE.sum(axis=1), 2 * NUM_VALID)
    np.testing.assert_allclose(
        says.of_parts["moe/expert_load"], counts_XE / (2 * NUM_VALID), rtol=1e-6
    )
    # An overloaded expert is selected less: its bias falls.
    old_XE = np.float32(OLD_XE)
    expected = old_XE + RATE * np.sign(2 * NUM_VALID / 4 - counts_XE)
    assert np.any(expected != old_XE)
    kept_XE = np.asarray(aux.sums["kept_KE"]).sum(axis=1)
    of_kept = old_XE + RATE * np.sign(kept_XE.mean(axis=1, keepdims=True) - kept_XE)
    assert np.any(of_kept != expected), "counts after drops would move a bias the other way"
    np.testing.assert_allclose(new.model_state["moe"]["bias_E"], expected, rtol=1e-6)

    # It is no parameter and has no moments: these have the names of the parameters.
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params)]
    assert not any("bias" in name for name in names)
    adam = new.opt_state[1]
    assert jax.tree.structure(adam.mu) == jax.tree.structure(adam.nu)
    assert jax.tree.structure(adam.mu) == jax.tree.structure(state.params)


def test_no_bias_without_an_update_or_an_moe_layer():
    assert make(all_balance(bias=None))[1].model_state == {}
    assert tiny_state(tiny_config(DENSE)).model_state == {}


@pytest.mark.parametrize(
    "changed", [{"remat": "full"}, pytest.param({"remat": "dots"}, marks=pytest.mark.slow)]
)
def test_remat_changes_neither_counts_nor_gradient(changed):
    """Counts made as a side effect of the forward pass would double."""
    plain, state = make(all_balance())
    other, _ = make(all_balance(), model=changed)
    batch = tiny_batch()
    expected = gradient_in_parts(state, batch, plain.model, 1)
    got = gradient_in_parts(state, batch, other.model, 1)
    assert_close(got, expected, **FLOAT32)
    counts_XKE = np.asarray(got[3]["moe"].sums["assigned_KE"])
    np.testing.assert_array_equal(counts_XKE.sum(axis=(1, 2)), 2 * NUM_VALID)


@pytest.mark.slow
def test_scanned_layers_are_the_same_layers():
    """A scan changes only the execution: the same tree, the same values."""
    plain, state = make(all_balance())
    scanned, other = make(all_balance(), model={"scan_layers": True})
    assert_same_bits(other, state)
    assert plain.model.specs()["stack"]["unit"]["0"]["moe"]["experts"]["wi"].shape == (2, 4, 16, 32)
    batch = tiny_batch()
    expected = gradient_in_parts(state, batch, plain.model, 1)
    got = gradient_in_parts(state, batch, scanned.model, 1)
    assert_close(got, expected, **FLOAT32)


@pytest.mark.slow
def test_rows_of_padding_change_nothing():
    config, state = make(all_balance())
    batch = tiny_batch()
    padded = {name: jnp.concatenate([x, jnp.zeros_like(x)]) for name, x in batch.items()}
    expected = gradient_in_parts(state, batch, config.model, 1)
    got = gradient_in_parts(state, padded, config.model, 1)
    assert_close(got, expected, **FLOAT32)


def test_what_stands_in_padding_changes_nothing():
    """It affects neither capacity, which is tight here, nor the losses or counts."""
    config, state = make(all_balance(capacity={"train_factor": 0.5}))
    batch = tiny_batch()
    garbage = batch | {"inputs": jnp.where(batch["segment_ids"] > 0, batch["inputs"], 77)}
    assert jnp.any(garbage["inputs"] != batch["inputs"])
    expected = gradient_in_parts(state, batch, config.model, 1)
    sums = expected[3]["moe"].sums
    assert np.all(np.sum(sums["kept_KE"], axis=-1) < np.sum(sums["assigned_KE"], axis=-1))
    got = gradient_in_parts(state, garbage, config.model, 1)
    assert_close(got, expected, **FLOAT32)


def test_a_step_is_a_function_of_state_and_batch():
    """Bit for bit, noise included; the next step has other noise."""
    config, state = make(
        all_balance(
            router={"kind": "token_choice", "noise": {"jitter": {"epsilon": 0.1}}},
            expert_dropout_rate=0.1,
        ),
        model={"dropout_rate": 0.1},
    )
    take = quick_jit(make_train_step(config))
    batch = cut(tiny_batch())
    once, again = take(state, batch), take(state, batch)
    assert_same_bits(once, again)
    _, says = take(state._replace(step=state.step + 1), batch)
    assert abs(says.loss - once[1].loss) > 1e-4
    other_run = state._replace(key_data=state.key_data + jnp.uint32(1))
    assert abs(take(other_run, batch)[1].loss - once[1].loss) > 1e-4


def test_each_microbatch_has_noise_of_its_own_and_both_passes_over_it_have_the_same(monkeypatch):
    """Two equal microbatches. The first pass counts loads for a loss of the whole batch."""
    config, state = make(
        all_balance(router={"kind": "token_choice", "noise": {"gaussian": {"stddev": 1.0}}}),
        model={"stack": {"repeats": 1}},
        training={"num_microbatches": 2},
    )
    told = {}

    def tell(name):
        function = getattr(step, name)

        def telling(*arguments, **settings):
            outcome = function(*arguments, **settings)
            jax.debug.callback(lambda outcome: told.update({name: outcome}), outcome)
            return outcome

        monkeypatch.setattr(step, name, telling)

    tell("batch_sums")
    tell("gradient")
    step_once(config, state, {n: jnp.concatenate([x[:2]] * 2) for n, x in tiny_batch().items()})
    jax.effects_barrier()
    _, _, said = told["gradient"]
    first, second = said.cross_entropy
    assert abs(first - second) > 1e-4
    first, second = said.aux["moe"].sums["assigned_KE"]
    assert np.any(first != second)
    np.testing.assert_array_equal(told["batch_sums"]["moe"]["assigned_KE"], first + second)


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
    assert_close(says.of_parts, config.model.metrics(aux), **FLOAT32)
    assert {name.partition("/")[0] for name in says.of_parts} == {"moe"}
    assert all(len(value) == 2 for value in says.of_parts.values()), "a leading dim of layers"


@pytest.mark.slow
def test_a_bfloat16_step_is_finite_and_near_with_float32_parameters():
    losses = []
    for dtype in ("float32", "bfloat16"):
        config, state = make(all_balance(), model={"compute_dtype": dtype})
        new, says = step_once(config, state, tiny_batch())
        losses.append(float(says.loss))
        for leaf in jax.tree.leaves((new.params, new.model_state, says.loss, says.grad_norm)):
            assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < BFLOAT16_LOSS_ERROR
