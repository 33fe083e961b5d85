"""Temperature, jitter and noise that change during training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.routing import Options, RouterInputs
from moe_jax.moe.routing.logits import Linear, annealed
from moe_jax.moe.routing.noise import Gaussian, Jitter
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.training.evaluation import evaluate_batch
from moe_jax.training.loss import batch_totals
from moe_jax.training.step import gradient
from tests.tiny_run import cut, quick_jit, tiny_batch, tiny_config, tiny_state

ANNEALED = TokenChoice(
    projection=Linear(anneal_from=4.0, anneal_steps=10),
    noise=(
        Gaussian(stddev=0.2, anneal_from=0.8, anneal_steps=10),
        Jitter(epsilon=0.0, anneal_from=0.5, anneal_steps=10),
    ),
)


@pytest.mark.parametrize(
    ("start", "end", "values"),
    [  # at steps 0, 5, 10, 1000
        (4.0, 1.0, [4, 2.5, 1, 1]),
        (0.8, 0.2, [0.8, 0.5, 0.2, 0.2]),
        (0.5, 0.0, [0.5, 0.25, 0, 0]),
    ],
)
def test_settings_move_linearly_and_then_stay(start, end, values):
    got = [annealed(start, end, 10, jnp.int32(step)) for step in (0, 5, 10, 1000)]
    np.testing.assert_allclose(got, values, rtol=1e-6)
    assert got[-1] == np.float32(values[-1]), "exactly the configured value"
    assert annealed(start, end, 10, None) == end
    assert annealed(start, end, 0, jnp.int32(5)) == end


@pytest.mark.parametrize("kind", [Linear, Gaussian, Jitter])
def test_a_start_without_steps_is_refused(kind):
    with pytest.raises(
        ValueError,
        match=r"anneal_from and anneal_steps > 0 must be .*: anneal_from=0\.5, anneal_steps=0",
    ):
        kind(anneal_from=0.5)


def test_logits_follow_the_step():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(1, 500, 4)), jnp.float32)
    params = {"weight": jnp.asarray(random.normal(size=(4, 3)), jnp.float32)}
    places = jnp.zeros((1, 500), jnp.int32)
    inputs = RouterInputs(Options(3, 3, 1, 500), places == 0, places)
    plain = TokenChoice().logits(params, x, inputs).logits_GSE

    def at(step, key=None):
        return ANNEALED.logits(params, x, inputs._replace(rng=key, step=jnp.int32(step)))

    for step, temperature in ((0, 4), (5, 2.5), (10, 1)):
        assert at(step).noise_std_GSE is None, "evaluation has no noise"
        np.testing.assert_allclose(at(step).logits_GSE, plain / temperature, rtol=1e-5, atol=1e-6)
    early, late = at(0, jax.random.key(0)), at(10, jax.random.key(0))
    for said, std in ((early, 0.8), (late, 0.2)):
        np.testing.assert_allclose(said.noise_std_GSE, std, rtol=1e-6)
        np.testing.assert_allclose(np.std(said.logits_GSE - said.clean_GSE), std, rtol=0.1)
    np.testing.assert_allclose(late.clean_GSE, plain, rtol=1e-5, atol=1e-6)  # jitter has ended
    assert np.abs(4 * early.clean_GSE - plain).max() > 0.1


def make(**projection):
    router = {"kind": "token_choice", "projection": {"kind": "linear", **projection}}
    config = tiny_config({"model": {"parts": {"moe": {"router": router}}}})
    return config, tiny_state(config)


@functools.partial(quick_jit, static_argnames="model")
def training_loss(state, batch, model):
    """The loss of a step in two parts, whose loads are counted first."""
    keys = jax.random.split(jax.random.key(0), 2)
    return gradient(state, cut(batch, 2), keys, batch_totals(batch), model)[0]


@pytest.mark.slow
def test_the_step_reaches_training_and_evaluation_without_another_program():
    hot, state = make(temperature=3.0)
    config, _ = make(anneal_from=3.0, anneal_steps=4)
    batch = tiny_batch()
    expected = training_loss(state, batch, hot.model)
    programs = training_loss._cache_size()
    losses = [
        float(training_loss(state._replace(step=jnp.int32(step)), batch, config.model))
        for step in (0, 2, 4, 9)
    ]
    assert training_loss._cache_size() == programs + 1
    np.testing.assert_allclose(losses[0], expected, rtol=2e-5)
    assert abs(losses[0] - losses[1]) > 1e-3 and losses[1] != losses[2] == losses[3]

    def nats(config, step):
        token_bytes = jnp.ones(config.model.vocab_size)
        settings = {"model": config.model, "capacity": 0.0}
        return evaluate_batch(
            state.params, state.model_state, batch, token_bytes, step, **settings
        ).nats_B

    np.testing.assert_allclose(nats(config, jnp.int32(0)), nats(hot, None), rtol=2e-5)
    assert np.abs(nats(config, jnp.int32(0)) - nats(config, jnp.int32(4))).max() > 1e-3
