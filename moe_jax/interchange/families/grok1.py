"""Grok-1: norms before and after every branch, capped scores, tanh GEGLU experts.

transformers does not support it. Names and settings are those of hpcai-tech/grok-1, a PyTorch
conversion of the released weights with "model_type": "grok-1". GELU is the tanh approximation, as
in the release.

Sources: `model.py` and `run.py` of xai-org/grok-1; `config.json` of hpcai-tech/grok-1.
"""

from typing import Any

from moe_jax.interchange.common import (
    DROPLESS,
    LAYER,
    LINEAR,
    attention_rules,
    attention_settings,
    first_attention,
    read_attention,
    sizes,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rules import Rule
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import GeGLUTanh
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

EXPERT = f"{LAYER}moe_block.experts.{{expert}}."
RULES = (
    Rule("model.embed_tokens.weight", "embedding"),
    Rule("model.norm.scale", "final_norm/scale"),
    Rule("lm_head.weight", "head", LINEAR),
    Rule(f"{LAYER}pre_attn_norm.scale", "attention_norm/scale"),
    Rule(f"{LAYER}post_attn_norm.scale", "attention_post_norm/scale"),
    Rule(f"{LAYER}pre_moe_norm.scale", "moe_norm/scale"),
    Rule(f"{LAYER}post_moe_norm.scale", "moe_post_norm/scale"),
    *attention_rules(module="attn"),
    Rule(f"{LAYER}moe_block.gate.weight", "moe/router/weight", LINEAR),
    Rule(f"{EXPERT}linear.weight", "moe/experts/wg", LINEAR),
    Rule(f"{EXPERT}linear_v.weight", "moe/experts/wi", LINEAR),
    Rule(f"{EXPERT}linear_1.weight", "moe/experts/wo", LINEAR),
)


def model(config: Reader) -> LanguageModel:
    """The model of a config.json."""
    attention = read_attention(
        config,
        scale=config.get("attn_output_multiplier", 1.0),
        softcap=config.get("max_attn_value", 30.0),
    )
    moe = MoE(
        num_experts=config["num_experts"],
        num_selected_experts=config.get("num_experts_per_tok", 2),
        expert_dim=config["intermediate_size"],
        activation=GeGLUTanh(),
        router=TokenChoice(),
        losses=(HuggingFaceLoadBalance(weight=config.get("router_aux_loss_coef", 0.001)),),
        capacity=DROPLESS,
    )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={"attention": attention, "moe": moe},
        stack=StackLayout(repeats=config["num_hidden_layers"]),
        norm=RMSNorm(config.get("rms_norm_eps", 1e-5)),
        norm_placement="sandwich",
        tie_embeddings=config.get("tie_word_embeddings", True),
        embedding_multiplier=config.get("embedding_multiplier_scale", 1.0),
        logits_multiplier=config.get("output_multiplier_scale", 1.0),
    )


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    attention, moe = first_attention(model), model.part["moe"]
    assert isinstance(moe, MoE), moe
    return sizes(
        model,
        **attention_settings(attention),
        attn_output_multiplier=attention.scale,
        max_attn_value=attention.softcap,
        embedding_multiplier_scale=model.embedding_multiplier,
        output_multiplier_scale=model.logits_multiplier,
        intermediate_size=moe.expert_dim,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
    )


GROK1 = Family(
    "grok-1",
    "Grok1ModelForCausalLM",
    model,
    settings,
    lambda model: RULES,
    ignored=(r"lm_head\.weight",),  # repeats the embedding
)
