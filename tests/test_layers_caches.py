"""A model whose layers carry caches between calls: pieces of a sequence equal the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.mamba import Mamba
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import init_parameters
from moe_jax.part import Call

BATCH, LENGTH, VOCAB = 4, 8, 16
MODEL = LanguageModel(
    vocab_size=VOCAB,
    model_dim=8,
    parts={
        "mamba": Mamba(state_dim=4, chunk_size=3),
        "attention": LatentAttention(num_heads=2, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=4),
        "mlp": Mlp(dim=8),
    },
    stack=StackLayout(unit=(("mamba", "mlp"), ("attention", "mlp")), repeats=2, last=(("mamba",),)),
)
# The second row is padded on the left.
POSITIONS = np.arange(LENGTH) - np.array([0, 3, 0, 0])[:, None]
SEGMENTS = (POSITIONS >= 0).astype(np.int32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_in_pieces(model, params, cache):
    """Logits of calls with 3, 4 and 1 tokens, or of one call if there is no cache."""
    outputs, start = [], 0
    for length in (3, 4, 1) if cache else (LENGTH,):
        now = np.s_[:, start : start + length]
        call = Call(
            tokens_BL=TOKENS[now], positions_BL=POSITIONS[now], segments_BL=SEGMENTS[now],
            cache_index=jnp.int32(start) if cache else None,
        )  # fmt: skip
        output = model.run(params, call, cache=cache)
        outputs.append(output.logits_BLV)
        cache, start = output.cache, start + length
    return jnp.concatenate(outputs, axis=1)


def test_positions_of_rows_that_go_on_in_slots_of_their_own():
    x = jnp.zeros((2, 2, 1))
    of_rows = Call(cache_index=jnp.array([3, 7])).with_defaults(x)
    assert of_rows.positions_BL.tolist() == [[3, 4], [7, 8]]
    of_all = Call(cache_index=jnp.int32(3)).with_defaults(x)
    assert of_all.positions_BL.tolist() == [[3, 4], [3, 4]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"scan_layers": True}, {"scan_layers": False}, {"remat": "full"}, {"mesh": True}],
    ids=str,
)
def test_calls_that_carry_caches_give_what_one_call_gives(settings):
    settings = dict(settings)
    on_mesh = settings.pop("mesh", False)
    model = dataclasses.replace(MODEL, **settings)
    specs = {
        "params": model.specs(),
        "cache": model.decoder.cache_specs(model.dims, BATCH, LENGTH),
    }
    values = init_parameters(jax.random.key(0), specs)
    expected = logits_in_pieces(MODEL, values["params"], None)
    if on_mesh:
        mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
        values = jax.tree.map(
            lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)),
            specs, values,
        )  # fmt: skip
        with jax.set_mesh(mesh):
            got = logits_in_pieces(model, **values)
    else:
        got = logits_in_pieces(model, **values)
    valid = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[valid], expected[valid], rtol=2e-5, atol=2e-5)
