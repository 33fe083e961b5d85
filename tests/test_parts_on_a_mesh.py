"""Every registered part gives on a mesh what it gives on one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.part import Call, Dims, Own

# On a mesh the same float32 products are summed in another order.
FLOAT32 = 2e-6

BATCH, LENGTH, MODEL_DIM = 4, 6, 4
MESH = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
# Settings that differ from the defaults, so that a part is small and splits evenly.
BRANCHES = (("attention", Attention(num_heads=2, head_dim=2)), ("mlp", Mlp(dim=6)))
SETTINGS = {
    "attention": {
        "num_heads": 2,
        "head_dim": 2,
        "biases": tuple("qkvo"),
        "qk_norm": RMSNorm(),
        "qk_norm_at": "projection",
        "clip_qkv": 1.0,
        "window": 4,
        "softcap": 1.0,
        "sink": True,
    },
    "cross_attention": {
        "num_heads": 2,
        "head_dim": 2,
        "biases": tuple("qkvo"),
        "qk_norm": RMSNorm(),
    },
    "mlp": {"dim": 6, "use_bias": True},
    "moe": {"num_experts": 4, "num_selected_experts": 2, "expert_dim": 6, "run_experts": "gather"},
    "layer": {"branches": BRANCHES},
    "parallel_layer": {"branches": BRANCHES},
}


def run(part, mesh):
    """Output, aux and gradients of one training pass."""
    random = np.random.default_rng(0)
    specs = part.specs(Dims(MODEL_DIM))
    params = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32) / 2, specs)
    x = random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
    segments = jnp.asarray(random.random((BATCH, LENGTH)) < 0.8, jnp.int32)
    memory = {"memory": x[:, ::-1], "memory_segments_BT": segments[:, ::-1]}
    call = Call(segments_BL=segments, rng=jax.random.key(0), **memory).with_defaults(x)

    def objective(params, x):
        y, aux, _ = part.apply(params, x, call, Own(index=jnp.int32(0)))
        weights = 2 * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y * weights), (y, aux)

    in_use = contextlib.nullcontext()
    if mesh is not None:
        in_use = jax.set_mesh(mesh)
        params = jax.tree.map(
            lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)),
            specs, params,
        )  # fmt: skip
    with in_use:
        return jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("kind", KINDS["part"])
def test_a_mesh_changes_nothing(kind):
    part = load_kind("part", kind)(**SETTINGS.get(kind, {}))
    expected, got = run(part, None), run(part, make_mesh(MESH))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, wanted), value in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        difference = np.abs(np.asarray(value, np.float64) - np.asarray(wanted)).max(initial=0)
        assert difference / scale <= FLOAT32, jax.tree_util.keystr(path)
