"""Weights of several arrays: low-rank updates and int4 act as the dense weight everywhere."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.cosine import Cosine
from moe_jax.moe.routing.logits import Linear, Sigmoid
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import Weight, dense, init_parameters, learning, rows, weight_axes
from moe_jax.part import Call, Dims, Own
from moe_jax.weights.low_rank import LowRank
from moe_jax.weights.quantised import TABLE, quantise
from tests.slow import slow_but

# The dense weight is rounded once more than the product of its factors, and sums on a mesh are in
# another order: a few roundings (epsilon 1.2e-7) of the largest entry.
FLOAT32 = 3e-6

BATCH, LENGTH, DIMS = 8, 4, Dims(model_dim=8, vocab_size=12)
ONE = MeshConfig(data=1)
EXPERT = MeshConfig(data=1, expert=8)
MIXED = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


def low_rank(random, spec):
    *leading, inward, outward = spec.shape
    base, a, b = (
        random.normal(size=shape).astype(np.float32) / 2
        for shape in (spec.shape, (*leading, inward, 2), (*leading, 2, outward))
    )
    return LowRank(base, a, b, scale=1.0)


def int4(random, spec):
    """Groups of two, so every mesh of the test cuts between groups."""
    return quantise(jnp.asarray(random.normal(size=spec.shape) / 2, jnp.float32), 4, 2)


LEAVES = {"low rank": low_rank, "int4": int4}


def is_weight(value):
    return isinstance(value, Weight)


def wrapped(specs, leaf):
    """Parameters whose matrices are `Weight`s of this kind and whose vectors are arrays."""
    random = np.random.default_rng(0)

    def draw(spec):
        # The embedding is excluded: its table is not a factor of a product.
        if len(spec.shape) > 1 and min(spec.shape[-2:]) > 1 and spec.decays:
            return LEAVES[leaf](random, spec)
        return random.normal(size=spec.shape).astype(np.float32) / 2

    return jax.tree.map(draw, specs)


def split(params):
    """The leaves that learn, and a function that puts such leaves back into the parameters."""
    leaves, tree = jax.tree.flatten(params)
    marks = jax.tree.leaves(learning(params))

    def joined(learning):
        learning = iter(learning)
        values = [next(learning) if m else v for v, m in zip(leaves, marks, strict=True)]
        return jax.tree.unflatten(tree, values)

    return [v for v, m in zip(leaves, marks, strict=True) if m], joined


def on_mesh(params, specs, mesh):
    axes = jax.tree.map(lambda spec, v: weight_axes(spec.axes, v), specs, params)
    leaves, tree = jax.tree.flatten(params)
    names = jax.tree.leaves(axes, is_leaf=lambda v: isinstance(v, tuple))
    placed = map(lambda v, n: jax.device_put(v, named_sharding(n, mesh)), leaves, names)
    return jax.tree.unflatten(tree, list(placed))


def run(part, leaf, mesh_config=ONE, *, as_dense=False):
    """Output, and gradients of what learns and of the tokens."""
    specs = part.specs(DIMS)
    params = wrapped(specs, leaf)
    x, dy = np.random.default_rng(1).normal(size=(2, BATCH, LENGTH, 8)).astype(np.float32)
    segments = np.random.default_rng(2).random((BATCH, LENGTH)) < 0.8
    call = Call(segments_BL=segments.astype(np.int32), capacity=1.0).with_defaults(x)
    in_use = contextlib.nullcontext()
    if mesh_config != ONE:
        mesh = make_mesh(mesh_config)
        params, in_use = on_mesh(params, specs, mesh), jax.set_mesh(mesh)
    learning, joined = split(params)

    def objective(learning, x):
        given = joined(learning)
        if as_dense:
            given = jax.tree.map(dense, given, is_leaf=is_weight)
        y = part.apply(given, x, call, Own())[0]
        return jnp.sum(y * dy), y

    with in_use:
        gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (_, y), gradients = jax.jit(gradient)(learning, x)
    return jax.device_get((y, gradients))


expected = functools.cache(functools.partial(run, as_dense=True))


def assert_equal(part, leaf, mesh_config=ONE, tolerance=FLOAT32):
    reference = part
    if isinstance(part, MoE):
        reference = dataclasses.replace(part, run_experts="einsum", exchange="auto")
    given = run(part, leaf, mesh_config)
    for a, b in zip(*map(jax.tree.leaves, (given, expected(reference, leaf))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
        assert np.abs(b).max() > 0


def block(way, exchange="auto", **settings):
    return MoE(
        num_experts=8,
        num_selected_experts=2,
        expert_dim=4,
        activation=SwiGLU(),
        use_bias=True,
        shared_expert_dim=4,
        shared_expert_gate=True,
        router=TokenChoice(score=Sigmoid(), projection=Linear(use_bias=True)),
        losses=(),
        run_experts=way,
        exchange=exchange,
        **settings,
    )


BLOCKS = {
    "einsum": (block("einsum"), ONE),
    "gather": (block("gather"), ONE),
    "ragged": (block("ragged"), ONE),
    "gates on the input": (block("ragged", gate_on_input=True), ONE),
    "expert 8, einsum by the compiler": (block("einsum"), EXPERT),
    "expert 8, gather": (block("gather", "explicit"), EXPERT),
    "expert 8, ragged": (block("ragged"), EXPERT),
    "mixed, gather by the compiler": (block("gather"), MIXED),
    "mixed, einsum": (block("einsum", "explicit"), MIXED),
    "mixed, ragged": (block("ragged"), MIXED),
    "mixed, gates on the input": (block("gather", "explicit", gate_on_input=True), MIXED),
}


QUICK_BLOCKS = ["einsum", "ragged", "expert 8, gather", "mixed, ragged"]


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("name", slow_but(QUICK_BLOCKS, BLOCKS))
def test_a_block_with_such_weights_is_the_block_with_dense_ones(name, leaf):
    part, mesh = BLOCKS[name]
    assert_equal(part, leaf, mesh)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("mesh", [ONE, MIXED], ids=["one device", "mixed"])
def test_attention_likewise(mesh, leaf):
    """Adapters round x w + (x a) b, dense matrices x (w + a b); a softmax amplifies the rest.

    On CPUs without AVX-512 the gradient of a bias differs by 4.4e-6 of its largest entry.
    """
    part = Attention(num_heads=2, head_dim=4, biases=tuple("qkv"))
    assert_equal(part, leaf, mesh, tolerance=1e-5 if leaf == "low rank" else FLOAT32)


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_cosine_router_likewise(leaf):
    # Its directions have length 1 at any scale, so the scale's gradient is only rounding.
    part = dataclasses.replace(block("einsum"), router=TokenChoice(projection=Cosine(dim=4)))
    given, wanted = run(part, leaf)[0], run(part, leaf, as_dense=True)[0]
    np.testing.assert_allclose(given, wanted, rtol=0, atol=FLOAT32 * np.abs(wanted).max())


def test_what_a_low_rank_weight_wraps_starts_from_the_values_that_it_had():
    specs = block("einsum").specs(DIMS)["experts"]
    spec = specs["wi"]
    parts = LowRank(spec, dataclasses.replace(spec), dataclasses.replace(spec), scale=1.0)
    drawn = init_parameters(jax.random.key(0), {**specs, "wi": parts})
    plain = init_parameters(jax.random.key(0), specs)
    np.testing.assert_array_equal(drawn["wi"].base, plain["wi"])
    np.testing.assert_array_equal(drawn["wo"], plain["wo"])
    assert (drawn["wi"].a != plain["wi"]).any()


@pytest.mark.parametrize("leaf", LEAVES)
def test_an_embedding_and_a_head_of_such_weights(leaf):
    model = LanguageModel(
        vocab_size=12,
        model_dim=8,
        parts={"attention": Attention(num_heads=2, head_dim=4)},
        stack=StackLayout(unit=(("attention",),), repeats=1),
        tie_embeddings=False,
    )
    params = wrapped(model.specs(), leaf)
    table = LEAVES["low rank"](np.random.default_rng(3), model.specs()["embedding"])
    if leaf == "int4":
        table = quantise(dense(table), 4, 2, TABLE)
    params["embedding"] = table
    ids = np.random.default_rng(4).integers(0, 12, (2, 4), np.int32)
    plain = jax.tree.map(dense, params, is_leaf=is_weight)
    np.testing.assert_allclose(rows(params["embedding"], ids), plain["embedding"][ids], rtol=1e-6)
    given, wanted = (
        jax.jit(lambda params: model.run(params, Call(tokens_BL=ids)).logits_BLV)(values)
        for values in (params, plain)
    )
    np.testing.assert_allclose(given, wanted, rtol=0, atol=FLOAT32 * np.abs(wanted).max())
