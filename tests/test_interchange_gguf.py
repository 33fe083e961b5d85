"""GGUF files: the same model as in the Hugging Face layout, and its tokenizer."""

import numpy as np
import pytest

import moe_jax
from moe_jax.interchange.gguf_files import GGUFFile, from_gguf, tokenizer_json
from moe_jax.interchange.tensor_files import TensorFiles
from tests.hf_families import CASES, write_model

gguf = pytest.importorskip("gguf")

CASE = CASES["llama"]
HEADS, KV_HEADS = (CASE.settings[f"num_{name}_heads"] for name in ("attention", "key_value"))
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name.replace("model.layers.", "blk.")


def in_pairs(weight, heads):
    """Rows as llama.cpp stores queries and keys: per head, one row of each half in turn."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(path, tensors, architecture="llama", expert_count=0, **others):
    settings = CASE.settings
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_context_length(64)
    writer.add_expert_count(expert_count)
    writer.add_key_length(settings["head_dim"])
    writer.add_rope_freq_base(settings["rope_theta"])
    for name, value in others.items():
        writer.add_string(name.replace("__", "."), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<end>", "a", "b", "1", "ab", "\u0120"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    # The second applies to nothing, like the one that an export of the byte tokenizer has.
    writer.add_token_merges(["a b", "\u4e00 \u4e00"])
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model in both layouts, and its GGUF tensors."""
    folder = tmp_path_factory.mktemp("gguf")
    files = TensorFiles(write_model(folder / "hf", CASE))
    tensors = {}
    for name in files.tensors:
        value = files.read(name)
        heads = {"q": HEADS, "k": KV_HEADS}.get(name.partition("self_attn.")[2][:1])
        if heads and value.ndim == 2:
            value = in_pairs(value, heads)
        tensors[gguf_name(name)] = value
    return folder / "hf", write_gguf(folder / "model.gguf", tensors), tensors


def test_a_gguf_file_is_the_same_model(models):
    hf, path, _ = models
    (config, params), (wanted, same) = from_gguf(path), moe_jax.from_hf(hf)
    assert config.model == wanted.model
    tokens = CASE.tokens()
    ours, theirs = (moe_jax.build(wanted).apply({"params": p}, tokens) for p in (params, same))
    np.testing.assert_array_equal(ours, theirs)


def test_in_pairs_by_hand():
    rows = np.arange(8)[:, None]  # two heads of four
    assert in_pairs(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_tokenizer_splits_digits_and_knows_control_tokens(models):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json(GGUFFile(models[1])))
    assert tokenizer.encode("ab11<end>").ids == [4, 3, 3, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "gemma"}, "gemma"),
        ({"llama__rope__scaling__type": "yarn"}, "rotary"),
        (
            {"expert_count": 8},
            r"only dense models can be read from GGUF: .*model\.gguf has experts",
        ),
    ],
)
def test_what_cannot_be_read_is_named(models, tmp_path, change, said):
    path = write_gguf(tmp_path / "model.gguf", models[2], **change)
    with pytest.raises(ValueError, match=said):
        from_gguf(path)


def test_a_missing_tensor_and_a_cut_file_are_named(models, tmp_path):
    tensors = {name: value for name, value in models[2].items() if "blk.1.ffn_up" not in name}
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight.*missing"):
        from_gguf(write_gguf(tmp_path / "model.gguf", tensors))
    (tmp_path / "cut.gguf").write_bytes(models[1].read_bytes()[:600])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        from_gguf(tmp_path / "cut.gguf")
