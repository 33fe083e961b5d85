"""Models written as GGUF files: what llama.cpp computes from them, and refusals."""

import dataclasses

import numpy as np
import pytest

import moe_jax
from benchmarks.llama_cpp import LlamaCpp
from moe_jax.interchange import gguf_write
from moe_jax.interchange.gguf_files import GGUFFile, from_gguf
from moe_jax.interchange.gguf_names import OfHeads, Paired
from moe_jax.interchange.gguf_write import to_gguf
from moe_jax.interchange.rules import AS_IS
from tests.hf_families import CASES, VOCAB, write_model

gguf = pytest.importorskip("gguf")
WORDS = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.merges": ["\u4e00 \u4e00"],
    "tokenizer.ggml.tokens": [chr(0x100 + i) for i in range(VOCAB)],
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
# Cases of `hf_families`, each with the settings that llama.cpp would compute differently.
SILU, EPSILON, NO_BIAS = {"hidden_act": "silu"}, {"rms_norm_eps": 1e-6}, {"attention_bias": False}
FAMILIES = {
    "llama_biases": SILU,  # biases of queries and keys too, Llama 3's frequencies, a tied head
    "mixtral": {},
    "gpt_oss": {"swiglu_limit": 7.0},
    "deepseek_v3": EPSILON,  # groups, selection biases
}
MORE_FAMILIES = {
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {"clip_qkv": None, "num_key_value_heads": 4},
    "granitemoeshared": {},
    "llama": {},
    "llama_linear": {},
    "llama_yarn": {},
    "mistral_full": {},
    "qwen2": {},
    "qwen3": NO_BIAS,
    "granitemoe": {},
    "granitemoe_biases": {},
    "granitemoeshared_none": {},
    "deepseek_v2_lite": {**EPSILON, "num_hidden_layers": 27},
    "deepseek_v3_yarn": EPSILON,
    "deepseek_v3_multi_token": EPSILON,  # its modules are not written
}


def changed(name, settings):
    case = CASES[name]
    return dataclasses.replace(case, settings={**case.settings, **settings})


def read(case, folder):
    return moe_jax.from_hf(write_model(folder / "hf", case), dtype="float32")


def logp(config, params, ids):
    """float64 log-probabilities [L, V] of the token after each position."""
    [logits_LV] = moe_jax.build(config).apply({"params": params}, np.array([ids], np.int32))
    logits_LV = np.asarray(logits_LV, np.float64)
    return logits_LV - np.logaddexp.reduce(logits_LV, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *FAMILIES.items(),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_FAMILIES.items()),
    ],
)
def test_llama_cpp_computes_the_same(name, settings, tmp_path):
    """Compares greedy tokens, and log-probabilities of the whole vocabulary before each of them.

    They span 4 to 17 nats and agree to 2e-5 in models of 2 and 3 layers: float32's 6e-8 times the
    size of logits, times some tens of reordered sums. Errors grow with depth: 27 layers reach 3e-4.
    A float16 cache, or one pair of features rotated the wrong way, is off by 1e-2 or more.
    """
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
    case = changed(name, settings)
    config, params = read(case, tmp_path)
    to_gguf(config, params, tmp_path / "model.gguf", WORDS, context_length=64)
    prompt = case.tokens()[0].tolist()
    with LlamaCpp(tmp_path / "model.gguf", VOCAB) as theirs:
        answer = theirs.answer(prompt, 8)
    ours_NV = logp(config, params, prompt + answer.ids)[len(prompt) - 1 : -1]
    assert ours_NV.argmax(-1).tolist() == answer.ids
    layers = config.model.stack.num_layers
    np.testing.assert_allclose(answer.logp_NV, ours_NV, rtol=0, atol=2e-5 if layers < 5 else 3e-4)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mistral", {}, "sliding_window=6"),
        ("qwen3", {}, "attention_bias=True"),
        ("qwen3_moe_tied", {}, "norm_topk_prob=False"),
        ("olmoe", {}, "clip_qkv=0.7"),
        ("qwen2_moe", {"head_dim": 10}, "as wide as the model"),
        ("deepseek_v2", {**EPSILON, **NO_BIAS}, "group_limited_greedy"),
        ("deepseek_v2_lite", EPSILON, "num_hidden_layers=2"),
        ("deepseek_v3", {}, "rms_norm_eps=0.001"),
        ("gpt_oss", {}, "swiglu_limit=0.5"),
        ("llama_dynamic", {}, "rope_type.*dynamic"),
        ("dbrx", {}, "no architecture of llama.cpp"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_named(name, settings, said, tmp_path):
    config, params = read(changed(name, settings), tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        to_gguf(config, params, tmp_path / "model.gguf", WORDS)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return read(CASES["llama"], folder)


def test_a_dense_model_comes_back_bit_for_bit(llama, tmp_path):
    config, params = llama
    to_gguf(config, params, tmp_path / "model.gguf", WORDS)
    again, same = from_gguf(tmp_path / "model.gguf")
    assert again.model == config.model
    moe_jax.to_hf(config, params, tmp_path / "a")
    moe_jax.to_hf(again, same, tmp_path / "b")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_layouts_by_hand():
    rows = np.arange(8)  # two heads of four: halves 0, 1 and 2, 3 become pairs 0, 2 and 1, 3
    assert Paired(2, AS_IS).write(rows).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    columns = np.arange(6)[None]  # two heads, each with two columns of keys and one of values
    assert OfHeads(2, 0, 2, latent_first=True).write(columns).tolist() == [[[0, 1]], [[3, 4]]]
    assert OfHeads(2, 2, 3, latent_first=False).write(columns).tolist() == [[[2]], [[5]]]
    assert OfHeads(2, 0, 2, latent_first=True).shape((1, 6)) == (2, 1, 2)
    assert OfHeads(2, 2, 3, latent_first=False).shape((1, 6)) == (2, 1, 1)


@pytest.mark.parametrize(
    ("format", "matrix", "head", "odd"),
    [
        ("F32", "F32", "F32", "F32"),
        ("F16", "F16", "F16", "F16"),
        ("Q8_0", "Q8_0", "Q8_0", "F16"),
        ("Q4_0", "Q4_0", "Q8_0", "F16"),
    ],
)
def test_formats(format, matrix, head, odd, tmp_path):
    """Rows of 32 form blocks, rows of 12 do not; routers and norms stay exact."""
    config, params = read(CASES["mixtral"], tmp_path)
    to_gguf(config, params, tmp_path / "model.gguf", WORDS, format=format)
    tensors = gguf.GGUFReader(str(tmp_path / "model.gguf")).tensors
    types = {one.name: one.tensor_type.name for one in tensors}
    assert types["blk.0.ffn_up_exps.weight"] == matrix
    assert types["output.weight"] == types["token_embd.weight"] == head
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.attn_norm.weight"] == "F32"
    wide = CASES["mixtral"].settings["intermediate_size"]
    assert wide % 32 and types["blk.0.ffn_down_exps.weight"] == odd
    found = GGUFFile(tmp_path / "model.gguf").read("blk.1.ffn_up_exps.weight")
    wanted_EHM = np.swapaxes(params["stack"]["unit"]["0"]["moe"]["experts"]["wi"][1], 1, 2)
    # Half a step relative to a block's largest number; 4 bits span -8 to 7, so a whole step at 8.
    steps = {"F32": 0, "F16": 2**-11, "Q8_0": 2**-8, "Q4_0": 2**-3}
    largest = np.abs(wanted_EHM).max()
    assert np.abs(found - wanted_EHM).max() <= steps[format] * largest


def test_a_file_is_whole_or_absent(llama, tmp_path, monkeypatch):
    config, params = llama
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        to_gguf(config, params, path, WORDS)
    assert path.read_text() == "mine"
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(gguf_write.np, "ascontiguousarray", lambda *_: 1 / 0)
        to_gguf(config, params, path, WORDS)
    assert not list(tmp_path.iterdir())
