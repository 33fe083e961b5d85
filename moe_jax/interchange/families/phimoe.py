"""Phi-3.5-MoE: LayerNorm, biases throughout, and experts chosen by SparseMixer.

Documents longer than `original_max_position_embeddings` use `long_factor` and `long_mscale`, as in
the released code. transformers 5 uses `long_mscale` there, but `short_factor` at every length.

Sources: Abdin et al. 2024, arXiv:2404.14219; Liu et al. 2024, arXiv:2409.12136;
`modeling_phimoe.py` of microsoft/Phi-3.5-MoE-instruct and of transformers.
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
    aux_loss_settings,
    block_sparse_rules,
    first_attention,
    gated_activation,
    gated_name,
    norm_rules,
    read_attention,
    sizes,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rope import rope_of
from moe_jax.interchange.rules import Rule
from moe_jax.layers.attention import Attention
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.rotary_scaling import LongRope
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.noise import Jitter
from moe_jax.moe.routing.sparse_mixer import SparseMixer

RULES = (
    *OUTSIDE,
    *norm_rules("moe"),
    *attention_rules(),
    *block_sparse_rules(),
    Rule(f"{LAYER}mlp.router.weight", "moe/router/weight", LINEAR),
)


def model(config: Reader) -> LanguageModel:
    """The model of a config.json."""
    config.require("num_experts_per_tok", 2)  # the released code supports no other number
    attention = read_attention(
        # The value in the scaling counts, not the one beside it.
        config.with_settings(original_max_position_embeddings=None),
        kv_heads=8,
        theta=1e6,
        biases="qkvo" if config.get("attention_bias", False) else "",
        window=config.get("sliding_window"),
    )
    jitter = config.get("input_jitter_noise", 0.0)
    moe = MoE(
        num_experts=config["num_local_experts"],
        num_selected_experts=2,
        expert_dim=config["intermediate_size"],
        activation=gated_activation(config),
        router=SparseMixer(
            jitter=config.or_absent("router_jitter_noise", 0.01),
            noise=(Jitter(jitter),) if jitter else (),
        ),
        losses=(HuggingFaceLoadBalance(weight=config.get("router_aux_loss_coef", 0.001)),),
        capacity=DROPLESS,
    )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={"attention": with_mscales(config, attention), "moe": moe},
        stack=StackLayout(repeats=config["num_hidden_layers"]),
        norm=LayerNorm(config.get("rms_norm_eps", 1e-5)),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
        head_bias=config.get("lm_head_bias", False),
    )


def with_mscales(config: Reader, attention: Attention) -> Attention:
    """The attention with the factors of cosines and sines that only this family has.

    Raises:
      ValueError: the scaling is not longrope, or lacks its factors.
    """
    rotary = attention.rotary
    scaling = rotary and rotary.scaling
    if rotary is None or scaling is None:
        return attention
    rope: Any = rope_of(config)
    short, long = rope.get("short_mscale"), rope.get("long_mscale")
    require(
        isinstance(scaling, LongRope) and short is not None and long is not None,
        "the positions of phimoe must be scaled by longrope, with short_mscale and long_mscale",
        f"{dict(rope)}",
        "Correct rope_scaling",
    )
    assert isinstance(scaling, LongRope)
    scaling = dataclasses.replace(
        scaling,
        attention_factor=float(short),
        long_attention_factor=None if long == short else float(long),
    )
    return dataclasses.replace(attention, rotary=dataclasses.replace(rotary, scaling=scaling))


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    attention, moe = first_attention(model), model.part["moe"]
    assert isinstance(moe, MoE) and isinstance(moe.router, SparseMixer), moe
    own = attention_settings(attention)
    scaling = attention.rotary and attention.rotary.scaling
    if isinstance(scaling, LongRope):
        short = own["rope_parameters"].pop("attention_factor", scaling.cos_sin_factor)
        long = scaling.long_attention_factor or short
        own["rope_parameters"] |= {"short_mscale": short, "long_mscale": long}
    return sizes(
        model,
        **own,
        attention_bias="o" in attention.biases,
        lm_head_bias=model.head_bias,
        sliding_window=attention.window,
        hidden_act=gated_name(moe.activation),
        intermediate_size=moe.expert_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
        **aux_loss_settings(moe),
        router_jitter_noise=moe.router.jitter,
    )


PHIMOE = Family("phimoe", "PhimoeForCausalLM", model, settings, lambda model: RULES)
