"""The Linen and NNX shells own parameters and compute what the pure functions compute."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models import linen
from moe_jax.models import nnx as nnx_shells
from moe_jax.models.linen import LinenModel, LinenMoE
from moe_jax.models.model import LanguageModel
from moe_jax.models.network import build, call_of
from moe_jax.models.nnx import NNXModel, NNXMoE, values
from moe_jax.models.stack import StackLayout
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, Dims, Own
from tests.slow import slow_but

MOE = MoE(
    num_experts=4,
    num_selected_experts=2,
    expert_dim=8,
    shared_expert_dim=4,
    bias=SignUpdate(),
    run_experts="gather",
)
MODEL = LanguageModel(
    vocab_size=11,
    model_dim=8,
    parts={"attention": Attention(num_heads=2, head_dim=4), "mlp": Mlp(dim=8), "moe": MOE},
    stack=StackLayout(first=(("attention", "mlp"),), unit=(("attention", "moe"),), repeats=2),
    tie_embeddings=False,
    dropout_rate=0.1,
)
STATE = {"bias_E": jnp.asarray([0.1, 0.0, -0.1, 0.2])}
RATE = 0.1


def tokens():
    return jax.random.randint(jax.random.key(1), (2, 6), 0, 11)


def call_of_model():
    return Call(tokens_BL=tokens(), rng=jax.random.key(2))


def state_of_model():
    return {"moe": {"bias_E": jnp.stack([STATE["bias_E"], -STATE["bias_E"]])}}


def model_loss(output):
    losses = optax.softmax_cross_entropy_with_integer_labels(output.logits_BLV, tokens())
    return jnp.mean(losses) + MODEL.loss(output.aux, jnp.float32(12), output_sums(output))


def output_sums(output):
    return {name: aux.sums for name, aux in output.aux.items()}


def block_loss(output):
    y_BLM, aux = output
    return jnp.mean(y_BLM**2) + jnp.sum(aux.sums["router_loss"])


def step(loss):
    """A compiled SGD step: returns the new parameters and the loss before the step."""

    @jax.jit
    def stepped(params):
        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), value

    return stepped


X = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
CASES = {
    "model": (
        MODEL.specs(),
        lambda params: MODEL.run(params, call_of_model(), state=state_of_model()),
        LinenModel(MODEL),
        functools.partial(NNXModel, MODEL),
        lambda shell: shell(call_of_model(), state=state_of_model()),
        model_loss,
    ),
    "block": (
        MOE.specs(Dims(8)),
        lambda params: moe_block(params, X, MOE, Call(rng=jax.random.key(3)), Own(state=STATE)),
        LinenMoE(MOE),
        functools.partial(NNXMoE, MOE, 8),
        lambda shell: shell(X, Call(rng=jax.random.key(3)), Own(state=STATE)),
        block_loss,
    ),
}


@functools.cache
def pure(name):
    """Output, parameters before and after a step, and the loss, from the pure functions."""
    specs, run, *_, loss = CASES[name]
    params = init_parameters(jax.random.key(0), specs)
    after, value = step(lambda params: loss(run(params)))(params)
    return jax.jit(run)(params), params, after, value


def assert_same(given, expected):
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", slow_but(["block"], CASES))
def test_linen_gives_the_values_and_the_training_step_of_the_pure_functions(name):
    specs, _, shell, _, run, loss = CASES[name]
    output, params, after, value = pure(name)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda: run(functools.partial(shell.init_with_output, key)))
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
    assert variables[1]["params"] == shapes

    def apply(params):
        return run(lambda *args, **trees: shell.apply({"params": params}, *args, **trees))

    assert_same(jax.jit(apply)(params), output)
    assert_same(step(lambda params: loss(apply(params)))(params), (after, value))


@pytest.mark.parametrize("name", slow_but(["block"], CASES))
def test_nnx_gives_the_values_and_the_training_step_of_the_pure_functions(name):
    specs, _, _, make, run, loss = CASES[name]
    output, params, after, value = pure(name)
    shell = make(rngs=nnx.Rngs(0))
    assert jax.tree.map(jnp.shape, values(shell.params)) == jax.tree.map(
        lambda spec: spec.shape, specs
    )

    nnx.update(shell, {"params": params})
    optimizer = nnx.Optimizer(shell, optax.sgd(RATE), wrt=nnx.Param)
    assert_same(nnx.jit(run)(shell), output)

    @nnx.jit
    def train_step(shell, optimizer):
        value, gradients = nnx.value_and_grad(lambda shell: loss(run(shell)))(shell)
        optimizer.update(shell, gradients)
        return value

    given = train_step(shell, optimizer)
    assert_same((values(shell.params), given), (after, value))


def test_a_network_counts_positions_from_0_in_each_document():
    segments_BL = np.array([[0, 1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 3, 3, 3]])
    call = call_of(np.ones((2, 7)), None, None, segments_BL, record=False)
    positions_BL = [[0, 0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 1, 2]]
    np.testing.assert_array_equal(call.positions_BL, positions_BL)
    assert call.contiguous
    given = call_of(np.ones((2, 7)), None, np.zeros((2, 7)), segments_BL, record=False)
    assert not given.positions_BL.any() and not given.contiguous
    with pytest.raises(ValueError, match="mask_BL and segments_BL both say"):
        call_of(np.ones((2, 7)), segments_BL > 0, None, segments_BL, record=False)


def test_a_network_without_an_encoder_refuses_its_tokens():
    init = functools.partial(build(MODEL).init, encoder_tokens_BT=tokens())
    with pytest.raises(ValueError, match="encoder_tokens_BT need a model with an encoder"):
        jax.eval_shape(init, jax.random.key(0), tokens())


def test_the_shells_hold_no_maths_of_their_own():
    for module in (linen, nnx_shells):
        source = inspect.getsource(module)
        assert len(source.splitlines()) < 60
        assert not {"nn.scan", "nn.remat", "make_rng", "jnp"} & set(source.split())
