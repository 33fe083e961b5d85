"""Settings of tiny models from families with one model each, by name. See `hf_families`."""

from typing import Any

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
GPT_OSS = {
    **SMALL, "model_type": "gpt_oss", "intermediate_size": 20, "num_local_experts": 8,
    "num_experts_per_tok": 3, "sliding_window": 6,
}  # fmt: skip

PHIMOE = {
    **SMALL, "model_type": "phimoe", "intermediate_size": 24, "num_local_experts": 8,
    "num_experts_per_tok": 2, "router_jitter_noise": 0.2,
}  # fmt: skip
LONGROPE = {
    "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "short_mscale": 1.2,
    "long_mscale": 1.4, "original_max_position_embeddings": 16,
}  # fmt: skip

LLAMA4 = {
    **SMALL, "model_type": "llama4_text", "num_hidden_layers": 4, "intermediate_size": 16,
    "intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 8,
    "floor_scale": 6, "attn_scale": 0.5, "rms_norm_eps": 1e-3,
}  # fmt: skip
JAMBA = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"},
    "model_type": "jamba", "num_hidden_layers": 4, "intermediate_size": 24, "num_experts": 4,
    "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 5, "rms_norm_eps": 1e-3,
}  # fmt: skip

QUICK = (
    "gpt_oss",
    "jamba",
    "llama4_scout",
    "phimoe",
)  # one per family, or two that differ much
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        **GPT_OSS, "swiglu_limit": 0.5, "rope_theta": 1e4,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 16,
        },
    },
    "gpt_oss_types": {
        **GPT_OSS, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3,
        "attention_bias": False, "swiglu_limit": 1.5, "swiglu_alpha": 1.2,
        "tie_word_embeddings": True, "rope_parameters": PLAIN,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "jamba": JAMBA,
    "jamba_others": {
        **JAMBA, "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 3, "expert_layer_offset": 0, "num_experts_per_tok": 1,
        "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 7, "mamba_conv_bias": False,
        "mamba_proj_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4,
    },
    "jamba_dense": {**JAMBA, "num_experts": 1, "num_hidden_layers": 3},
    "llama4_scout": {
        **LLAMA4, "interleave_moe_layer_step": 1, "use_qk_norm": True, "rope_theta": 1e3,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama4_maverick": {
        **LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "rope_theta": 1e4,
        "rope_scaling": None, "no_rope_layer_interval": 2, "attention_bias": True,
    },
    "llama4_types": {
        **LLAMA4, "num_experts_per_tok": 2, "moe_layers": [0, 3], "no_rope_layers": [0, 1, 0, 1],
        "layer_types": ["chunked_attention", "full_attention", "full_attention",
                        "chunked_attention"],
        "attn_temperature_tuning": False, "tie_word_embeddings": True, "rope_parameters": PLAIN,
    },
    "phimoe": {
        **PHIMOE, "attention_bias": True, "lm_head_bias": True, "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        # In transformers 5, long documents use the short factors.
        "rope_scaling": {**LONGROPE, "long_factor": LONGROPE["short_factor"]},
    },
    "phimoe_short": {
        **PHIMOE, "sliding_window": 6, "rope_theta": 1e4, "hidden_act": "gelu",
        "tie_word_embeddings": True, "original_max_position_embeddings": 32,
        "rope_scaling": {
            **LONGROPE, "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            "original_max_position_embeddings": 32,
        },
    },
    "phimoe_plain": {
        **PHIMOE, "attention_bias": True, "router_jitter_noise": 0.4, "rope_parameters": PLAIN,
    },
}  # fmt: skip
