"""Settings of tiny T5 and Switch models, by name. See `hf_families`."""

from typing import Any

T5 = {
    "model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 6, "num_heads": 4, "d_ff": 40,
    "num_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    "is_encoder_decoder": True,
}  # fmt: skip
# Each sequence has fewer slots than tokens.
SWITCH = {
    **T5, "model_type": "switch_transformers", "num_layers": 4, "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4,
    "expert_capacity": 7, "d_ff": 20,
}  # fmt: skip

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {**T5, "num_decoder_layers": 3},
    # Version 1.1: three matrices, and its own, unscaled head.
    "t5_gated": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5_tied_unscaled": {
        **T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
    },
    "switch": SWITCH,
    # Sparse layers everywhere in the encoder, nowhere in the decoder; a router bias.
    "switch_uneven": {
        **SWITCH, "num_layers": 2, "num_decoder_layers": None, "num_sparse_decoder_layers": 0,
        "dense_act_fn": "gelu", "router_bias": True,
    },
    "switch_untied": {**SWITCH, "tie_word_embeddings": False, "num_sparse_encoder_layers": 4},
}  # fmt: skip
