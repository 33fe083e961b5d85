"""Jamba: Mamba, with attention in every eighth layer and experts in every second; no positions.

Sources: Lieber et al. 2024, arXiv:2403.19887; `modeling_jamba.py` of transformers.
"""

import dataclasses
from typing import Any

from moe_jax.interchange.common import (
    DROPLESS,
    LAYER,
    LINEAR,
    attention_rules,
    attention_settings,
    fused_expert_rules,
    gated_rules,
    read_attention,
    sizes,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rules import Inserted, Rule
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.mamba import Mamba
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

MAMBA = f"{LAYER}mamba."
NETWORK = f"{LAYER}feed_forward."
RULES = (
    Rule("model.embed_tokens.weight", "embedding"),
    Rule("model.final_layernorm.weight", "final_norm/scale"),
    Rule("lm_head.weight", "head", LINEAR),
    Rule(f"{LAYER}input_layernorm.weight", "attention_norm/scale"),
    Rule(f"{LAYER}input_layernorm.weight", "mamba_norm/scale"),
    Rule(f"{LAYER}pre_ff_layernorm.weight", "mlp_norm/scale"),
    Rule(f"{LAYER}pre_ff_layernorm.weight", "moe_norm/scale"),
    *attention_rules(),
    Rule(f"{MAMBA}in_proj.weight", ("mamba/wx", "mamba/wz"), LINEAR),
    Rule(f"{MAMBA}in_proj.bias", ("mamba/bx", "mamba/bz")),
    Rule(f"{MAMBA}conv1d.weight", "mamba/conv", Inserted(1, LINEAR)),
    Rule(f"{MAMBA}conv1d.bias", "mamba/conv_bias"),
    Rule(f"{MAMBA}x_proj.weight", "mamba/x_proj", LINEAR),
    Rule(f"{MAMBA}dt_proj.weight", "mamba/dt_proj", LINEAR),
    Rule(f"{MAMBA}dt_proj.bias", "mamba/dt_bias"),
    Rule(f"{MAMBA}A_log", "mamba/a_log"),
    Rule(f"{MAMBA}D", "mamba/d"),
    Rule(f"{MAMBA}out_proj.weight", "mamba/wo", LINEAR),
    Rule(f"{MAMBA}out_proj.bias", "mamba/bo"),
    *(Rule(f"{MAMBA}{one}_layernorm.weight", f"mamba/{one}_norm/scale") for one in ("dt", *"bc")),
    *gated_rules(NETWORK, "mlp"),
    Rule(f"{NETWORK}router.weight", "moe/router/weight", LINEAR),
    *gated_rules(f"{NETWORK}experts.{{expert}}.", "moe/experts"),
    *fused_expert_rules(NETWORK),
)


def model(config: Reader) -> LanguageModel:
    """The model of a config.json."""
    config.require("hidden_act", "silu")  # of the networks and of Mamba's convolution
    epsilon, dim = config.get("rms_norm_eps", 1e-6), config["intermediate_size"]
    num_experts = config.get("num_experts", 16)
    rank = config.get("mamba_dt_rank", "auto")
    stack = StackLayout.of(layers(config, num_experts))
    parts: dict[str, Any] = {
        "attention": dataclasses.replace(read_attention(config, kv_heads=8), rotary=None),
        "mamba": Mamba(
            expand=config.get("mamba_expand", 2),
            state_dim=config.get("mamba_d_state", 16),
            conv_kernel=config.get("mamba_d_conv", 4),
            dt_rank=0 if rank == "auto" else rank,
            conv_bias=config.get("mamba_conv_bias", True),
            use_bias=config.get("mamba_proj_bias", False),
            inner_norms=True,
            norm_epsilon=epsilon,
        ),
        "mlp": Mlp(dim=dim, activation=SwiGLU()),
    }
    if num_experts > 1:
        parts["moe"] = MoE(
            num_experts=num_experts,
            num_selected_experts=config.get("num_experts_per_tok", 2),
            expert_dim=dim,
            activation=SwiGLU(),
            router=TokenChoice(),
            losses=(HuggingFaceLoadBalance(weight=config.get("router_aux_loss_coef", 0.001)),),
            capacity=DROPLESS,
        )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={name: part for name, part in parts.items() if name in stack.names},
        stack=stack,
        norm=RMSNorm(epsilon),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def layers(config: Reader, num_experts: int) -> list[tuple[str, str]]:
    """The names of each layer's parts."""
    attention = config.get("attn_layer_period", 8), config.get("attn_layer_offset", 4)
    sparse = config.get("expert_layer_period", 2), config.get("expert_layer_offset", 1)

    def is_at(layer: int, period: int, offset: int) -> bool:
        return layer % period == offset

    return [
        (
            "attention" if is_at(layer, *attention) else "mamba",
            "moe" if num_experts > 1 and is_at(layer, *sparse) else "mlp",
        )
        for layer in range(config["num_hidden_layers"])
    ]


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    mixers, ffns = zip(*model.stack.layers, strict=True)
    parts: Any = model.part
    own: dict[str, Any] = {
        **every("attn_layer", "attention", mixers),
        **every("expert_layer", "moe", ffns),
        # Defaults for a model without such layers.
        "num_experts": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    if "attention" in parts:
        own |= attention_settings(parts["attention"])
    if "mlp" in parts:
        own |= {"intermediate_size": parts["mlp"].dim}
    if "moe" in parts:
        moe = parts["moe"]
        own |= {"intermediate_size": moe.expert_dim, "num_experts": moe.num_experts}
        own |= {"num_experts_per_tok": moe.num_selected_experts}
    if "mamba" in parts:
        own |= mamba_settings(parts["mamba"])
    return sizes(model, **own)


def every(setting: str, part: str, names: tuple[str, ...]) -> dict[str, int]:
    """The period and the offset of the layers that have a part."""
    places = [layer for layer, name in enumerate(names) if name == part]
    first, second, *_ = [*places, len(names), len(names)]
    period = second - first if len(places) > 1 else len(names) + 1
    return {f"{setting}_period": period, f"{setting}_offset": first}


def mamba_settings(mamba: Mamba) -> dict[str, Any]:
    """The config.json settings of a Mamba."""
    return {
        "mamba_expand": mamba.expand,
        "mamba_d_state": mamba.state_dim,
        "mamba_d_conv": mamba.conv_kernel,
        "mamba_dt_rank": mamba.dt_rank or "auto",
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.use_bias,
    }


JAMBA = Family("jamba", "JambaForCausalLM", model, settings, lambda model: RULES)
