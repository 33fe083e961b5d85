"""Settings of tiny Qwen, OLMoE, DBRX and Granite models, by name. See `hf_families`."""

from typing import Any

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
}  # fmt: skip
QWEN2 = {
    **SMALL, "model_type": "qwen2_moe", "intermediate_size": 40, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 3,
}  # fmt: skip
QWEN3 = {
    **SMALL, "model_type": "qwen3_moe", "head_dim": 12, "intermediate_size": 40,
    "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3,
}  # fmt: skip
OLMOE = {
    **SMALL, "model_type": "olmoe", "intermediate_size": 12, "num_experts": 6,
    "num_experts_per_tok": 3,
}  # fmt: skip
GRANITE = {
    **SMALL, "model_type": "granitemoe", "intermediate_size": 12, "num_local_experts": 6,
    "num_experts_per_tok": 3, "embedding_multiplier": 3.0, "residual_multiplier": 0.6,
    "attention_multiplier": 0.5, "logits_scaling": 6.0,
}  # fmt: skip


def dbrx(normalize: float | None, **attention: Any) -> dict[str, Any]:
    """The nested settings of a DBRX, whose gates are over their sum (1.0) or as they are."""
    experts = {"ffn_hidden_size": 12, "moe_num_experts": 6, "moe_top_k": 3, "moe_loss_weight": 0.05}
    return {
        "model_type": "dbrx", "vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 1.5, "kv_n_heads": 2, "rope_theta": 5e5, **attention},
        "ffn_config": {**experts, "moe_normalize_expert_weights": normalize},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }  # fmt: skip


SOFTMAX: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**QWEN2, "rope_theta": 1e6},
    "qwen2_moe_mixed": {
        **QWEN2, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3,
        "norm_topk_prob": True, "tie_word_embeddings": True, "hidden_act": "gelu",
    },
    "qwen2_moe_types": {
        **QWEN2, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "qkv_bias": False, "num_key_value_heads": 4,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "qwen3_moe": {**QWEN3, "norm_topk_prob": True, "router_aux_loss_coef": 0.02},
    "qwen3_moe_mixed": {
        **QWEN3, "num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
    },
    "qwen3_moe_tied": {
        **QWEN3, "num_hidden_layers": 3, "mlp_only_layers": [0], "tie_word_embeddings": True,
    },
    "olmoe": {**OLMOE, "clip_qkv": 0.7},
    "olmoe_renormalized": {
        **OLMOE, "norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": None,
        "tie_word_embeddings": True, "rope_theta": 500.0,
    },
    "dbrx": dbrx(1.0),
    "dbrx_heads": dbrx(1.0, clip_qkv=0.5, kv_n_heads=4),
    "dbrx_plain": dbrx(None),
    "granitemoe": {**GRANITE, "tie_word_embeddings": True},
    "granitemoe_biases": {**GRANITE, "attention_bias": True, "logits_scaling": 0.7},
    "granitemoeshared": {
        **GRANITE, "model_type": "granitemoeshared", "shared_intermediate_size": 20,
    },
    "granitemoeshared_none": {
        **GRANITE, "model_type": "granitemoeshared", "tie_word_embeddings": True,
        "num_key_value_heads": None,
    },
}  # fmt: skip
