"""Grok-1 against its formulas in NumPy, because transformers lacks it.

Source of the formulas: `model.py` and `run.py` of xai-org/grok-1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.interchange.tensor_files import TensorFiles
from tests.hf_families import VOCAB, Case, write_model

SETTINGS = {
    "model_type": "grok-1", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "num_experts": 4,
    "num_experts_per_tok": 2, "attn_output_multiplier": 1.7, "max_attn_value": 3.0,
    "embedding_multiplier_scale": 5.7, "output_multiplier_scale": 0.6, "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
}  # fmt: skip
CASE = Case(SETTINGS)
HEADS, KV_HEADS, HEAD_DIM, CAP = 4, 2, 8, 3.0


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Products in full float32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The directory, config and parameters."""
    path = write_model(tmp_path_factory.mktemp("grok") / "hf", CASE)
    return (path, *moe_jax.from_hf(path))


def normed(x, scale):
    """RMSNorm."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-3) * scale


def rotated(x_LND):
    """Pairs (j, j + D / 2) turned by position * 10,000 ** (-2 j / D)."""
    first, second = np.split(x_LND, 2, axis=-1)
    angle = np.arange(len(x_LND))[:, None, None] * 1e4 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    turned = first * np.cos(angle) - second * np.sin(angle)
    return np.concatenate([turned, second * np.cos(angle) + first * np.sin(angle)], axis=-1)


def softmax(x):
    """Softmax over the last dim."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attended(w, x_LM):
    """Attention with capped scores and several query heads per key head."""
    length = len(x_LM)
    q, k, v = (
        (x_LM @ w[f"attn.{one}_proj.weight"].T).reshape(length, -1, HEAD_DIM) for one in "qkv"
    )
    q, k = rotated(q), rotated(k)
    heads = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = CAP * np.tanh(q[:, head] @ k[:, shared].T * 1.7 / CAP)
        scores[np.triu_indices(length, 1)] = -np.inf
        heads.append(softmax(scores) @ v[:, shared])
    return np.concatenate(heads, axis=-1) @ w["attn.o_proj.weight"].T


def mixed(w, x_LM):
    """Output of each token's two best experts, weighted by probability, and their indices."""
    probabilities = softmax(x_LM @ w["moe_block.gate.weight"].T)
    chosen = np.argsort(-probabilities, axis=-1)[:, :2]
    out = np.zeros_like(x_LM)
    for token, experts in enumerate(chosen):
        for expert in experts:
            gate, up, down = (
                w[f"moe_block.experts.{expert}.{name}.weight"]
                for name in ("linear", "linear_v", "linear_1")
            )
            z = gate @ x_LM[token]
            gelu = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
            out[token] += probabilities[token, expert] * (down @ (gelu * (up @ x_LM[token])))
    return out, np.sort(chosen, axis=-1)


def by_formula(path, tokens_L):
    """Logits [L, V] and experts [X, L, K] in float64."""
    files = TensorFiles(path)
    all_of = {name: files.read(name).astype(np.float64) for name in files.tensors}
    h, experts = all_of["model.embed_tokens.weight"][tokens_L] * 5.7, []
    for layer in range(2):
        start = f"model.layers.{layer}."
        w = {name.removeprefix(start): x for name, x in all_of.items() if name.startswith(start)}
        out = attended(w, normed(h, w["pre_attn_norm.scale"]))
        h = h + normed(out, w["post_attn_norm.scale"])
        out, chosen = mixed(w, normed(h, w["pre_moe_norm.scale"]))
        h = h + normed(out, w["post_moe_norm.scale"])
        experts.append(chosen)
    h = normed(h, all_of["model.norm.scale"])
    return h @ all_of["model.embed_tokens.weight"].T * 0.6, np.stack(experts)


def test_logits_and_experts_are_those_of_the_formulas(read):
    path, config, params = read
    tokens = CASE.tokens()
    apply = jax.jit(lambda p, t: moe_jax.build(config).apply({"params": p}, t, record=True))
    logits, recorded = apply(params, tokens)
    for row in range(len(tokens)):
        wanted, experts = by_formula(path, tokens[row])
        np.testing.assert_allclose(logits[row], wanted, rtol=2e-4, atol=2e-4)
        found = np.sort(np.asarray(recorded.choices["moe"].expert_index)[:, row], axis=-1)
        np.testing.assert_array_equal(found, experts)


def test_padding_changes_nothing(read):
    _, config, params = read
    row = CASE.tokens()[0]
    tokens = np.stack([np.pad(row, side) for side in ((5, 0), (0, 5))])
    mask = np.stack([np.pad(np.ones_like(row), side) for side in ((5, 0), (0, 5))])
    apply = jax.jit(lambda p, t, m: moe_jax.build(config).apply({"params": p}, t, mask_BL=m))
    padded = np.asarray(apply(params, tokens, jnp.asarray(mask)))
    np.testing.assert_allclose(padded[0, 5:], padded[1, :-5], rtol=2e-5, atol=2e-5)
    wanted = by_formula(read[0], row)[0]
    np.testing.assert_allclose(padded[0, 5:], wanted, rtol=2e-4, atol=2e-4)


def test_an_unchanged_model_is_written_as_it_was_read(read, tmp_path):
    path, config, params = read
    moe_jax.to_hf(config, params, tmp_path / "hf")
    old, new = TensorFiles(path), TensorFiles(tmp_path / "hf")
    assert set(old.tensors) == set(new.tensors)
    assert all(old.read(name).tobytes() == new.read(name).tobytes() for name in old.tensors)
    assert moe_jax.from_hf(tmp_path / "hf")[0].model == config.model
