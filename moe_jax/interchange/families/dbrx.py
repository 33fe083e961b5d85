"""DBRX: clipped queries, keys and values, LayerNorm without biases, four of sixteen experts.

The base of rotary positions is at the top level of a config.json. The release has it in
"attn_config" instead, where transformers does not read it: both are written.

Source: `modeling_dbrx.py` and `configuration_dbrx.py` of transformers; databricks/dbrx.
"""

from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.common import (
    DROPLESS,
    GATED,
    aux_weight,
    first_attention,
    gated_activation,
    gated_name,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rope import read_rotary, rope_settings
from moe_jax.interchange.rules import AS_IS, LINEAR, Merged, Rule
from moe_jax.layers.attention import Attention
from moe_jax.layers.norms import LayerNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

BLOCK = "transformer.blocks.{layer}."
ATTENTION = f"{BLOCK}norm_attn_norm."
EXPERTS = f"{BLOCK}ffn.experts.mlp."
RULES = (
    Rule("transformer.wte.weight", "embedding"),
    Rule("transformer.norm_f.weight", "final_norm/scale"),
    Rule("lm_head.weight", "head", LINEAR),
    Rule(f"{ATTENTION}norm_1.weight", "attention_norm/scale"),
    Rule(f"{ATTENTION}norm_2.weight", "moe_norm/scale"),
    Rule(f"{ATTENTION}attn.Wqkv.weight", tuple(f"attention/w{one}" for one in "qkv"), LINEAR),
    Rule(f"{ATTENTION}attn.out_proj.weight", "attention/wo", LINEAR),
    Rule(f"{BLOCK}ffn.router.layer.weight", "moe/router/weight", LINEAR),
    Rule(f"{EXPERTS}w1", "moe/experts/wg", Merged(LINEAR)),
    Rule(f"{EXPERTS}v1", "moe/experts/wi", Merged(LINEAR)),
    Rule(f"{EXPERTS}w2", "moe/experts/wo", Merged(AS_IS)),
)


def model(config: Reader) -> LanguageModel:
    """The model of a config.json."""
    config.require("tie_word_embeddings", False)
    heads, width = config["n_heads"], config["d_model"]
    own = config.inner("attn_config")
    longest = config.get("max_seq_len", 2048)
    attention = Attention(
        num_heads=heads,
        num_kv_heads=own.get("kv_n_heads", 1),
        head_dim=width // heads,
        clip_qkv=own.get("clip_qkv"),
        rotary=read_rotary(
            config.with_settings(max_position_embeddings=longest),
            width // heads,
            theta=own.get("rope_theta", 10_000.0),
        ),
    )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=width,
        parts={"attention": attention, "moe": sparse(config)},
        stack=StackLayout(repeats=config["n_layers"]),
        norm=LayerNorm(1e-5, use_bias=False),
        tie_embeddings=False,
        embedding_multiplier=1.0,
    )


def sparse(config: Reader) -> MoE:
    """The sparse block of a config.json."""
    own = config.inner("ffn_config")
    activation = own.get("ffn_act_fn", {"name": "silu"})
    require(
        set(activation) == {"name"},
        "ffn_act_fn must have a name and no other setting",
        f"ffn_act_fn={activation}",
        f"Use one of {list(GATED)}",
    )
    order = own.or_absent("moe_normalize_expert_weights", 1.0)
    require(
        order in (None, 1),
        "gates are divided by their sum, the L_1 norm, or by nothing",
        f"moe_normalize_expert_weights={order}",
        "Use 1 or null",
    )
    selected = own.get("moe_top_k", 1)
    return MoE(
        num_experts=own.get("moe_num_experts", 4),
        num_selected_experts=selected,
        expert_dim=own.get("ffn_hidden_size", 3584),
        activation=gated_activation(Reader({"hidden_act": activation["name"]})),
        router=TokenChoice(renormalize=order is not None, allow_constant_gate=selected == 1),
        losses=(HuggingFaceLoadBalance(weight=own.get("moe_loss_weight", 0.01)),),
        capacity=DROPLESS,
    )


def settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model."""
    attention, moe = first_attention(model), model.part["moe"]
    assert isinstance(moe, MoE) and isinstance(moe.router, TokenChoice), moe
    assert attention.rotary is not None, attention
    rope = rope_settings(attention.rotary, attention.head_dim)
    longest = rope.pop("max_position_embeddings", None)
    return {
        "vocab_size": model.vocab_size,
        "d_model": model.model_dim,
        "n_layers": model.stack.num_layers,
        "n_heads": attention.num_heads,
        "tie_word_embeddings": False,
        **rope,
        **({} if longest is None else {"max_seq_len": longest}),
        "attn_config": {
            "kv_n_heads": attention.kv_heads,
            "clip_qkv": attention.clip_qkv,
            "rope_theta": attention.rotary.base,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": gated_name(moe.activation)},
            "ffn_hidden_size": moe.expert_dim,
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.num_selected_experts,
            "moe_normalize_expert_weights": 1.0 if moe.router.renormalize else None,
            "moe_loss_weight": aux_weight(moe),
        },
    }


DBRX = Family("dbrx", "DbrxForCausalLM", model, settings, lambda model: RULES)
