"""Every kind of router gives on a mesh what it gives on one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.part import Call, Dims
from tests.slow import slow_but
from tests.tiny_run import quick_jit

# On a mesh the same float32 products are summed in another order.
FLOAT32 = 2e-6

BATCH, LENGTH, MODEL_DIM, E = 8, 6, 4, 4
MESH = MeshConfig(data=2, expert=4)
ROUTERS = {
    name: ExpertChoice(predictor_loss_weight=1.0) if name == "expert_choice"
    else load_kind("router", name)() for name in KINDS["router"]
}  # fmt: skip


def make_moe(name):
    return MoE(
        num_experts=E,
        num_selected_experts=1 if name == "base" else 2,
        expert_dim=4,
        group_size=LENGTH,
        run_experts="auto" if name == "soft" else "gather",
        capacity=Capacity(train_factor=1.0),
        router=ROUTERS[name],
        losses=(LoadBalance(weight=1.0, scope="microbatch"), RouterZ(weight=1.0)),
    )


def run_block(moe, mesh):
    """Output and gradients of a training pass, and what the block reports."""
    random = np.random.default_rng(0)
    specs = moe.specs(Dims(MODEL_DIM))
    params = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), specs)
    x, dy = random.normal(size=(2, BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
    tokens = random.integers(0, 9, size=(BATCH, LENGTH))
    valid = random.random((BATCH, LENGTH)) < 0.8

    def objective(params, x):
        call = Call(
            segments_BL=jnp.asarray(valid, jnp.int32),
            tokens_BL=jnp.asarray(tokens, jnp.int32),
            rng=jax.random.key(0),
        )
        y, aux = moe_block(params, x, moe, call)
        of_layers = jax.tree.map(lambda leaf: leaf[None], aux)
        losses = moe.loss(of_layers, aux.sums["num_tokens"].astype(jnp.float32), None)
        return jnp.sum(y * dy) + losses, (y, aux)

    in_use = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    if mesh is not None:
        params = jax.tree.map(
            lambda value, spec: jax.device_put(value, named_sharding(spec.axes, mesh)),
            params, specs,
        )  # fmt: skip
    with in_use:
        run = quick_jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        (d_params, d_x), (y, aux) = run(params, x)
    said = {"output": y, "x": d_x, "params": d_params, "aux": aux}
    return jax.tree.map(np.asarray, said)


@pytest.mark.parametrize("name", slow_but(["token_choice", "expert_choice", "base"], ROUTERS))
def test_a_mesh_changes_nothing(name):
    moe = make_moe(name)
    expected, got = run_block(moe, None), run_block(moe, make_mesh(MESH))
    learned = {key: expected[key] for key in ("output", "x", "params")}
    for path, wanted in jax.tree.leaves_with_path(learned):
        assert np.abs(wanted).max() > 1e-3, f"{path}: nothing to compare"
    for (path, wanted), value in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(value, wanted, rtol=0, atol=FLOAT32 * scale, err_msg=str(path))
