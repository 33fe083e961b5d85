"""Which models of each family llama.cpp computes, and their metadata in a GGUF file.

Source: `src/models/*.cpp` of ggml-org/llama.cpp, release b11549; its `convert_hf_to_gguf.py`;
  `gguf/constants.py` of the package gguf. llama.cpp ignores settings that an architecture has no
  key for: `Architecture.only` names those that would change outputs.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.config.check import require

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
      name: "general.architecture".
      only: settings of a config.json with the one value that it computes, or a tuple of them.
      paired: whether rows of queries and keys are paired; see `gguf_names.Paired`.
      square: whether all heads together are as wide as the model.
      untied: whether it requires an output head, even as a copy of the embedding.
      second_norm: the name of the norm after attention.
      scores: "expert_gating_func": 1 a softmax, 2 sigmoids, 3 a softmax over the selected; 0: none.
    """

    name: str
    only: Mapping[str, Any]
    paired: bool = False
    square: bool = False
    untied: bool = False
    second_norm: str = "ffn_norm"
    scores: int = 0


FIX = "Train a model with that, or write this one with --to-hf"
SILU = {"hidden_act": "silu"}
NO_WINDOW = {"sliding_window": None}
LATENT = {
    **SILU, "attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1,
    "topk_method": ("greedy", "noaux_tc"),
    "rms_norm_eps": 1e-6,  # that of latent norms here, as in transformers
}  # fmt: skip
GRANITE = Architecture("granitemoe", SILU, paired=True, scores=1)
ARCHITECTURES = {
    "llama": Architecture("llama", SILU, paired=True),
    "mistral": Architecture("llama", {**SILU, **NO_WINDOW}, paired=True),
    "mixtral": Architecture("llama", {**SILU, **NO_WINDOW}, paired=True, scores=1),
    "qwen2": Architecture("qwen2", {**SILU, **NO_WINDOW}, square=True),
    "qwen3": Architecture("qwen3", {**SILU, **NO_WINDOW, "attention_bias": False}),
    "qwen2_moe": Architecture(
        "qwen2moe",
        {**SILU, **NO_WINDOW, "norm_topk_prob": False, "mlp_only_layers": []},
        square=True, untied=True, scores=1,
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        {**SILU, **NO_WINDOW, "norm_topk_prob": True, "mlp_only_layers": [],
         "attention_bias": False},
        scores=1,
    ),
    "olmoe": Architecture(
        "olmoe",
        {**SILU, "norm_topk_prob": False, "clip_qkv": None, "attention_bias": False},
        square=True, untied=True, scores=1,
    ),
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "deepseek_v2": Architecture("deepseek2", LATENT, scores=1),
    "deepseek_v3": Architecture("deepseek2", LATENT, scores=2),
    "gpt_oss": Architecture(
        "gpt-oss",
        {"attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        untied=True, second_norm="post_attention_norm", scores=3,
    ),
}  # fmt: skip

# The settings of a config.json, with GGUF's names after "ARCHITECTURE.".
SETTINGS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
}
# Settings that are only written.
MULTIPLIERS = {
    "routed_scaling_factor": "expert_weights_scale",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
MORE = {
    "vocab_size": "vocab_size",
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "num_experts": "expert_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "norm_topk_prob": "expert_weights_norm",
    "first_k_dense_replace": "leading_dense_block_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
}


def metadata(family: str, settings: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    """The GGUF keys that are equivalent to a config.json.

    Args:
      family: "model_type" of the file, one of `ARCHITECTURES`.
      settings: all that the outputs of the model depend on, as `Family.written` returns them.
      context_length: the longest context of the model, in tokens.

    Returns:
      Values by key, in the type that GGUF stores: a float is never written as an int.

    Raises:
      ValueError: llama.cpp does not compute the value of a setting; names it.
    """
    architecture = ARCHITECTURES[family]
    settings = {**settings, "max_position_embeddings": context_length}
    rope = settings["rope_parameters"]
    settings["rope_theta"] = float(rope["rope_theta"])
    check(family, settings)
    known = {**SETTINGS, **MORE}
    keys = {known[name]: settings[name] for name in known if settings.get(name) is not None}
    keys |= {MULTIPLIERS[one]: float(settings[one]) for one in MULTIPLIERS if one in settings}
    keys |= rope_keys(rope)
    if "kv_lora_rank" in settings:
        keys |= latent_keys(settings)
    else:
        keys["rope.dimension_count"] = keys["attention.value_length"] = settings["head_dim"]
    if family == "gpt_oss":
        keys["expert_feed_forward_length"] = settings["intermediate_size"]
    if architecture.scores:
        keys["expert_gating_func"] = architecture.scores
    return {f"{architecture.name}.{name}": value for name, value in keys.items()}


def check(family: str, settings: Mapping[str, Any]) -> None:
    """Refuses a model that llama.cpp would compute differently.

    Raises:
      ValueError: names the setting.
    """
    architecture = ARCHITECTURES[family]
    only: dict[str, Any] = dict(architecture.only)
    layers = settings["num_hidden_layers"]
    if family == "gpt_oss":
        kinds = ("sliding_attention", "full_attention")
        only["layer_types"] = [kinds[i % 2] for i in range(layers)]
    if family == "olmoe":
        only["num_key_value_heads"] = settings["num_attention_heads"]
    if settings.get("q_lora_rank", 0) is None:
        only["num_hidden_layers"] = (26, 27)  # llama.cpp recognises DeepSeek-V2-Lite by it
    for name, allowed in only.items():
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        require(
            settings.get(name, allowed[0]) in allowed,
            f"llama.cpp computes {architecture.name} only with {name}="
            f"{' or '.join(map(repr, allowed))}",
            f"{name}={settings.get(name)!r}",
            FIX,
        )
    width = settings["num_attention_heads"] * settings.get("head_dim", 0)
    require(
        not architecture.square or width == settings["hidden_size"],
        f"llama.cpp computes {architecture.name} only if its heads are as wide as the model",
        f"num_attention_heads * head_dim = {width}, hidden_size={settings['hidden_size']}",
        FIX,
    )
    require(
        bool(settings.get("n_shared_experts", 1)),
        "llama.cpp computes deepseek2 only with shared experts",
        "there are none",
        FIX,
    )


def latent_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Head sizes of DeepSeek's attention: all queries share one head of latents and rotary keys."""
    latent, turning = settings["kv_lora_rank"], settings["qk_rope_head_dim"]
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + turning,
        "attention.value_length": latent,
        "attention.key_length_mla": settings["qk_nope_head_dim"] + turning,
        "attention.value_length_mla": settings["v_head_dim"],
        "rope.dimension_count": turning,
    }


def rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys for the scaling of rotary positions; Llama 3's scaling is a tensor instead.

    Raises:
      ValueError: llama.cpp has no such scaling.
    """
    kind = rope["rope_type"]
    require(
        kind in ("default", "linear", "llama3", "yarn") and "partial_rotary_factor" not in rope,
        "llama.cpp turns only whole heads, with a scaling that is linear, llama3 or yarn",
        f"rope_parameters={dict(rope)}",
        FIX,
    )
    if kind in ("default", "llama3"):
        return {}
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    return keys | (yarn_keys(rope) if kind == "yarn" else {})


def yarn_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of YaRN, arXiv:2309.00071.

    llama.cpp itself multiplies cosines and sines by 1 + 0.1 ln(factor).
    """
    mscale, of_scores = rope.get("mscale", 0), rope.get("mscale_all_dim", 0)
    require(
        mscale == of_scores and not (mscale and "attention_factor" in rope),
        "llama.cpp computes YaRN only with mscale equal to mscale_all_dim, and no attention_factor "
        "then",
        f"rope_parameters={dict(rope)}",
        FIX,
    )
    if not rope.get("truncate", True):
        logger.warning(
            "llama.cpp rounds the bounds of YaRN's ramp, and truncate=False does not: its outputs "
            "differ a little, as those of every GGUF file of gpt-oss do."
        )
    keys: dict[str, Any] = {
        "original_context_length": rope["original_max_position_embeddings"],
        "yarn_beta_fast": float(rope["beta_fast"]),
        "yarn_beta_slow": float(rope["beta_slow"]),
    }
    if of_scores:
        keys["yarn_log_multiplier"] = 0.1 * of_scores
    if "attention_factor" in rope:
        own = 1 + 0.1 * math.log(rope["factor"])
        keys["attn_factor"] = rope["attention_factor"] / own
    return {f"rope.scaling.{name}": value for name, value in keys.items()}
