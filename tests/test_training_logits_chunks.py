"""Logits in chunks of positions: the same loss and gradients, less memory, one reduction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moe_jax.config import MeshConfig
from moe_jax.data import open_data
from moe_jax.finetune.distil import Distil
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.flops import training_flops
from moe_jax.planning.memory import estimate_memory
from moe_jax.planning.remedies import remedies
from moe_jax.planning.workload import resolve
from moe_jax.training.evaluation import evaluate
from moe_jax.training.logits_chunks import over_chunks
from moe_jax.training.loss import batch_totals, partial_loss
from moe_jax.training.placement import check_run, state_shardings
from moe_jax.training.step import make_train_step
from tests.tiny_run import quick_jit, tiny_batch, tiny_config, tiny_state, tiny_training

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
MANY = 16384  # ids
VARIANTS = {
    "tied": {},
    "untied, z-loss": {
        "model": {"tie_embeddings": False, "head_bias": True, "logits_softcap": 5.0},
        "training": {"loss": "cross_entropy_z"},
    },
    "modules": {"model": {"multi_token": {"depth": 2}}},
}
ONE = {"data": 1}


def in_chunks(config, num_chunks):
    training = dataclasses.replace(config.training, logits_chunks=num_chunks)
    return dataclasses.replace(config, training=training)


def batch_of_eight():
    return {
        name: jnp.concatenate([x, x[::-1]])[None].astype(x.dtype)
        for name, x in tiny_batch().items()
    }


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        ("untied, z-loss", {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param("modules", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("untied, z-loss", ONE, marks=pytest.mark.slow),
        pytest.param("modules", ONE, marks=pytest.mark.slow),
        pytest.param("tied", ONE, marks=pytest.mark.slow),
        pytest.param("tied", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_whole_logits(variant, mesh):
    config, mesh = tiny_config(VARIANTS[variant]), MeshConfig(**{"data": 1} | mesh)
    config = dataclasses.replace(
        config, mesh=mesh, training=dataclasses.replace(config.training, batch_size=8)
    )
    state, outcomes = tiny_state(config), []
    with jax.set_mesh(make_mesh(mesh)):
        placed = jax.tree.map(jax.device_put, state, state_shardings(config, make_mesh(mesh)))
        for num_chunks in (1, 4):
            step = quick_jit(make_train_step(in_chunks(config, num_chunks)))
            outcomes.append(step(placed, batch_of_eight()))
    (expected, whole), (got, chunked) = outcomes
    for one, other in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)
    for one, other in zip(
        jax.tree.leaves(got.opt_state), jax.tree.leaves(expected.opt_state), strict=True
    ):  # the moments, which are the gradients of a first step
        np.testing.assert_allclose(one, other, **FLOAT32)


def test_chunks_are_of_positions_and_in_order():
    hidden = jnp.arange(24.0).reshape(2, 6, 2)
    fields = {"a": jnp.arange(12).reshape(2, 6)}
    got = over_chunks(lambda hidden, fields: (hidden[..., 0], fields["a"]), hidden, fields, 3)
    np.testing.assert_array_equal(got[0], [[[0, 2], [12, 14]], [[4, 6], [16, 18]],
                                           [[8, 10], [20, 22]]])  # fmt: skip
    np.testing.assert_array_equal(got[1], [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]])


def gradient_program(num_chunks, mesh=None):
    """The compiled gradient of a model with many ids."""
    config = tiny_config({"model": {"vocab_size": MANY}, "data": {"sequence_length": 128}})
    state = jax.eval_shape(lambda: tiny_state(config))
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((8, 128), jnp.int32) for name in names}
    batch["loss_weights"] = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def loss(params, batch):
        settings = {"model_state": state.model_state, "rng": jax.random.key(0)}
        totals = batch_totals(batch)
        return partial_loss(
            params, batch, totals, config.model, logits_chunks=num_chunks, **settings
        )[0]

    if mesh is None:
        return jax.jit(jax.grad(loss)).lower(state.params, batch).compile()
    with jax.set_mesh(make_mesh(mesh)):
        return jax.make_jaxpr(jax.grad(loss))(state.params, batch)


def test_the_logits_of_one_chunk_exist_at_a_time():
    logits_bytes = 8 * 128 * MANY * 4
    whole, chunked = (gradient_program(n).memory_analysis().temp_size_in_bytes for n in (1, 16))
    assert whole > 2 * logits_bytes and chunked < logits_bytes / 2


def sums_in_loops(jaxpr, in_loop=False):
    """The sizes of the arrays that loops sum over devices."""
    for equation in jaxpr.eqns:
        if in_loop and equation.primitive.name.startswith("psum"):
            yield from (value.aval.size for value in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sums_in_loops(inner, in_loop or equation.primitive.name == "scan")


def test_a_mesh_sums_the_gradient_of_the_head_after_the_loop():
    jaxpr = gradient_program(8, MeshConfig(data=2, fsdp=4)).jaxpr
    assert max(sums_in_loops(jaxpr), default=0) < MANY


def test_an_evaluation_in_chunks_is_the_same():
    config = tiny_training()
    state, data = tiny_state(config), open_data(config.data)
    said = [
        evaluate(state.params, state.model_state, in_chunks(config, n), data, max_batches=2)
        for n in (1, 4)
    ]
    for kind in ("dropless", "capacity_limited"):
        for name in ("nats_per_token", "bits_per_byte"):
            np.testing.assert_allclose(said[1][kind][name], said[0][kind][name], rtol=1e-6)


def test_chunks_that_do_not_fit_are_refused():
    config = in_chunks(tiny_config(), 5)
    with pytest.raises(ValueError, match=r"must divide the positions .*logits_chunks=5, 16 pos"):
        check_run(config, make_mesh(MeshConfig(data=1)))
    training = dataclasses.replace(tiny_config().training, loss=Distil(teacher="runs/teacher"))
    with pytest.raises(ValueError, match="needs a training loss that declares takes_chunks"):
        dataclasses.replace(training, logits_chunks=2)


def test_plans_count_less_memory_and_one_more_product():
    config = tiny_config({"model": {"vocab_size": 65536}})
    whole, chunked = (resolve(in_chunks(config, n), 1, "cpu") for n in (1, 4))
    assert estimate_memory(chunked).logits == estimate_memory(whole).logits / 4
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, batch_size=8)
    )
    on_mesh = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4))
    whole_logits, of_chunk = (
        estimate_memory(resolve(in_chunks(on_mesh, n), 4, "cpu")).logits for n in (1, 4)
    )
    head = 65536 * 16 * 4  # bytes
    assert of_chunk == whole_logits / 4 + 2 * head, "gathered, and with its gradient"
    once = training_flops(config.model, 16)
    again = training_flops(config.model, 16, logits_chunks=4)
    assert again == once | {"head": once["head"] / 3 * 4}
    best = remedies(whole)[0]
    assert best.change == "--config.training.logits_chunks=16" and best.keeps_result
