"""Llama 4, the text model: chunks with rotary positions, and whole contexts without.

Of a multimodal checkpoint only the text model is read: `text_config`, and the tensors under
`language_model.`.

Sources: `modeling_llama4.py` and `configuration_llama4.py` of transformers; Meta 2025.
"""

import dataclasses
from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.common import (
    DROPLESS,
    LAYER,
    LINEAR,
    OUTSIDE,
    attention_rules,
    attention_settings,
    gated_activation,
    gated_name,
    gated_rules,
    norm_rules,
    read_attention,
    sizes,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rules import Rule
from moe_jax.layers.attention import Attention, Temperature
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.token_choice import TokenChoice

FULL, CHUNKED = "full_attention", "chunked_attention"
# The attention part of a layer, by whether it has rotary positions and chunks.
KINDS = {
    (True, True): "chunked",
    (True, False): "rotary",
    (False, False): "nope",
    (False, True): "chunked_nope",
}
NETWORK = f"{LAYER}feed_forward."
OF_TEXT = (
    *OUTSIDE,
    *norm_rules("mlp", "moe"),
    *(rule for one in KINDS.values() for rule in norm_rules(attention=one)),
    *(rule for one in KINDS.values() for rule in attention_rules(one)),
    *gated_rules(NETWORK, "mlp"),
    *gated_rules(f"{NETWORK}shared_expert.", "moe/shared"),
    Rule(f"{NETWORK}router.weight", "moe/router/weight", LINEAR),
    # Stored for `x @ w`, with the gate's columns before up's.
    Rule(f"{NETWORK}experts.gate_up_proj", ("moe/experts/wg", "moe/experts/wi"), axis=-1),
    Rule(f"{NETWORK}experts.down_proj", "moe/experts/wo"),
)
RULES = (
    *OF_TEXT,
    *(dataclasses.replace(rule, name=f"language_model.{rule.name}") for rule in OF_TEXT),
)


def model(config: Reader) -> LanguageModel:
    """The model of a config.json, or of the `text_config` in it."""
    if config.get("text_config"):
        return model(config.inner("text_config"))
    epsilon, activation = config.get("rms_norm_eps", 1e-5), gated_activation(config)
    expert_dim = config.get("intermediate_size", 8192)
    mlp = Mlp(dim=config.get("intermediate_size_mlp", 16_384), activation=activation)
    moe = MoE(
        num_experts=config.get("num_local_experts", 16),
        num_selected_experts=config.get("num_experts_per_tok", 1),
        expert_dim=expert_dim,
        activation=activation,
        shared_expert_dim=expert_dim,
        gate_on_input=True,
        router=TokenChoice(score=Sigmoid()),
        losses=(),
        capacity=DROPLESS,
    )
    stack = StackLayout.of(layers(config))
    parts = {**attention_parts(config, epsilon), "mlp": mlp, "moe": moe}
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={name: part for name, part in parts.items() if name in stack.names},
        stack=stack,
        norm=RMSNorm(epsilon),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def attention_parts(config: Reader, epsilon: float) -> dict[str, Attention]:
    """Every kind of attention; only kinds without positions have a temperature."""
    rotary = read_attention(
        config,
        kv_heads=8,
        head_dim=128,
        theta=500_000.0,
        interleaved=True,
        biases="qkvo" if config.get("attention_bias", False) else "",
    )
    temperature = Temperature(config.get("floor_scale", 8192), config.get("attn_scale", 0.1))
    tuned = config.get("attn_temperature_tuning", True)
    nope = dataclasses.replace(rotary, rotary=None, temperature=temperature if tuned else None)
    if config.get("use_qk_norm", True):
        norm = RMSNorm(epsilon, use_scale=False)
        rotary = dataclasses.replace(rotary, qk_norm=norm, qk_norm_at="rotated")
    chunk = config.or_absent("attention_chunk_size", 8192)
    return {
        name: dataclasses.replace(rotary if turns else nope, chunk=chunk if chunked else None)
        for (turns, chunked), name in KINDS.items()
    }


def layers(config: Reader) -> list[tuple[str, str]]:
    """The names of each layer's parts.

    Raises:
      ValueError: a layer type is unknown, or chunks have no size.
    """
    count = config["num_hidden_layers"]
    every = config.get("no_rope_layer_interval", 4)
    # Despite the name, 1 means that the layer has rotary positions.
    turns = config.get("no_rope_layers") or [(layer + 1) % every for layer in range(count)]
    chunk = config.or_absent("attention_chunk_size", 8192)
    usual = [CHUNKED if one and chunk is not None else FULL for one in turns]
    types = config.get("layer_types", usual)
    require(
        set(types) <= ({FULL} if chunk is None else {FULL, CHUNKED}),
        f"layer_types must be {FULL!r}, or {CHUNKED!r} with an attention_chunk_size",
        f"layer_types={sorted(set(types))}, attention_chunk_size={chunk}",
        "Correct one of them",
    )
    step = config.get("interleave_moe_layer_step", 1)
    sparse = config.get("moe_layers", range(step - 1, count, step))
    return [
        (
            KINDS[bool(turns[layer]), types[layer] == CHUNKED],
            "moe" if layer in sparse else "mlp",
        )
        for layer in range(count)
    ]


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    names, ffns = zip(*model.stack.layers, strict=True)
    parts: Any = model.part
    attention = [parts[name] for name in names]
    turning = [one for one in attention if one.rotary is not None]
    tuned = [one.temperature for one in attention if one.rotary is None]
    own: dict[str, Any] = {}
    if turning:
        own["use_qk_norm"] = turning[0].qk_norm is not None
    if tuned:
        own["attn_temperature_tuning"] = tuned[0] is not None
    if tuned and tuned[0] is not None:
        own |= {"floor_scale": tuned[0].floor, "attn_scale": tuned[0].scale}
    if "mlp" in parts:
        own |= {"intermediate_size_mlp": parts["mlp"].dim}
        own |= {"hidden_act": gated_name(parts["mlp"].activation)}
    if "moe" in parts:
        moe = parts["moe"]
        own |= {"intermediate_size": moe.expert_dim, "num_local_experts": moe.num_experts}
        own |= {"num_experts_per_tok": moe.num_selected_experts}
        own |= {"hidden_act": gated_name(moe.activation)}
    return sizes(
        model,
        **attention_settings((turning or attention)[0]),
        **own,
        attention_bias="o" in attention[0].biases,
        attention_chunk_size=next((one.chunk for one in attention if one.chunk), None),
        layer_types=[FULL if one.chunk is None else CHUNKED for one in attention],
        no_rope_layers=[int(one.rotary is not None) for one in attention],
        moe_layers=[layer for layer, name in enumerate(ffns) if name == "moe"],
    )


LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    model,
    settings,
    lambda model: RULES,
    ignored=(r"vision_model\..*", r"multi_modal_projector\..*"),
)
