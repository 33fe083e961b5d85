"""Latent attention: the absorbed form with a cache, padding, DeepSeek's own code, and costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.costs import kept_bytes, traced_costs
from moe_jax.layers.latent_attention import LatentAttention, absorb
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import Yarn
from moe_jax.parameters import dense, init_parameters
from moe_jax.part import Call, Dims, Own, RunShape
from moe_jax.weights.low_rank import LowRank
from moe_jax.weights.quantised import quantise

MODEL_DIM, LENGTH = 6, 9
DIMS = Dims(MODEL_DIM)
# Both YaRN factors differ from 1: 1.05 on cosines and 1.51 on the scale of scores.
YARN = Yarn(factor=10.0, original_length=16, fast_turns=4.0, mscale=1.3, mscale_all_dim=1.0)
PART = LatentAttention(
    num_heads=3, q_rank=5, kv_rank=6, nope_dim=4, rope_dim=6, value_dim=5,
    rotary=Rotary(base=100.0, interleaved=True, scaling=YARN), use_bias=True,
)  # fmt: skip
CLOSE = 1e-5


def wave(shape, start):
    """Numbers in [-1, 1] that are the same in every language."""
    count = int(np.prod(shape))
    return np.sin(1.7 * np.arange(count) + start).reshape(shape).astype(np.float32)


def waves(part):
    """Parameters away from their neutral values; norm scales in [0.5, 1.5]."""

    def draw(path, spec):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = wave(spec.shape, start=len(name) + ord(name[1]))
        return 1 + values / 2 if "norm" in name else values

    return jax.tree_util.tree_map_with_path(draw, part.specs(DIMS))


PARAMS, TOKENS = waves(PART), 2 * wave((2, LENGTH, MODEL_DIM), 0.3)


@functools.partial(jax.jit, static_argnames="part")
def run(x_BLM, call=None, cache=None, part=PART, params=PARAMS):
    """The outputs of a call, and the cache after it."""
    call = (call or Call()).with_defaults(x_BLM)
    y_BLM, _, cache = part.apply(params, x_BLM, call, Own(cache=cache))
    return y_BLM, cache


def empty_cache(batch, length=LENGTH, dtype=None):
    specs = PART.cache_specs(DIMS, batch, length)
    cache = init_parameters(jax.random.key(0), specs)
    return {
        name: a if dtype is None or name == "positions" else a.astype(dtype)
        for name, a in cache.items()
    }


def test_attention_is_what_its_equations_say():
    """Token by token in float64, by equations 9 to 19 of the paper, without position scaling."""
    part = dataclasses.replace(PART, rotary=Rotary(base=100.0, interleaved=True))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)

    def normed(a, name):
        rms = np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + part.norm_epsilon)
        return a / rms * p[name]["scale"]

    def turned(a, position):
        pairs = a[..., ::2] + 1j * a[..., 1::2]
        angles = position * 100.0 ** (-np.arange(3) / 3)
        pairs = pairs * np.exp(1j * angles)
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(a.shape)

    x = TOKENS[0].astype(np.float64)
    q = (normed(x @ p["wq_a"] + p["bq_a"], "q_norm") @ p["wq_b"]).reshape(LENGTH, 3, 10)
    latent, key = np.split(x @ p["wkv_a"] + p["bkv_a"], [6], axis=-1)
    k, v = np.split((normed(latent, "kv_norm") @ p["wkv_b"]).reshape(LENGTH, 3, 9), [4], axis=-1)
    expected = []
    for i in range(LENGTH):
        heads = []
        for n in range(3):
            scores = [
                q[i, n, :4] @ k[j, n] + turned(q[i, n, 4:], i) @ turned(key[j], j)
                for j in range(i + 1)
            ]
            weights = np.exp(np.array(scores) / np.sqrt(10))
            heads.append(weights @ v[: i + 1, n] / weights.sum())
        expected.append(np.concatenate(heads) @ p["wo"] + p["bo"])
    np.testing.assert_allclose(run(TOKENS, part=part)[0][0], expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (4, 3, 1, 1)], ids=str)
def test_the_absorbed_form_with_a_cache_is_the_plain_one(pieces):
    """This includes a row padded on the left, whose positions start after the padding."""
    padding = np.array([0, 3])
    positions = np.arange(LENGTH) - padding[:, None]
    segments = (positions >= 0).astype(np.int32)
    whole, none = run(TOKENS, Call(positions_BL=positions, segments_BL=segments))
    assert none is None
    cache, outputs, start = empty_cache(2, LENGTH + 2), [], 0
    for length in pieces:
        now = np.s_[:, start : start + length]
        call = Call(
            positions_BL=positions[now], segments_BL=segments[now], cache_index=jnp.int32(start)
        )
        y, cache = run(TOKENS[now], call, cache)
        outputs.append(y)
        start += length
    valid = segments > 0
    got = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(got[valid], whole[valid], rtol=CLOSE, atol=CLOSE)
    np.testing.assert_array_equal(cache["positions"][1], [-1, -1, -1, *range(6), -1, -1])
    # The tokens of a padded row give what they give without padding.
    alone, _ = run(TOKENS[1:, 3:])
    np.testing.assert_allclose(got[1, 3:], alone[0], rtol=CLOSE, atol=CLOSE)


def test_positions_go_on_at_the_first_slot_that_is_free():
    _, cache = run(TOKENS[:, :4], Call(cache_index=jnp.int32(0)), empty_cache(2))
    y, cache = run(TOKENS[:, 4:6], Call(cache_index=jnp.int32(4)), cache)
    np.testing.assert_array_equal(cache["positions"][0], [0, 1, 2, 3, 4, 5, -1, -1, -1])
    np.testing.assert_allclose(y, run(TOKENS)[0][:, 4:6], rtol=CLOSE, atol=CLOSE)


def test_a_call_says_where_it_writes():
    with pytest.raises(ValueError, match="Set Call"):
        run(TOKENS, Call(), empty_cache(2))


def test_a_cache_keeps_its_dtype():
    y, cache = run(TOKENS, Call(cache_index=jnp.int32(0)), empty_cache(2, dtype=jnp.bfloat16))
    assert (y.dtype, cache["latent"].dtype) == (jnp.float32, jnp.bfloat16)
    assert cache["positions"].dtype == jnp.int32
    np.testing.assert_allclose(y, run(TOKENS)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("q_rank", [0, 5])
def test_documents_of_a_row_do_not_see_each_other(q_rank):
    part = dataclasses.replace(PART, q_rank=q_rank)
    params = waves(part)
    positions, segments = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), np.array([[1] * 4 + [2] * 5])
    call = Call(positions_BL=positions, segments_BL=segments)
    y, _ = run(TOKENS[:1], call, part=part, params=params)
    for document in (np.s_[:, :4], np.s_[:, 4:]):
        alone, _ = run(TOKENS[:1][document], part=part, params=params)
        np.testing.assert_allclose(y[document], alone, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("quantised", [False, True])
def test_parting_the_matrix_is_parting_the_heads(quantised):
    """Many tokens split the matrix, few split the heads; weights of several arrays split too."""
    part = dataclasses.replace(PART, rotary=Rotary(base=100.0), use_bias=False)
    weight = jnp.asarray(wave((6, 27), 0.1))  # three heads of 4 + 5
    if quantised:
        weight = quantise(weight, 4, 2)
        a, b = wave((6, 2), 0.2), wave((2, 27), 0.4)
        weight = LowRank(weight, jnp.asarray(a), jnp.asarray(b), scale=0.5)
    x_BLI = jnp.asarray(wave((2, 9, 6), 0.3))
    heads = (x_BLI @ dense(weight)).reshape(2, 9, 3, 9)
    for tokens in (x_BLI, x_BLI[:, :2]):  # 18 and 4 tokens, of 6 numbers
        first, rest = part.parted(tokens, weight, 9)
        expected = heads[:, : tokens.shape[1]]
        np.testing.assert_allclose(first, expected[..., :4], atol=CLOSE)
        np.testing.assert_allclose(rest, expected[..., 4:], atol=CLOSE)
    many, few = (str(jax.make_jaxpr(lambda x: part.parted(x, weight, 9))(x))
                 for x in (x_BLI, x_BLI[:, :2]))  # fmt: skip
    assert many.count("dot_general") == 2 * few.count("dot_general")


def test_one_head_of_one_dim_by_hand():
    """Two tokens: latents 1 and 3, keys 2c, values 5c; a query of ln(3)/4 weighs them 1 : 3."""
    one = jnp.ones((1, 1, 1, 1))
    got = absorb(
        one * np.log(3) / 4, 0 * one, jnp.array([[[1.0], [3.0]]]), jnp.array([[[7.0], [9.0]]]),
        jnp.array([[[2.0, 5.0]]]), jnp.ones((1, 1, 1, 2), bool), scale=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(got, 5 * (1 * 1 / 4 + 3 * 3 / 4), rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    def objective(params, x):
        y = PART.apply(params, x, Call().with_defaults(x), Own())[0]
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    grad = jax.jit(jax.grad(objective, has_aux=True))
    (gradients, y), (expected, exact) = (
        grad(PARAMS, TOKENS.astype(dtype)) for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert y.dtype == jnp.bfloat16
    assert np.linalg.norm(np.float32(y) - exact) < 0.05 * np.linalg.norm(exact)
    leaves = jax.tree.leaves_with_path(gradients)
    for (path, one), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < 0.05, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("q_rank", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_costs_that_are_written_out_agree_with_a_trace(dtype, q_rank):
    part = dataclasses.replace(PART, q_rank=q_rank)
    written, traced = part.costs(DIMS, 16, dtype), traced_costs(part, DIMS, 16, dtype)
    for own, other in zip(written, traced, strict=True):
        assert own.flops == other.flops
        assert own.saved_dots.on(1) == other.saved_dots.on(1)
        assert (own.kind, own.sums) == (other.kind, other.sums)
    assert written[0].traffic.on(1) == traced[0].traffic.on(1)
    sizes = [sum(cost.saved.on(1) for cost in costs) for costs in (written, traced)]
    assert 0.5 * sizes[0] <= sizes[1] <= 2 * sizes[0]
    kept = 12 * jnp.dtype(dtype).itemsize + 4
    cache = kept_bytes(part.cache_specs(DIMS, 1, 16), dtype)
    assert cache.on(1) == 16 * kept, "the latent, the rotary key, and a position"


def test_heads_stay_whole_on_a_mesh():
    shards = {"heads": 2, "model": 1}
    dataclasses.replace(PART, num_heads=4).check_run(DIMS, RunShape(1, LENGTH, shards))
    with pytest.raises(ValueError, match="tensor must divide the heads"):
        dataclasses.replace(PART, nope_dim=6, value_dim=6).check_run(
            DIMS, RunShape(1, LENGTH, shards)
        )


def deepseek(part, tokens, version):
    """DeepSeek's attention in transformers: outputs, and gradients of parameters and inputs.

    The gradients are those of the sum of outputs times `wave`, in our parameter tree.
    """
    torch = pytest.importorskip("torch")
    name = f"transformers.models.deepseek_v{version}"
    modeling = pytest.importorskip(f"{name}.modeling_deepseek_v{version}")
    yarn = part.rotary.scaling
    config = getattr(modeling, f"DeepseekV{version}Config")(
        hidden_size=MODEL_DIM, num_attention_heads=part.num_heads,
        num_key_value_heads=part.num_heads, q_lora_rank=part.q_rank or None,
        kv_lora_rank=part.kv_rank, qk_nope_head_dim=part.nope_dim,
        qk_rope_head_dim=part.rope_dim, v_head_dim=part.value_dim, attention_bias=True,
        max_position_embeddings=160, rms_norm_eps=0.1, attn_implementation="eager",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": part.rotary.base, "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.fast_turns, "beta_slow": yarn.slow_turns,
            "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
        },
        **({"rope_interleave": part.rotary.interleaved} if version == 3 else {}),
    )  # fmt: skip
    attention = getattr(modeling, f"DeepseekV{version}Attention")(config, layer_idx=0)
    rotary = getattr(modeling, f"DeepseekV{version}RotaryEmbedding")(config)
    names = {
        "wq": "q_proj.weight", "wq_a": "q_a_proj.weight", "bq_a": "q_a_proj.bias",
        "q_norm": "q_a_layernorm.weight", "wq_b": "q_b_proj.weight",
        "wkv_a": "kv_a_proj_with_mqa.weight", "bkv_a": "kv_a_proj_with_mqa.bias",
        "kv_norm": "kv_a_layernorm.weight", "wkv_b": "kv_b_proj.weight", "wo": "o_proj.weight",
        "bo": "o_proj.bias",
    }  # fmt: skip
    params = {n: p["scale"] if "norm" in n else p for n, p in waves(part).items()}
    attention.load_state_dict({names[n]: torch.tensor(p.T) for n, p in params.items()})
    x = torch.tensor(tokens, requires_grad=True)
    length = x.shape[1]
    places = torch.arange(length)
    y = attention(
        hidden_states=x,
        position_embeddings=rotary(x, places[None]),
        attention_mask=torch.where(places > places[:, None], -torch.inf, 0.0)[None, None],
    )[0]
    (y * torch.tensor(wave(y.shape, 1.0))).sum().backward()
    given = dict(attention.named_parameters())
    gradients = {n: given[names[n]].grad.numpy().T for n in params}
    tree = {n: {"scale": g} if "norm" in n else g for n, g in gradients.items()}
    return y.detach().numpy(), tree, x.grad.numpy()


def ours(part, tokens):
    """The same results as `deepseek`, from our part."""

    @jax.jit
    def of(params, x):
        def objective(params, x):
            y = part.apply(params, x, Call().with_defaults(x), Own())[0]
            return jnp.sum(y * wave(y.shape, 1.0)), y

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)

    (gradients, dx), y = of(waves(part), tokens)
    return y, gradients, dx


@pytest.mark.slow
@pytest.mark.parametrize("q_rank", [0, 5])
@pytest.mark.parametrize(
    ("version", "interleaved"), [(2, True), (3, True), (3, False)], ids=["V2", "V3", "V3 halves"]
)
def test_transformers_has_the_same_outputs_and_gradients(version, interleaved, q_rank):
    rotary = dataclasses.replace(PART.rotary, interleaved=interleaved)
    part = dataclasses.replace(PART, q_rank=q_rank, rotary=rotary)
    tokens = wave((2, 40, MODEL_DIM), 0.6)
    expected, got = deepseek(part, tokens, version), ours(part, tokens)
    np.testing.assert_allclose(got[0], expected[0], rtol=2e-5, atol=2e-5)

    def same(path, given, wanted):
        error = np.linalg.norm(given - wanted) / np.linalg.norm(wanted)
        assert error <= 5e-4, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(same, got[1:], expected[1:])


# Results of `deepseek(PART, TOKENS[:1], version=2)` with transformers 5.24 and torch 2.13: outputs
# of two tokens, then gradient norms of the parameters, in the order of `jax.tree.leaves`, and of
# the tokens.
SAVED = {
    "last outputs": [
        [9.1811132, -7.2920375, -7.3020358, 9.1736898, 4.938077, -10.4461803],
        [9.7246027, -5.5611978, -8.2915449, 7.6978378, 6.3078957, -9.3233118],
    ],
    "norms": [
        11.61933,
        1.70201,
        11.18438,
        81.96145,
        75.07546,
        44.4539,
        109.59535,
        94.64028,
        98.35972,
        296.28729,
        29.27312,
    ],
}


def test_outputs_are_those_that_were_saved_of_transformers():
    y, gradients, dx = ours(PART, TOKENS[:1])
    np.testing.assert_allclose(y[0, -2:], SAVED["last outputs"], rtol=2e-5, atol=2e-5)
    norms = [np.linalg.norm(leaf) for leaf in (*jax.tree.leaves(gradients), dx)]
    np.testing.assert_allclose(norms, SAVED["norms"], rtol=5e-4)


@pytest.mark.slow
def test_a_factor_of_the_softmax_that_is_left_out_is_found_out():
    """The planted fault: YaRN with the same cosines, but no factor on the scale of the scores."""
    factor = YARN.cos_sin_factor
    scaling = dataclasses.replace(YARN, attention_factor=factor, mscale=0.0, mscale_all_dim=0.0)
    faulty = dataclasses.replace(PART, rotary=dataclasses.replace(PART.rotary, scaling=scaling))
    y, *_ = ours(faulty, TOKENS[:1])
    assert np.abs(y[0, -2:] - np.array(SAVED["last outputs"])).max() > 0.1
