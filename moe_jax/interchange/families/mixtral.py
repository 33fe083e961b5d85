"""Mixtral: grouped queries, and in every layer the two best of eight experts, renormalised.

Source: Jiang et al. 2024, arXiv:2401.04088; `modeling_mixtral.py` of transformers.
"""

from typing import Any

from moe_jax.interchange.common import (
    DROPLESS,
    OUTSIDE,
    attention_rules,
    block_sparse_rules,
    gated_activation,
    gated_name,
    norm_rules,
    sizes,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rope import read_rotary, rope_settings
from moe_jax.layers.attention import Attention
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

RULES = (*OUTSIDE, *norm_rules("moe"), *attention_rules(), *block_sparse_rules())


def model(config: Reader) -> LanguageModel:
    """The model of a config.json."""
    epsilon = config.get("rms_norm_eps", 1e-5)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    attention = Attention(
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=head_dim,
        rotary=read_rotary(config, head_dim, theta=1e6),
        window=config.get("sliding_window"),
    )
    moe = MoE(
        num_experts=config["num_local_experts"],
        num_selected_experts=config["num_experts_per_tok"],
        expert_dim=config["intermediate_size"],
        activation=gated_activation(config),
        router=TokenChoice(renormalize=True),
        losses=(HuggingFaceLoadBalance(weight=config.get("router_aux_loss_coef", 0.001)),),
        capacity=DROPLESS,
    )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={"attention": attention, "moe": moe},
        stack=StackLayout(repeats=config["num_hidden_layers"]),
        norm=RMSNorm(epsilon),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    attention: Any = model.part["attention"]
    moe: Any = model.part["moe"]
    return sizes(
        model,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        sliding_window=attention.window,
        **rope_settings(attention.rotary, attention.head_dim),
        hidden_act=gated_name(moe.activation),
        intermediate_size=moe.expert_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
    )


MIXTRAL = Family("mixtral", "MixtralForCausalLM", model, settings, lambda model: RULES)
