"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention, dense layers first, then fine-grained experts.

V2 scores experts by a softmax, and a group by its best expert. V3 uses sigmoids and the best two
experts, and adds a selection bias.

Source: DeepSeek-AI 2024, arXiv:2405.04434 and arXiv:2412.19437; `modeling_deepseek_v2.py` and
  `modeling_deepseek_v3.py` of transformers; moe_layer_freq: `modeling_deepseek.py` beside the
  published weights. norm_topk_prob of V2 has no effect, as in transformers.
"""

import dataclasses
import logging
from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.block_scales import BlockScaledFiles
from moe_jax.interchange.common import (
    DROPLESS,
    LAYER,
    LINEAR,
    OUTSIDE,
    fused_expert_rules,
    gated_activation,
    gated_name,
    gated_rules,
    norm_rules,
    sizes,
    token_choice,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rope import read_rotary, rope_settings
from moe_jax.interchange.rules import Rule
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import MultiToken
from moe_jax.models.stack import StackLayout
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice

logger = logging.getLogger(__name__)

ATTENTION, MLP = f"{LAYER}self_attn.", f"{LAYER}mlp."
PROJECTIONS = (
    ("q_proj", "q"), ("q_a_proj", "q_a"), ("q_b_proj", "q_b"), ("kv_a_proj_with_mqa", "kv_a"),
    ("kv_b_proj", "kv_b"), ("o_proj", "o"),
)  # fmt: skip
RULES = (
    *OUTSIDE,
    *norm_rules("moe", "mlp"),
    *(Rule(f"{ATTENTION}{name}.weight", f"attention/w{key}", LINEAR) for name, key in PROJECTIONS),
    Rule(f"{ATTENTION}q_a_proj.bias", "attention/bq_a"),
    Rule(f"{ATTENTION}kv_a_proj_with_mqa.bias", "attention/bkv_a"),
    Rule(f"{ATTENTION}o_proj.bias", "attention/bo"),
    Rule(f"{ATTENTION}q_a_layernorm.weight", "attention/q_norm/scale"),
    Rule(f"{ATTENTION}kv_a_layernorm.weight", "attention/kv_norm/scale"),
    *gated_rules(MLP, "mlp"),
    Rule(f"{MLP}gate.weight", "moe/router/weight", LINEAR),
    Rule(f"{MLP}gate.e_score_correction_bias", "moe/bias_E"),
    *gated_rules(f"{MLP}shared_experts.", "moe/shared"),
    *gated_rules(f"{MLP}experts.{{expert}}.", "moe/experts"),
    *fused_expert_rules(MLP),
    # A multi-token module is a layer after the others, with a few extra tensors.
    Rule(f"{LAYER}eh_proj.weight", "multi_token/project", LINEAR),
    Rule(f"{LAYER}enorm.weight", "multi_token/embedding_norm/scale"),
    Rule(f"{LAYER}hnorm.weight", "multi_token/hidden_norm/scale"),
    Rule(f"{LAYER}shared_head.norm.weight", "multi_token/final_norm/scale"),
)


def attention_part(config: Reader) -> LatentAttention:
    """The attention of a config.json."""
    heads, rope_dim = config["num_attention_heads"], config.get("qk_rope_head_dim", 64)
    config.require("num_key_value_heads", None, heads)
    return LatentAttention(
        num_heads=heads,
        q_rank=config.or_absent("q_lora_rank", 1536) or 0,
        kv_rank=config.get("kv_lora_rank", 512),
        nope_dim=config.get("qk_nope_head_dim", 128),
        rope_dim=rope_dim,
        value_dim=config.get("v_head_dim", 128),
        rotary=read_rotary(
            config, rope_dim, interleaved=config.or_absent("rope_interleave", True) or False
        ),
        use_bias=config.get("attention_bias", False),
    )


def language_model(config: Reader, moe: MoE, *, num_dense: int, dense_dim: int) -> LanguageModel:
    """The model of a config.json.

    Args:
      config: of the model.
      moe: its experts.
      num_dense: first_k_dense_replace, if the file has none.
      dense_dim: intermediate_size, if the file has none.
    """
    first = config.get("first_k_dense_replace", num_dense)
    every = config.get("moe_layer_freq", 1)
    layers = [
        ("attention", "moe" if i >= first and i % every == 0 else "mlp")
        for i in range(config["num_hidden_layers"])
    ]
    used = {name for layer in layers for name in layer}
    parts = {
        "attention": attention_part(config),
        "mlp": Mlp(
            dim=config.get("intermediate_size", dense_dim), activation=gated_activation(config)
        ),
        "moe": moe,
    }
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={name: part for name, part in parts.items() if name in used},
        stack=StackLayout.of(layers),
        norm=RMSNorm(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def expert_settings(config: Reader, num_shared: int) -> dict[str, Any]:
    """`MoE` settings that V2 and V3 share; `num_shared` is the default of n_shared_experts.

    The shared experts are one network of n_shared_experts times the width.
    """
    dim = config["moe_intermediate_size"]
    scope = "sequence" if config.get("seq_aux", True) else "microbatch"
    return {
        "num_experts": config["n_routed_experts"],
        "num_selected_experts": config["num_experts_per_tok"],
        "expert_dim": dim,
        "shared_expert_dim": (config.or_absent("n_shared_experts", num_shared) or 0) * dim,
        "activation": gated_activation(config),
        "losses": (LoadBalance(weight=config.get("aux_loss_alpha", 0.001), scope=scope),),
        "capacity": DROPLESS,
    }


def groups_of(config: Reader, num_groups: int, num_selected: int, worth: str) -> Any:
    """The groups of experts; None if there is only one, or a token may use all."""
    groups = config.get("n_group", num_groups)
    selected = config.get("topk_group", num_selected)
    return None if selected >= groups else ExpertGroups(groups, selected, worth=worth)


def v2(config: Reader) -> LanguageModel:
    """DeepSeek-V2 of a config.json."""
    config = config.with_settings(rope_interleave=True)  # whatever the file says
    config.require("scoring_func", "softmax")
    config.require("mlp_bias", False)
    method = config.get("topk_method", "greedy")
    config.require("topk_method", "greedy", "group_limited_greedy")
    groups = groups_of(config, 1, 1, "max")
    router = TokenChoice(
        scaling_factor=config.get("routed_scaling_factor", 1.0),
        groups=groups if method == "group_limited_greedy" else None,
    )
    moe = MoE(**expert_settings(config, 2), router=router)
    return language_model(config, moe, num_dense=0, dense_dim=11_008)


def v3(config: Reader) -> LanguageModel:
    """DeepSeek-V3 of a config.json."""
    config.require("scoring_func", "sigmoid")
    quantization = config.get("quantization_config", {})
    require(
        quantization.get("quant_method", "fp8") == "fp8",
        "a quantised DeepSeek-V3 can be read only from float8 with scales of blocks, as published",
        f"quantization_config={quantization}",
        "Dequantise the model first",
    )
    config.require("topk_method", "noaux_tc")
    router = token_choice(
        config,
        score=Sigmoid(),
        renormalize=config.or_absent("norm_topk_prob", True) or False,
        scaling_factor=config.get("routed_scaling_factor", 2.5),
        groups=groups_of(config, 8, 4, "top2_sum"),
    )
    moe = MoE(**expert_settings(config, 1), router=router, bias=SignUpdate(rate=1e-3))
    model = language_model(config, moe, num_dense=3, dense_dim=18_432)
    depth = num_modules(config)
    return dataclasses.replace(model, multi_token=MultiToken(depth) if depth else None)


def num_modules(config: Reader) -> int:
    """The number of multi-token modules; 0 if the files omit them, as many do."""
    depth, first = config.get("num_nextn_predict_layers", 1), config["num_hidden_layers"]
    name = f"model.layers.{first}.eh_proj.weight"
    if depth and config.tensors is not None and name not in config.tensors:
        logger.warning("num_nextn_predict_layers=%d, but there is no %s: read without", depth, name)
        return 0
    assert isinstance(depth, int)
    return depth


def copies(model: LanguageModel) -> dict[str, str]:
    """The embedding and the head, which published files repeat in every multi-token module."""
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    names = [f"model.layers.{layer}." for layer in model.layers_of.get("multi_token", ())]
    return {
        **{f"{name}embed_tokens.weight": "model.embed_tokens.weight" for name in names},
        **{f"{name}shared_head.head.weight": head for name in names},
    }


def shared_settings(model: LanguageModel) -> dict[str, Any]:
    """The settings of a config.json that V2 and V3 share."""
    attention: Any = model.part["attention"]
    moe: Any = model.part["moe"]
    layers = model.moe_layers["moe"]
    dense: Any = model.part.get("mlp", Mlp(activation=moe.activation))
    return sizes(
        model,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        q_lora_rank=attention.q_rank or None,
        kv_lora_rank=attention.kv_rank,
        qk_nope_head_dim=attention.nope_dim,
        qk_rope_head_dim=attention.rope_dim,
        v_head_dim=attention.value_dim,
        attention_bias=attention.use_bias,
        **rope_settings(attention.rotary, attention.rope_dim),
        first_k_dense_replace=layers[0],
        moe_layer_freq=layers[1] - layers[0] if len(layers) > 1 else 1,
        intermediate_size=dense.dim,
        hidden_act=gated_name(moe.activation),
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
        moe_intermediate_size=moe.expert_dim,
        n_shared_experts=moe.shared_expert_dim // moe.expert_dim,
        routed_scaling_factor=moe.router.scaling_factor,
        n_group=moe.router.groups.num_groups if moe.router.groups else 1,
        topk_group=moe.router.groups.num_selected if moe.router.groups else 1,
    )


def v2_settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a DeepSeek-V2."""
    moe: Any = model.part["moe"]
    method = "greedy" if moe.router.groups is None else "group_limited_greedy"
    return shared_settings(model) | {"topk_method": method, "norm_topk_prob": False}


def v3_settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a DeepSeek-V3."""
    attention: Any = model.part["attention"]
    moe: Any = model.part["moe"]
    return shared_settings(model) | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe.router.renormalize,
        "rope_interleave": attention.rotary.interleaved,
        "num_nextn_predict_layers": model.multi_token.depth if model.multi_token else 0,
    }


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", v2, v2_settings, lambda model: RULES)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    v3,
    v3_settings,
    lambda model: RULES,
    copies,
    opened=BlockScaledFiles,
)
