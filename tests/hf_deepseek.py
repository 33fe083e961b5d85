"""Settings of tiny DeepSeek models: a config.json by name. See `hf_families`."""

from typing import Any

LATENT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-3, "hidden_act": "silu", "kv_lora_rank": 12, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8, "v_head_dim": 6, "intermediate_size": 40, "moe_intermediate_size": 12,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
V2 = {**LATENT, "model_type": "deepseek_v2", "n_shared_experts": 2, "norm_topk_prob": False}
V3 = {
    **LATENT, "model_type": "deepseek_v3", "q_lora_rank": 14, "n_shared_experts": 1, "n_group": 4,
    "topk_group": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
# Base 1,000 and four pairs: some turn fast, some slowly, some in between.
YARN = {
    "type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 1,
    "original_max_position_embeddings": 16,
}  # fmt: skip

DEEPSEEK: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **V2, "q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 4.0, "attention_bias": True, "rope_theta": 1e3,
        "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4},
    },
    "deepseek_v2_lite": {
        **V2, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "num_hidden_layers": 2,
        "rope_parameters": PLAIN,
    },
    "deepseek_v3": {
        **V3, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "rope_theta": 1e4, "rope_scaling": None,
    },
    "deepseek_v3_halves": {
        **V3, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False,
        "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True,
        "rope_parameters": PLAIN,
    },
    # A model that predicts later tokens; its layers 2 and 3 are the modules.
    "deepseek_v3_multi_token": {
        **V3, "num_hidden_layers": 2, "num_nextn_predict_layers": 2, "rope_parameters": PLAIN,
    },
    "deepseek_v3_yarn": {
        **V3, "first_k_dense_replace": 2, "rope_theta": 1e3,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}  # fmt: skip
