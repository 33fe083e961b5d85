"""Mixtral: grouped queries, and the top two of eight experts in every layer, renormalised.

Source: Jiang et al. 2024, arXiv:2401.04088; `modeling_mixtral.py` of transformers.
"""

from typing import Any

from moe_jax.interchange.common import (
    DROPLESS,
    OUTSIDE,
    attention_rules,
    attention_settings,
    aux_loss_settings,
    block_sparse_rules,
    first_attention,
    gated_activation,
    gated_name,
    norm_rules,
    read_attention,
    sizes,
    token_choice,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE

RULES = (*OUTSIDE, *norm_rules("moe"), *attention_rules(), *block_sparse_rules())


def model(config: Reader) -> LanguageModel:
    """The model of a config.json."""
    attention = read_attention(config, kv_heads=8, theta=1e6, window=config.get("sliding_window"))
    moe = MoE(
        num_experts=config["num_local_experts"],
        num_selected_experts=config["num_experts_per_tok"],
        expert_dim=config["intermediate_size"],
        activation=gated_activation(config),
        router=token_choice(config, renormalize=True),
        losses=(HuggingFaceLoadBalance(weight=config.get("router_aux_loss_coef", 0.001)),),
        capacity=DROPLESS,
    )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={"attention": attention, "moe": moe},
        stack=StackLayout(repeats=config["num_hidden_layers"]),
        norm=RMSNorm(config.get("rms_norm_eps", 1e-5)),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    attention, moe = first_attention(model), model.part["moe"]
    assert isinstance(moe, MoE), moe
    return sizes(
        model,
        **attention_settings(attention),
        sliding_window=attention.window,
        hidden_act=gated_name(moe.activation),
        intermediate_size=moe.expert_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
        **aux_loss_settings(moe),
    )


MIXTRAL = Family("mixtral", "MixtralForCausalLM", model, settings, lambda model: RULES)
