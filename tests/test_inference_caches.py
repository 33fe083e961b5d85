"""Continuing from caches gives the logits of one pass over the whole text, in every family.

Two prompts of different lengths are continued greedily. Then the resulting texts are read again.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from configs import switch_base
from moe_jax.config import MeshConfig, from_config_dict
from moe_jax.inference.decoding import Serving, decode, for_inference, layers_apart, prefill
from moe_jax.inference.generation import mesh_of
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.writer import prompts_of
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, EncoderInputs
from tests.hf_families import CASES, write_model
from tests.tiny_run import quick_jit, tiny_config, tiny_state

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
GREEDY = Sampling()
NO_TOKENS = jnp.zeros(0, jnp.int32)
PROMPTS = ((5, 9, 11, 3, 17, 8, 4), (7, 21, 6))
# What the encoder of an encoder-decoder reads for each prompt; its decoder continues PROMPTS.
READ = EncoderInputs(
    jnp.array([[5, 6, 7, 8, 9], [4, 3, 9, 0, 0]]), None, jnp.array([[1] * 5, [1, 1, 1, 0, 0]])
)
TOKENS = 4  # tokens per compiled call
QUICK = ("gpt_oss",)  # windows, sinks, biases


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def continued(config, params, prompts=PROMPTS, calls=3, *, state=None, encoder=None):
    """The texts and, after each call, the next-token logits: [calls + 1, B, V]."""
    model, serving = for_inference(config.model), Serving(params, state)
    length, room, numbers = max(map(len, prompts)), calls * TOKENS, range(len(prompts))
    how = {"model": model, "num_slots": length + room, "sampling": GREEDY}
    texts = [list(prompt) for prompt in prompts]
    with mesh_of(params):
        lengths = [len(prompt) + room for prompt in prompts]
        given = prompts_of(prompts, numbers, length, lengths, encoder)
        rows, _ = prefill(serving, given, **how)
        logits = [np.asarray(rows.logits_BV)]
        for _ in range(calls):
            rows, tokens_BN, _ = decode(serving, rows, NO_TOKENS, num_tokens=TOKENS, **how)
            texts = [old + new for old, new in zip(texts, tokens_BN.tolist(), strict=True)]
            logits.append(np.asarray(rows.logits_BV))
    return texts, np.stack(logits)


def test_layers_that_lie_apart_are_views_of_those_of_a_scan(tmp_path):
    """The stack also has a layer before the repeated ones."""
    layout = {"first": [["attention", "mlp"]], "unit": [["attention", "moe"]], "repeats": 3}
    config = tiny_config({"model": {"parts": {"mlp": {"kind": "mlp"}}, "stack": layout}})
    params = tiny_state(config).params
    model, serving = layers_apart(for_inference(config.model), Serving(params))
    assert (model.stack.first, model.stack.unit) == (config.model.stack.layers, ())
    assert shapes_of(serving.params) == shapes_of(model.specs())
    wi = params["stack"]["unit"]["0"]["moe"]["experts"]["wi"]
    for i in range(3):
        own = serving.params["stack"]["first"][str(i + 1)]["moe"]["experts"]["wi"]
        np.testing.assert_array_equal(own, wi[i])
        at = own.unsafe_buffer_pointer() - wi.unsafe_buffer_pointer()
        assert at == i * own.nbytes, "no copy"
    call = Call(tokens_BL=jnp.array([PROMPTS[0]]), capacity=0.0)
    scanned = quick_jit(for_inference(config.model).run)(params, call)
    apart = quick_jit(model.run)(serving.params, call)
    np.testing.assert_allclose(apart.logits_BLV, scanned.logits_BLV, rtol=1e-5, atol=1e-5)


def shapes_of(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def read_anew(config, params, text, *, state=None, encoder=None):
    """The logits of one pass over one text, [L, V]."""
    run = jax.jit(for_inference(config.model).run)  # one text need not fill a training group
    call = Call(tokens_BL=jnp.asarray([text]), encoder=encoder, capacity=0.0)
    return np.asarray(run(params, call, state=state).logits_BLV[0])


def check(config, params, close=CLOSE, *, state=None):
    encoder = READ if config.model.has_encoder else None
    texts, logits = continued(config, params, state=state, encoder=encoder)
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        own = encoder and EncoderInputs(encoder[0][i : i + 1], None, encoder[2][i : i + 1])
        expected = read_anew(config, params, text, state=state, encoder=own)[len(prompt) - 1 :]
        np.testing.assert_allclose(logits[:, i], expected[::TOKENS], **close)
        chosen = np.take_along_axis(expected[:-1], np.array(text[len(prompt) :])[:, None], -1)
        np.testing.assert_allclose(chosen[:, 0], expected[:-1].max(-1), **close)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
     for name in sorted(CASES)],
)  # fmt: skip
def test_a_cache_gives_what_one_pass_gives(name, tmp_path):
    config, params = moe_jax.from_hf(write_model(tmp_path / "hf", CASES[name]))
    check(config, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"scan_layers": True}, {"compute_dtype": "bfloat16"}], ids=str
)
def test_a_cache_under_scan_and_in_bfloat16(settings):
    config = tiny_config({"model": settings})
    close = {"rtol": 0, "atol": 0.05} if "compute_dtype" in settings else CLOSE
    check(config, tiny_state(config).params, close)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"prefix": 3}, {"prefix": 2, "window": 3}], ids=str)
def test_a_prefix_stands_before_what_is_cached(settings):
    config = tiny_config({"model": {"parts": {"attention": settings}}})
    params = tiny_state(config).params
    for name in ("keys", "values"):
        own = params["stack"]["unit"]["0"]["attention"]["prefix"]
        own[name] = 50 * own[name]
    check(config, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "router",
    [
        {"kind": "hash", "by": "bigram"},
        {"kind": "hash", "by": "position"},
        {"kind": "random"},
        {"kind": "expert_choice", "predictor_loss_weight": 0.1},
    ],
    ids=str,
)
def test_routers_that_look_beyond_the_token(router):
    """The previous token, the position, or a predictor instead of other tokens."""
    moe = {"router": router, "losses": {}, "num_selected_experts": 1}
    config = tiny_config({"model": {"parts": {"moe": moe}, "stack": {"allow_lookahead": True}}})
    check(config, tiny_state(config).params)


@pytest.mark.slow
def test_a_cache_on_a_mesh():
    """Eight devices split tokens, experts and heads in two each."""
    config = tiny_config()
    params = tiny_state(config).params
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    placed = jax.tree.map(
        lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)),
        config.model.specs(), dict(params),
    )  # fmt: skip
    prompts = (*PROMPTS, (8,), (9, 3))
    texts, logits = continued(config, params, prompts)
    on_mesh, there = continued(config, placed, prompts)
    assert texts == on_mesh
    np.testing.assert_allclose(logits, there, **CLOSE)


@pytest.mark.slow
def test_an_encoder_decoder_goes_on_from_its_caches():
    """A tiny Switch: relative positions, and keys and values of the encoder's output."""
    config = from_config_dict(switch_base.get_config("smoke"))
    check(config, init_parameters(jax.random.key(3), config.model.specs()))
