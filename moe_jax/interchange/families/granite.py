"""GraniteMoE, with and without a shared expert: four multipliers, and experts in one tensor.

Three multiply embeddings, the output of each branch, and attention scores (instead of
head_dim^-0.5). One divides logits.

Source: `modeling_granitemoe.py` and `modeling_granitemoeshared.py` of transformers; IBM 2024.
"""

import functools
from collections.abc import Callable
from typing import Any

from moe_jax.interchange.common import (
    DROPLESS,
    LAYER,
    OUTSIDE,
    attention_rules,
    attention_settings,
    aux_loss_settings,
    first_attention,
    fused_expert_rules,
    gated_activation,
    gated_name,
    norm_rules,
    read_attention,
    sizes,
    token_choice,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rules import LINEAR, Rule
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE

BLOCK = f"{LAYER}block_sparse_moe."
GATE_UP = ("moe/experts/wg", "moe/experts/wi")
SHARED_GATE_UP = ("moe/shared/wg", "moe/shared/wi")
RULES = (
    *OUTSIDE,
    *norm_rules("moe"),
    *attention_rules(),
    Rule(f"{BLOCK}router.layer.weight", "moe/router/weight", LINEAR),
    Rule(f"{BLOCK}input_linear.weight", GATE_UP, LINEAR, axis=-2),
    Rule(f"{BLOCK}output_linear.weight", "moe/experts/wo", LINEAR),
    Rule(f"{LAYER}shared_mlp.input_linear.weight", SHARED_GATE_UP, LINEAR),
    Rule(f"{LAYER}shared_mlp.output_linear.weight", "moe/shared/wo", LINEAR),
    Rule(f"{BLOCK}router.weight", "moe/router/weight", LINEAR),
    *fused_expert_rules(BLOCK),
)


def model(config: Reader, shared_expert_dim: int = 0) -> LanguageModel:
    """The model of a config.json."""
    attention = read_attention(
        config,
        biases="qkvo" if config.get("attention_bias", False) else "",
        scale=float(config.get("attention_multiplier", 1.0)),
    )
    moe = MoE(
        num_experts=config.get("num_local_experts", 8),
        num_selected_experts=config.get("num_experts_per_tok", 2),
        expert_dim=config["intermediate_size"],
        shared_expert_dim=shared_expert_dim,
        activation=gated_activation(config),
        router=token_choice(config, 2, renormalize=True),
        losses=(HuggingFaceLoadBalance(weight=config.get("router_aux_loss_coef", 0.001)),),
        capacity=DROPLESS,
    )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={"attention": attention, "moe": moe},
        stack=StackLayout(repeats=config["num_hidden_layers"]),
        norm=RMSNorm(config.get("rms_norm_eps", 1e-6)),
        residual_multiplier=float(config.get("residual_multiplier", 1.0)),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=float(config.get("embedding_multiplier", 1.0)),
        logits_multiplier=1 / float(config.get("logits_scaling", 1.0)),
    )


def with_shared(config: Reader) -> LanguageModel:
    """The model of a GraniteMoeShared config.json; a width of 0 means no shared expert."""
    return model(config, config.get("shared_intermediate_size", 0))


def settings(model: LanguageModel, family: str) -> dict[str, Any]:
    """The config.json of a model."""
    attention, moe = first_attention(model), model.part["moe"]
    assert isinstance(moe, MoE), moe
    shared = {"shared_intermediate_size": moe.shared_expert_dim}
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    return sizes(
        model,
        **attention_settings(attention),
        **(shared if family == "granitemoeshared" else {}),
        attention_bias="o" in attention.biases,
        attention_multiplier=scale,
        residual_multiplier=model.residual_multiplier,
        embedding_multiplier=model.embedding_multiplier,
        logits_scaling=inverse(model.logits_multiplier),
        hidden_act=gated_name(moe.activation),
        intermediate_size=moe.expert_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
        **aux_loss_settings(moe),
    )


def inverse(value: float) -> float:
    """1 / value, as the shortest decimal whose inverse is exactly the value, or else unrounded."""
    exact = 1 / value
    return next((one for n in range(9) if 1 / (one := round(exact, n) or 1.0) == value), exact)


def family(name: str, architecture: str, model: Callable[[Reader], LanguageModel]) -> Family:
    """A family with these tensors."""
    own = functools.partial(settings, family=name)
    return Family(name, architecture, model, own, lambda model: RULES)


GRANITE_MOE = family("granitemoe", "GraniteMoeForCausalLM", model)
GRANITE_MOE_SHARED = family("granitemoeshared", "GraniteMoeSharedForCausalLM", with_shared)
