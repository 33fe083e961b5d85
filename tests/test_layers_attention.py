"""Attention and its options equal a loop over queries, heads and keys in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import Attention, Temperature
from moe_jax.layers.dot_product import attend
from moe_jax.layers.norms import LayerNorm, RMSNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import LongRope, Yarn
from moe_jax.part import Call, Dims, Own
from tests.tiny_run import quick_jit

# Sums of a few float32 products, with results near 1.
FLOAT32 = 1e-5
MODEL_DIM = 8


def normed(x, norm, params):
    """Normalises over the last dim."""
    x = x - (np.mean(x, -1, keepdims=True) if isinstance(norm, LayerNorm) else 0)
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + norm.epsilon)
    return x * params.get("scale", 1) + params.get("bias", 0)


def turned(x_LND, rotary):
    """Rotates one document's tokens by complex numbers."""
    dim = rotary.dim or x_LND.shape[-1]
    frequency = rotary.base ** (-np.arange(dim // 2) / (dim // 2))
    factor = 1.0
    if isinstance(rotary.scaling, LongRope):
        long = len(x_LND) > rotary.scaling.original_length
        factors = rotary.scaling.long_factors if long else rotary.scaling.short_factors
        frequency, factor = frequency / np.array(factors), rotary.scaling.cos_sin_factor
    rotation = factor * np.exp(1j * np.arange(len(x_LND))[:, None, None] * frequency)
    x, rest = x_LND[..., :dim], x_LND[..., dim:]
    if rotary.interleaved:
        z = (x[..., ::2] + 1j * x[..., 1::2]) * rotation
        x = np.stack([z.real, z.imag], -1).reshape(x.shape)
    else:
        z = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * rotation
        x = np.concatenate([z.real, z.imag], -1)
    return np.concatenate([x, rest], -1)


def oracle(x_LM, params, a, causal=True, bias_NLT=None, prefix=0):
    """Attention over one document, whose first `prefix` tokens are visible to all its tokens."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    length = len(x_LM)

    def clip(x):
        return x if a.clip_qkv is None else np.clip(x, -a.clip_qkv, a.clip_qkv)

    def heads(name):
        out = x_LM @ params["w" + name] + params.get("b" + name, 0)
        out = clip(out) if a.clip_first else out
        norm = a.qk_norm if name in "qk" else None
        if norm and a.qk_norm_at == "projection":
            out = normed(out, norm, params[f"{name}_norm"])
        out = out.reshape(length, -1, a.head_dim)
        if norm and a.qk_norm_at == "heads":
            out = normed(out, norm, params[f"{name}_norm"])
        out = out if a.clip_first else clip(out)
        if a.rotary and name in "qk":
            out = turned(out, a.rotary)
        if norm and a.qk_norm_at == "rotated":
            out = normed(out, norm, params[f"{name}_norm"])
        return out

    q, k, v = heads("q"), heads("k"), heads("v")
    out = np.zeros((length, a.num_heads, a.head_dim))
    for i in range(length):
        keys = [
            j
            for j in range(length)
            if (j <= i or j < prefix or not causal)
            and (a.window is None or abs(i - j) < a.window)
            and (a.chunk is None or i // a.chunk == j // a.chunk)
        ]
        warm = 1.0
        if a.temperature:
            warm += np.log(1 + (i + 1) // a.temperature.floor) * a.temperature.scale
        for n in range(a.num_heads):
            own = n // (a.num_heads // a.kv_heads)
            scores = np.array([warm * q[i, n] @ k[j, own] for j in keys])
            scores *= a.head_dim**-0.5 if a.scale is None else a.scale
            if a.softcap:
                scores = a.softcap * np.tanh(scores / a.softcap)
            if bias_NLT is not None:
                scores += [bias_NLT[n, i, j] for j in keys]
            values = [v[j, own] for j in keys]
            if a.prefix:
                learned = warm * params["prefix"]["keys"][:, own].astype(np.float64) @ q[i, n]
                learned *= a.head_dim**-0.5 if a.scale is None else a.scale
                learned = a.softcap * np.tanh(learned / a.softcap) if a.softcap else learned
                scores = np.concatenate([scores, learned])
                values += list(params["prefix"]["values"][:, own])
            weights = np.exp(scores)
            weights /= weights.sum() + (np.exp(params["sink"][n]) if a.sink else 0)
            out[i, n] = sum(w * value for w, value in zip(weights, values, strict=True))
    return out.reshape(length, -1) @ params["wo"] + params.get("bo", 0)


WEIGHTLESS = RMSNorm(epsilon=0.1, use_scale=False)
LONG = LongRope(short_factors=(1.0, 2.0), long_factors=(3.0, 5.0), original_length=6, factor=2.0)
# Options in addition to two heads of 4, and whether the stack is causal.
OPTIONS = {
    "plain": ({}, True),
    "encoder": ({}, False),
    "one key head": ({"num_heads": 3, "num_kv_heads": 1}, True),
    "grouped": ({"num_heads": 4, "num_kv_heads": 2, "softcap": 1.0, "sink": True}, True),
    "biases": ({"biases": tuple("qkvo"), "rotary": Rotary(base=100.0)}, True),
    "some biases": ({"biases": ("q", "o"), "rotary": None}, True),
    "norms of heads": ({"qk_norm": RMSNorm(), "num_kv_heads": 1}, True),
    "LayerNorm of heads, encoder": ({"qk_norm": LayerNorm(use_bias=False)}, False),
    "norms of projections": ({"qk_norm": RMSNorm(), "qk_norm_at": "projection"}, True),
    "norms behind rotary": ({"qk_norm": RMSNorm(), "qk_norm_at": "rotated"}, True),
    "weightless norms": ({"qk_norm": WEIGHTLESS}, True),
    "clip": ({"clip_qkv": 0.5}, True),
    "norm, then clip": (
        {"clip_qkv": 0.5, "qk_norm": RMSNorm(), "qk_norm_at": "projection"}, True,
    ),
    "clip, then norm": (
        {"clip_qkv": 0.5, "clip_first": True, "qk_norm": RMSNorm(), "qk_norm_at": "projection"},
        True,
    ),
    "clip behind norms of heads": ({"clip_qkv": 0.5, "qk_norm": RMSNorm()}, True),
    "interleaved": ({"rotary": Rotary(interleaved=True)}, True),
    "partial": ({"rotary": Rotary(dim=2)}, True),
    "long documents": ({"rotary": Rotary(base=10.0, scaling=LONG)}, True),
    "temperature": ({"rotary": None, "temperature": Temperature(floor=3, scale=0.5)}, True),
    "scale": ({"scale": 1.0}, True),
    "window": ({"window": 3}, True),
    "window of an encoder": ({"window": 3}, False),
    "chunk": ({"chunk": 3}, True),
    "cap": ({"softcap": 0.5}, True),
    "sink": ({"sink": True, "window": 2}, True),
    "sink of an encoder": ({"sink": True}, False),
    "prefix": ({"prefix": 3, "window": 2, "num_kv_heads": 1}, True),
    "prefix of an encoder": ({"prefix": 2, "softcap": 0.5, "sink": True}, False),
}  # fmt: skip
FIRST, SECOND, ROW = 5, 7, 14  # tokens of two documents, and of a row


def made(options):
    attention = Attention(**{"num_heads": 2, "head_dim": 4} | options)
    random = np.random.default_rng(3)
    params = jax.tree.map(
        lambda spec: jnp.asarray(random.normal(size=spec.shape) / 2, jnp.float32),
        attention.specs(Dims(MODEL_DIM)),
    )
    x = random.normal(size=(3, ROW, MODEL_DIM)).astype(np.float32)
    return attention, params, x


# Row 0: both documents, then padding. Row 1: one document padded on the left. Row 2: on the right.
SEGMENTS = np.array(
    [[1] * FIRST + [2] * SECOND + [0] * 2, [0] * 9 + [1] * FIRST, [1] * SECOND + [0] * 7], np.int32
)
POSITIONS = np.array(
    [[*range(FIRST), *range(SECOND), 0, 1], [0] * 9 + [*range(FIRST)], [*range(ROW)]], np.int32
)
PLACES = [(0, 0, FIRST), (0, FIRST, FIRST + SECOND), (1, 9, ROW), (2, 0, SECOND)]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_document_gives_what_it_gives_alone_packed_or_padded(name):
    options, causal = OPTIONS[name]
    attention, params, x = made(options)
    call = Call(positions_BL=POSITIONS, segments_BL=SEGMENTS, causal=causal)
    y, aux, cache = attention.apply(params, jnp.asarray(x), call, Own())
    assert aux is None and cache is None and y.dtype == jnp.float32
    assert np.isfinite(y).all(), "padding too"
    for row, start, end in PLACES:
        alone = oracle(x[row, start:end].astype(np.float64), params, attention, causal)
        np.testing.assert_allclose(y[row, start:end], alone, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("name", ["grouped", "window", "chunk", "long documents"])
def test_a_prefix_is_seen_from_both_sides(name):
    """The prefix is 3 tokens of each document; windows and chunks still apply to it."""
    attention, params, x = made(OPTIONS[name][0])
    marks = (SEGMENTS > 0) & (POSITIONS < 3)
    call = Call(positions_BL=POSITIONS, segments_BL=SEGMENTS, in_prefix_BL=jnp.asarray(marks))
    y, _, _ = attention.apply(params, jnp.asarray(x), call, Own())
    for row, start, end in PLACES:
        text = x[row, start:end].astype(np.float64)
        both, behind = (oracle(text, params, attention, prefix=count) for count in (3, 0))
        np.testing.assert_allclose(y[row, start:end], both, rtol=FLOAT32, atol=FLOAT32)
        assert np.abs(both - behind)[:2].max() > 1e-3
        np.testing.assert_array_equal(both[3:], behind[3:])


@pytest.mark.parametrize("name", [name for name, (options, _) in OPTIONS.items() if options])
def test_an_option_changes_the_result(name):
    """Clips, windows, caps and chunks take effect in these cases, and step order matters."""
    options, causal = OPTIONS[name]
    attention, params, x = made(options)
    x = x[2, :SECOND].astype(np.float64)
    y = oracle(x, params, attention, causal)
    defaults = {field.name: field.default for field in dataclasses.fields(Attention)}
    for option in set(options) - {"num_heads", "num_kv_heads", "head_dim", "biases"}:
        without = dataclasses.replace(attention, **{option: defaults[option]})
        others = dict(params)
        if (option, options[option]) == ("qk_norm_at", "projection"):
            others |= {name: {"scale": np.ones(4)} for name in ("q_norm", "k_norm")}
        assert np.abs(oracle(x, others, without, causal) - y).max() > 1e-3, option


def test_parameters_are_those_of_the_options():
    def shapes(**options):
        specs = Attention(num_heads=4, num_kv_heads=2, head_dim=6, **options).specs(Dims(8))
        return jax.tree.map(lambda spec: (spec.shape, spec.axes), specs)

    plain = shapes()
    assert set(plain) == {"wq", "wk", "wv", "wo"}
    biases = {
        "bq": ((24,), ("heads",)), "bv": ((12,), ("heads",)), "bo": ((8,), ("model",)),
    }  # fmt: skip
    assert shapes(biases=("q", "v", "o")) == plain | biases
    per_head = {"scale": ((6,), (None,))}
    norms = {"q_norm": per_head, "k_norm": per_head}
    assert shapes(qk_norm=RMSNorm()) == shapes(qk_norm=RMSNorm(), qk_norm_at="rotated")
    assert shapes(qk_norm=RMSNorm()) == plain | norms
    whole = {"q_norm": {"scale": ((24,), ("heads",))}, "k_norm": {"scale": ((12,), ("heads",))}}
    assert shapes(qk_norm=RMSNorm(), qk_norm_at="projection") == plain | whole
    assert shapes(qk_norm=WEIGHTLESS) == plain | {"q_norm": {}, "k_norm": {}}
    own = ((5, 2, 6), (None, "heads", None))
    assert shapes(prefix=5) == plain | {"prefix": {"keys": own, "values": own}}
    assert shapes(sink=True, window=4, softcap=2.0) == plain | {"sink": ((4,), ("heads",))}


def test_weights_by_hand():
    """One query; two keys with scores ln 3 and 0, and values 1 and 0."""
    q, k = jnp.ones((1, 1, 1, 1)), jnp.log(jnp.array([3.0, 1.0])).reshape(1, 2, 1, 1)
    v, seen = jnp.array([1.0, 0.0]).reshape(1, 2, 1, 1), jnp.ones((1, 1, 1, 2), bool)

    def mean(**options):
        return attend(q, k, v, seen, **{"scale": 1.0} | options).item()

    close = pytest.approx
    assert mean() == close(3 / 4)
    assert mean(scale=2.0) == close(9 / 10)
    assert mean(sink_N=jnp.zeros(1)) == close(3 / 5), "3 / (3 + 1 + 1)"
    assert mean(sink_N=jnp.log(jnp.array([4.0]))) == close(3 / 8)
    assert mean(bias_BNLT=jnp.log(jnp.array([1.0, 2.0])).reshape(1, 1, 1, 2)) == close(3 / 5)
    # 0.5 tanh(2 ln 3) = 0.5 (81 - 1) / (81 + 1). The cap applies to scores without the bias.
    capped = np.exp(0.5 * 80 / 82)
    assert mean(softcap=0.5) == close(capped / (capped + 1))
    bias = jnp.log(jnp.array([1.0, 2.0])).reshape(1, 1, 1, 2)
    assert mean(softcap=0.5, bias_BNLT=bias) == close(capped / (capped + 2))
    assert mean(softcap=0.5, sink_N=jnp.zeros(1)) == close(capped / (capped + 2))


def test_the_own_softmax_is_that_of_jax():
    """A cap far above the scores and a sink with no weight leave the result unchanged."""
    random = np.random.default_rng(0)
    q = random.normal(size=(2, 5, 4, 3)).astype(np.float32)
    k, v = random.normal(size=(2, 2, 6, 2, 3)).astype(np.float32)
    seen = jnp.asarray(random.random((2, 1, 5, 6)) < 0.7).at[..., 0].set(True)
    bias = random.normal(size=(1, 4, 5, 6)).astype(np.float32)
    plain = attend(q, k, v, seen, scale=0.7, bias_BNLT=bias)
    own = attend(q, k, v, seen, scale=0.7, bias_BNLT=bias, sink_N=jnp.full(4, -1e9))
    np.testing.assert_allclose(own, plain, rtol=FLOAT32, atol=1e-6)
    own = attend(q, k, v, seen, scale=0.7, bias_BNLT=bias, softcap=1e4)
    np.testing.assert_allclose(own, plain, rtol=FLOAT32, atol=1e-6)
    # Values wider than keys: each column is computed alike.
    wide = attend(q, k, np.concatenate([v, 2 * v], -1), seen, scale=0.7, bias_BNLT=bias)
    np.testing.assert_allclose(wide[..., :3], plain, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(wide[..., 3:], 2 * plain, rtol=FLOAT32, atol=1e-6)


EVERYTHING = Attention(
    num_heads=2, head_dim=4, biases=tuple("qkvo"), qk_norm=RMSNorm(), qk_norm_at="rotated",
    clip_qkv=1.0, rotary=Rotary(interleaved=True, scaling=Yarn(factor=4.0, original_length=8)),
    temperature=Temperature(floor=3), window=4, chunk=6, softcap=2.0, sink=True,
)  # fmt: skip


@pytest.mark.parametrize("attention", [Attention(num_heads=2, head_dim=4), EVERYTHING])
def test_no_number_is_lost_in_bfloat16(attention):
    """Outputs and gradients are finite with rows of padding and scores of some thousands."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: jnp.asarray(8 * random.normal(size=spec.shape), jnp.float32),
        attention.specs(Dims(MODEL_DIM)),
    )
    x = jnp.asarray(random.normal(size=(3, ROW, MODEL_DIM)), jnp.bfloat16)
    segments = SEGMENTS.copy()
    segments[1] = 0
    call = Call(positions_BL=POSITIONS, segments_BL=segments)

    @quick_jit
    def run(params, x):
        y, back = jax.vjp(lambda *inputs: attention.apply(*inputs, call, Own())[0], params, x)
        return y, back(y)

    y, gradients = run(params, x)
    assert y.dtype == jnp.bfloat16
    for path, leaf in jax.tree.leaves_with_path((y, gradients)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), jax.tree_util.keystr(path)


def test_a_position_bias_names_a_shared_part():
    attention, params, x = made({"position_bias": "position"})
    call = Call(positions_BL=POSITIONS, segments_BL=SEGMENTS, shared={"other": 0})
    message = r"'position', the shared parts of this stack are \['other'\]\. .* or encoder\.shared"
    with pytest.raises(ValueError, match=message):
        attention.apply(params, jnp.asarray(x), call, Own())
    call = dataclasses.replace(call, shared={"position": jnp.zeros((1, 3, ROW, ROW))})
    with pytest.raises(ValueError, match=r"\[1 or batch, heads, queries, keys\].*, 2 heads"):
        attention.apply(params, jnp.asarray(x), call, Own())


@pytest.mark.parametrize("more", [{}, {"softcap": 0.5}, {"sink": True}, {"prefix": 2}])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_position_bias_is_added_to_scores(rows, more):
    attention, params, x = made({"position_bias": "position", "num_kv_heads": 1, **more})
    bias = np.random.default_rng(0).normal(size=(rows, 2, ROW, ROW)).astype(np.float32)
    call = Call(positions_BL=POSITIONS, segments_BL=SEGMENTS, shared={"position": bias})
    y, _, _ = attention.apply(params, jnp.asarray(x), call, Own())
    for row, start, end in PLACES:
        here = bias[min(row, rows - 1), :, start:end, start:end]
        alone = oracle(x[row, start:end].astype(np.float64), params, attention, True, here)
        np.testing.assert_allclose(y[row, start:end], alone, rtol=FLOAT32, atol=FLOAT32)
