"""gpt-oss: sinks, windows in every second layer, YaRN, and clamped experts with biases.

The published files store the experts in MXFP4; see `mxfp4`, which reads them as bfloat16.

Sources: OpenAI 2025, arXiv:2508.10925; `modeling_gpt_oss.py` of transformers.
"""

from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.common import (
    DROPLESS,
    LAYER,
    LINEAR,
    OUTSIDE,
    attention_rules,
    attention_settings,
    by_window,
    first_attention,
    layer_types,
    norm_rules,
    read_attention,
    sizes,
    token_choice,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.mxfp4 import Mxfp4Files
from moe_jax.interchange.rules import Rule
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import ClampedSwiGLU
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Linear, SoftmaxOverSelected

# Default "rope_parameters".
YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip
EXPERTS = f"{LAYER}mlp.experts."
RULES = (
    *OUTSIDE,
    *norm_rules("moe"),
    *norm_rules(attention="sliding"),
    *attention_rules(),
    *attention_rules("sliding"),
    Rule(f"{LAYER}self_attn.sinks", "attention/sink"),
    Rule(f"{LAYER}self_attn.sinks", "sliding/sink"),
    Rule(f"{LAYER}mlp.router.weight", "moe/router/weight", LINEAR),
    Rule(f"{LAYER}mlp.router.bias", "moe/router/bias"),
    # Columns of gate and up alternate.
    Rule(f"{EXPERTS}gate_up_proj", ("moe/experts/wg", "moe/experts/wi"), axis=-1, interleaved=True),
    Rule(
        f"{EXPERTS}gate_up_proj_bias", ("moe/experts/bg", "moe/experts/bi"), axis=-1,
        interleaved=True,
    ),
    Rule(f"{EXPERTS}down_proj", "moe/experts/wo"),
    Rule(f"{EXPERTS}down_proj_bias", "moe/experts/bo"),
)  # fmt: skip


def model(config: Reader) -> LanguageModel:
    """The model of a config.json."""
    if config.get("rope_parameters") is None and not config.get("rope_scaling"):
        config = config.with_settings(rope_parameters=YARN)
    quantization = config.get("quantization_config", {})
    require(
        quantization.get("quant_method", "mxfp4") == "mxfp4",
        "quantised gpt-oss can be read only from MXFP4, as published",
        f"quantization_config={quantization}",
        "Dequantise the model first",
    )
    layers = config["num_hidden_layers"]
    kinds = ("sliding_attention", "full_attention")
    # transformers computes the loss with the published coefficient, 0.9, only on request.
    balanced = config.get("output_router_logits", False)
    coefficient = config.get("router_aux_loss_coef", 0.001) if balanced else 0.0
    types = config.get("layer_types") or [kinds[layer % 2] for layer in range(layers)]
    attention = read_attention(
        config,
        kv_heads=8,
        head_dim=64,
        theta=150_000.0,
        biases="qkvo" if config.get("attention_bias", True) else "",
        sink=True,
    )
    parts, names = by_window(attention, config.or_absent("sliding_window", 128), types)
    moe = MoE(
        num_experts=config["num_local_experts"],
        num_selected_experts=config.get("num_experts_per_tok", 4),
        expert_dim=config["intermediate_size"],
        activation=ClampedSwiGLU(
            config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
        ),
        use_bias=True,
        router=token_choice(
            config, 4, score=SoftmaxOverSelected(), projection=Linear(use_bias=True)
        ),
        losses=(HuggingFaceLoadBalance(weight=coefficient),),
        capacity=DROPLESS,
    )
    config.require("hidden_act", "silu")
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={**parts, "moe": moe},
        stack=StackLayout.of([(name, "moe") for name in names]),
        norm=RMSNorm(config.get("rms_norm_eps", 1e-5)),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    attention, moe = first_attention(model), model.part["moe"]
    assert isinstance(moe, MoE) and isinstance(moe.activation, ClampedSwiGLU), moe
    types, window = layer_types(model)
    return sizes(
        model,
        **attention_settings(attention),
        attention_bias="o" in attention.biases,
        layer_types=types,
        **({} if window is None else {"sliding_window": window}),  # transformers refuses null
        intermediate_size=moe.expert_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
        swiglu_limit=moe.activation.limit,
        swiglu_alpha=moe.activation.alpha,
    )


GPT_OSS = Family(
    "gpt_oss", "GptOssForCausalLM", model, settings, lambda model: RULES, opened=Mxfp4Files
)
