"""Attention with each family's settings equals transformers', with and without left padding."""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import Attention, Temperature
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.relative_positions import RelativePositions
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import Llama3Scaling, LongRope, Yarn
from moe_jax.part import Call, Dims, Own

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Sums of a dozen float32 products, in two libraries.
FLOAT32 = 2e-5
BATCH, LENGTH, WIDTH, PADDING = 2, 11, 24, 3
SHORT = (1.0, 1.5, 2.0, 4.0)


class Family(NamedTuple):
    """One family's attention: module, config, and the equivalent settings here.

    Attributes:
      module: "name:Class" in transformers.models.
      config: its settings, except the sizes.
      ours: settings of `Attention`, except the sizes.
      mask: the function that makes the mask.
      layer: the layer's index.
      left_padding: whether the family is correct under left padding.
    """

    module: str
    config: dict[str, Any]
    ours: dict[str, Any]
    mask: str = "create_causal_mask"
    layer: int = 0
    left_padding: bool = True


def rope(**settings):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, **settings}}


def phi(original_length, left_padding=True):
    """LongRoPE, with short or long factors by row length.

    Transformers uses the short factors in both cases, and decides for a batch by its longest row.
    """
    scaling = LongRope(
        short_factors=SHORT, long_factors=SHORT, original_length=original_length, factor=4.0,
        attention_factor=1.2, long_attention_factor=0.9,
    )  # fmt: skip
    config = rope(
        rope_type="longrope", short_factor=list(SHORT), long_factor=[3.0] * 4, factor=4.0,
        short_mscale=1.2, long_mscale=0.9, original_max_position_embeddings=original_length,
    )  # fmt: skip
    return Family(
        "phimoe:PhimoeAttention",
        config | {"attention_bias": True},
        {"rotary": Rotary(base=100.0, scaling=scaling), "biases": tuple("qkvo")},
        left_padding=left_padding,
    )


FAMILIES = {
    "Mixtral": Family(
        "mixtral:MixtralAttention",
        rope() | {"sliding_window": 4},
        {"rotary": Rotary(base=100.0), "window": 4},
        mask="create_sliding_window_causal_mask",
    ),
    "Qwen3": Family(
        "qwen3_moe:Qwen3MoeAttention",
        rope() | {"rms_norm_eps": 1e-3},
        {"rotary": Rotary(base=100.0), "qk_norm": RMSNorm(1e-3)},
    ),
    "Qwen2": Family(
        "qwen2_moe:Qwen2MoeAttention",
        rope(),
        {"rotary": Rotary(base=100.0), "biases": tuple("qkv")},
    ),
    "OLMoE": Family(
        "olmoe:OlmoeAttention",
        rope() | {"clip_qkv": 0.7, "rms_norm_eps": 1e-3},
        {
            "rotary": Rotary(base=100.0), "qk_norm": RMSNorm(1e-3), "qk_norm_at": "projection",
            "clip_qkv": 0.7,
        },
    ),
    "DBRX": Family(
        "dbrx:DbrxAttention",
        rope() | {"attn_config": {"clip_qkv": 0.7, "kv_n_heads": 1, "rope_theta": 100.0}},
        {"rotary": Rotary(base=100.0), "clip_qkv": 0.7},
    ),
    "Llama 4 with rotary positions": Family(
        "llama4:Llama4TextAttention",
        rope(
            rope_type="llama3", factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0,
            original_max_position_embeddings=16,
        )
        | {"use_qk_norm": True, "rms_norm_eps": 0.1, "attention_chunk_size": 4},
        {
            "rotary": Rotary(
                base=100.0, interleaved=True,
                scaling=Llama3Scaling(4.0, low_turns=0.5, high_turns=2.0, original_length=16),
            ),
            "qk_norm": RMSNorm(0.1, use_scale=False), "qk_norm_at": "rotated", "chunk": 4,
        },
        mask="create_chunked_causal_mask",
    ),
    "Llama 4 without": Family(
        "llama4:Llama4TextAttention",
        rope() | {"use_qk_norm": True, "floor_scale": 4, "attn_scale": 0.3},
        {"rotary": None, "temperature": Temperature(floor=4, scale=0.3)},
        layer=3,
        left_padding=False,  # transformers counts padding here
    ),
    "gpt-oss": Family(
        "gpt_oss:GptOssAttention",
        rope(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0,
            beta_slow=1.0, truncate=False,
        )
        | {"sliding_window": 4, "attention_bias": True},
        {
            "rotary": Rotary(
                base=100.0,
                scaling=Yarn(
                    factor=4.0, original_length=16, fast_turns=8.0, slow_turns=1.0, truncate=False
                ),
            ),
            "window": 4, "sink": True, "biases": tuple("qkvo"),
        },
        mask="create_sliding_window_causal_mask",
    ),
    "Granite": Family(
        "granitemoe:GraniteMoeAttention",
        rope() | {"attention_multiplier": 0.9},
        {"rotary": Rotary(base=100.0), "scale": 0.9},
    ),
    "Phi-3.5, short": phi(original_length=16),
    "Phi-3.5, long": phi(original_length=8, left_padding=False),
}  # fmt: skip


def parameters(module, attention):
    """Draws a module's weights in place, and returns them as our tree."""
    random = np.random.default_rng(0)
    for parameter in module.parameters():
        drawn = random.normal(size=parameter.shape) / 3 + (0.8 if parameter.ndim == 1 else 0)
        parameter.data = torch.tensor(drawn, dtype=torch.float32)
    named = {name: value.detach().numpy() for name, value in module.named_parameters()}
    heads, kv_heads = (n * attention.head_dim for n in (attention.num_heads, attention.kv_heads))
    if "Wqkv.weight" in named:
        rows = np.split(named.pop("Wqkv.weight"), [heads, heads + kv_heads])
        named |= {f"{name}_proj.weight": rows[i] for i, name in enumerate("qkv")}
        named["o_proj.weight"] = named.pop("out_proj.weight")
    places: dict[str, Any] = {"sinks": ("sink",), "relative_attention_bias.weight": ()}
    for name in "qkvo":
        places |= {f"{name}_proj.weight": (f"w{name}",), f"{name}_proj.bias": (f"b{name}",)}
        places |= {
            f"{name}.weight": (f"w{name}",),
            f"{name}_norm.weight": (f"{name}_norm", "scale"),
        }
    params: dict[str, Any] = {}
    for name, value in named.items():
        if not (place := places.pop(name)):
            continue
        value = value.T if place[0].startswith("w") else value
        if len(place) == 2:
            params[place[0]] = {place[1]: value}
        else:
            params[place[0]] = value
    specs = attention.specs(Dims(WIDTH))
    norms = {name: {} for name in ("q_norm", "k_norm") if specs.get(name) == {}}
    shapes = jax.tree.map(lambda spec: spec.shape, specs)
    assert jax.tree.map(lambda value: value.shape, params | norms) == shapes
    return params | norms


def module_of(family, config):
    package, _, name = family.module.partition(":")
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    module = getattr(modeling, name)(config, layer_idx=family.layer)
    (rotary,) = {
        getattr(modeling, other)
        for other in dir(modeling)
        if other.endswith("RotaryEmbedding") and "Vision" not in other
    }
    return module.eval(), rotary(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_decoders(name):
    family = FAMILIES[name]
    package = family.module.partition(":")[0]
    from transformers import masking_utils
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

    config_of = {
        "mixtral": "MixtralConfig", "qwen3_moe": "Qwen3MoeConfig", "qwen2_moe": "Qwen2MoeConfig",
        "olmoe": "OlmoeConfig", "dbrx": "DbrxConfig", "gpt_oss": "GptOssConfig",
        "granitemoe": "GraniteMoeConfig", "phimoe": "PhimoeConfig",
    }.get(package)  # fmt: skip
    config_class = getattr(transformers, config_of) if config_of else Llama4TextConfig
    # One key-value head for three queries, except DBRX and Phi: a head dim that divides the width.
    sizes = {
        "hidden_size": WIDTH, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8,
        "num_hidden_layers": 4, "max_position_embeddings": 64, "vocab_size": 16,
    }  # fmt: skip
    if package == "dbrx":
        sizes = {"d_model": WIDTH, "n_heads": 3, "n_layers": 4, "max_seq_len": 64}
    config = config_class(**sizes, **family.config)
    config._attn_implementation = "eager"
    attention = Attention(num_heads=3, num_kv_heads=1, head_dim=8, **family.ours)
    module, rotary = module_of(family, config)
    params = parameters(module, attention)
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    valid = np.ones((BATCH, LENGTH), np.int32)
    if family.left_padding:
        valid[1, :PADDING] = 0
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)
    inputs = torch.tensor(x)
    mask = getattr(masking_utils, family.mask)(
        config, inputs_embeds=inputs, attention_mask=torch.tensor(valid), cache=None,
        position_ids=torch.tensor(positions),
    )  # fmt: skip
    with torch.no_grad():
        where = rotary(inputs, torch.tensor(positions).long())
        expected = module(inputs, position_embeddings=where, attention_mask=mask)[0].numpy()
    call = Call(positions_BL=jnp.asarray(positions), segments_BL=jnp.asarray(valid))
    y, _, _ = attention.apply(params, jnp.asarray(x), call, Own())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y[valid > 0], expected[valid > 0], atol=FLOAT32 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_t5(causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        d_model=WIDTH, d_kv=8, num_heads=3, relative_attention_num_buckets=8,
        relative_attention_max_distance=10, is_decoder=causal,
    )  # fmt: skip
    config._attn_implementation = "eager"
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    attention = Attention(num_heads=3, head_dim=8, rotary=None, scale=1.0, position_bias="position")
    params = parameters(module, attention)
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    masked = np.triu(np.full((LENGTH, LENGTH), -1e9, np.float32), 1 if causal else LENGTH)
    with torch.no_grad():
        expected = module(torch.tensor(x), mask=torch.tensor(masked)[None, None])[0].numpy()
    call = Call(causal=causal).with_defaults(x)
    position = RelativePositions(num_heads=3, num_buckets=8, max_distance=10)
    table = {"table": module.relative_attention_bias.weight.detach().numpy()}
    shared = {"position": position.apply(table, jnp.asarray(x), call, Own())[0]}
    call = Call(causal=causal, shared=shared).with_defaults(x)
    y, _, _ = attention.apply(params, jnp.asarray(x), call, Own())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y, expected, atol=FLOAT32 * scale)
