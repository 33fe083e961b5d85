"""The published models of the field: their parameter counts, and settings of their config.json.

Settings were compared with copies of the files in public repositories:

- Mixtral 8x7B and 8x22B, gpt-oss 20b and 120b, DeepSeek-V2-Lite and V3: `hf_model_configs.py` of
  AI-Hypercomputer/maxtext, which quotes each from its page on huggingface.co. It also has
  Qwen3-30B-A3B and 235B-A22B of July 2025, with the sizes used here; their context and theta were
  smaller before.
- Grok-1: `create_config_from_xai` of TensorRT-LLM. Jamba: the file of Jamba-1.5-Mini, with equal
  sizes. Qwen1.5-MoE, DBRX: copies in tests of other systems.
- DeepSeek-V2: a copy of a later release with mscale=1.0. Issue 7118 of ggml-org/llama.cpp quotes
  0.707 from the first release; this is the 0.0707 of the paper, sec. 3.1.4.
- Llama 4 Scout: a copy of the base model, with other rotary scaling and a shorter context than
  the instruct model here. Phi-3.5-MoE: the scales and the first eight factors.
- Switch: flaxformer's t5x/configs/moe, as converted by transformers itself; T5 by its
  defaults.
- Llama 4 Maverick: the file with two layers, in the tests of TensorRT-LLM.
- OLMoE: sizes and loss of configs/olmoe-8x1b-newhp-newds-cx5-fine1-normreorder.yml of
  allenai/OLMoE, a training run of the same sizes, which does not state epsilon and theta.
- Granite 3.1: a copy in the tests of another project, which checks its revisions against it.
- Not found: the context of the first Qwen3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs.phi_moe import LONG, SHORT


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
      total: parameters, including any selection biases.
      active: parameters per token: with both embeddings, without the input embedding, without any.
      settings: the config.json of the released weights, without settings that affect no output;
        None if there is none.
    """

    total: int
    active: tuple[int, int, int]
    settings: Mapping[str, Any] | None = None


MIXTRAL = {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X22B = {
    **MIXTRAL, "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
    "num_attention_heads": 48, "num_hidden_layers": 56, "router_aux_loss_coef": 0.001,
    "vocab_size": 32768,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
        "original_max_position_embeddings": 4096, "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
GPT_OSS_120B = {
    **GPT_OSS, "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_hidden_layers": 36, "num_local_experts": 128,
}  # fmt: skip
JAMBA = {
    "model_type": "jamba", "attn_layer_offset": 4, "attn_layer_period": 8,
    "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16,
    "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_inner_layernorms": True,
    "mamba_proj_bias": False, "max_position_embeddings": 262144, "num_attention_heads": 32,
    "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 65536,
}  # fmt: skip
LLAMA4 = {
    "attention_bias": False, "attention_chunk_size": 8192, "attn_scale": 0.1,
    "attn_temperature_tuning": True, "floor_scale": 8192, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760,
    "model_type": "llama4_text", "no_rope_layers": [1, 1, 1, 0] * 12, "num_attention_heads": 40,
    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
    "num_local_experts": 16, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "use_qk_norm": True,
    "vocab_size": 202048,
}  # fmt: skip
MAVERICK = {
    **LLAMA4, "interleave_moe_layer_step": 2, "max_position_embeddings": 1048576,
    "moe_layers": list(range(1, 48, 2)), "num_local_experts": 128, "rope_scaling": None,
    "use_qk_norm": False,
}  # fmt: skip
PHI_MOE = {
    "model_type": "phimoe", "attention_bias": True, "hidden_act": "silu", "hidden_size": 4096,
    "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": list(LONG), "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096, "short_factor": list(SHORT),
        "short_mscale": 1.243163121016122, "type": "longrope",
    },
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01,
    "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 32064,
}  # fmt: skip
GROK1 = {
    "model_type": "grok-1", "attn_output_multiplier": 0.08838834764831845,
    "embedding_multiplier_scale": 78.38367176906169, "hidden_size": 6144,
    "intermediate_size": 32768, "max_attn_value": 30.0, "max_position_embeddings": 8192,
    "num_attention_heads": 48, "num_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 64, "num_key_value_heads": 8,
    "output_multiplier_scale": 0.5773502691896257, "rms_norm_eps": 1e-05,
    "router_aux_loss_coef": 0.001, "tie_word_embeddings": True, "vocab_size": 131072,
}  # fmt: skip

DEEPSEEK_YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
DEEPSEEK_V2 = {
    "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128,
    "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": DEEPSEEK_YARN, "rope_theta": 10000, "routed_scaling_factor": 16.0,
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 3,
    "topk_method": "group_limited_greedy", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1,
    "topk_method": "greedy",
}  # fmt: skip
DEEPSEEK_V3 = {
    **DEEPSEEK_V2, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
    "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip

QWEN3_MOE = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_235B = {
    **QWEN3_MOE, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_attention_heads": 64, "num_hidden_layers": 94,
}  # fmt: skip
QWEN2_MOE = {
    "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
    "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GRANITE = {
    "model_type": "granitemoe", "attention_bias": False, "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 131072,
    "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1500000.0,
    "router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "vocab_size": 49155,
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
}  # fmt: skip
DBRX = {
    "model_type": "dbrx", "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "d_model": 6144, "ffn_config": {"ffn_hidden_size": 10752, "moe_jitter_eps": 0,
    "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4}, "max_seq_len": 32768,
    "n_heads": 48, "n_layers": 40, "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip

SWITCH = {
    "model_type": "switch_transformers", "d_ff": 3072, "d_kv": 64, "d_model": 768,
    "dense_act_fn": "relu", "expert_capacity": 64, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "num_decoder_layers": 12, "num_experts": 8, "num_heads": 12,
    "num_layers": 12, "num_selected_experts": 1, "num_sparse_decoder_layers": 6,
    "num_sparse_encoder_layers": 6, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "router_aux_loss_coef": 0.001, "router_bias": False,
    "router_dtype": "float32", "router_z_loss_coef": 0.001, "tie_word_embeddings": True,
    "vocab_size": 32128,
}  # fmt: skip
SWITCH_LARGE = {
    **SWITCH, "d_ff": 4096, "d_model": 1024, "num_decoder_layers": 24, "num_experts": 128,
    "num_heads": 16, "num_layers": 24, "num_sparse_decoder_layers": 12,
    "num_sparse_encoder_layers": 12,
}  # fmt: skip
T5_BASE = {
    "model_type": "t5", "d_ff": 3072, "d_kv": 64, "d_model": 768, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "n_positions": 512, "num_heads": 12, "num_layers": 12,
    "relative_attention_num_buckets": 32, "vocab_size": 32128,
}  # fmt: skip

# Keyed by config file and preset.
MODELS = {
    "granite_moe": Published(1_334_628_352, (428_658_688, 428_658_688, 378_323_968), GRANITE),
    "granite_moe:3b": Published(3_298_793_472, (882_874_368, 882_874_368, 807_372_288)),
    "olmoe": Published(6_919_161_856, (1_282_017_280, 1_178_994_688, 1_075_972_096), OLMOE),
    "dbrx": Published(131_596_523_520, (36_469_708_800, 35_853_146_112, 35_236_583_424), DBRX),
    "qwen2_moe": Published(
        14_315_784_192, (2_689_173_504, 2_378_008_576, 2_066_843_648), QWEN2_MOE
    ),
    "qwen3_moe": Published(
        30_532_122_624, (3_353_032_704, 3_041_867_776, 2_730_702_848), QWEN3_MOE
    ),
    "qwen3_moe:235b": Published(
        235_093_634_560, (22_190_763_520, 21_568_433_664, 20_946_103_808), QWEN3_235B
    ),
    "gpt_oss": Published(20_914_757_184, (4_187_440_704, 3_608_307_264, 3_029_173_824), GPT_OSS),
    "gpt_oss:120b": Published(
        116_829_156_672, (5_711_982_912, 5_132_849_472, 4_553_716_032), GPT_OSS_120B
    ),
    "gpt4_rumour": Published(
        1_862_653_900_800, (548_944_435_200, 548_944_435_200, 547_403_028_480)
    ),
    "grok1": Published(315_684_820_992, (83_756_587_008, 83_756_587_008, 82_951_280_640), GROK1),
    "jamba": Published(51_570_323_328, (12_110_311_296, 11_841_875_840, 11_573_440_384), JAMBA),
    "llama4": Published(107_769_861_120, (17_172_894_720, 16_138_408_960, 15_103_923_200), LLAMA4),
    "llama4:maverick": Published(
        400_711_848_960, (17_184_691_200, 16_150_205_440, 15_115_719_680), MAVERICK
    ),
    "phi_moe": Published(41_873_153_344, (6_640_999_744, 6_509_665_600, 6_378_299_392), PHI_MOE),
    "deepseek_v2": Published(
        235_741_434_880, (21_375_800_320, 20_851_512_320, 20_327_224_320), DEEPSEEK_V2
    ),
    "deepseek_v2:lite": Published(
        15_706_484_224, (2_661_150_208, 2_451_435_008, 2_241_719_808), DEEPSEEK_V2_LITE
    ),
    # Includes the multi-token module, which generation does not use.
    "deepseek_v3": Published(
        671_026_419_200 + 11_610_068_224,
        (37_552_282_624, 36_625_603_584, 35_698_924_544),
        DEEPSEEK_V3,
    ),
    "mixtral": Published(46_702_792_704, (12_879_925_248, 12_748_853_248, 12_617_781_248), MIXTRAL),
    "mixtral:8x22b": Published(
        140_630_071_296, (39_161_468_928, 38_960_142_336, 38_758_815_744), MIXTRAL_8X22B
    ),
    "switch_base": Published(619_339_008, (222_977_280, 222_977_280, 198_302_976), SWITCH),
    "switch_base:e16": Published(
        1_072_397_568, (223_051_008, 223_051_008, 198_376_704), {**SWITCH, "num_experts": 16}
    ),
    "switch_base:e32": Published(
        1_978_514_688, (223_198_464, 223_198_464, 198_524_160), {**SWITCH, "num_experts": 32}
    ),
    "switch_base:e64": Published(
        3_790_748_928, (223_493_376, 223_493_376, 198_819_072), {**SWITCH, "num_experts": 64}
    ),
    "switch_base:e128": Published(
        7_415_217_408, (224_083_200, 224_083_200, 199_408_896), {**SWITCH, "num_experts": 128}
    ),
    "switch_base:e256": Published(
        14_664_154_368, (225_262_848, 225_262_848, 200_588_544), {**SWITCH, "num_experts": 256}
    ),
    "switch_base:dense": Published(222_903_552, (222_903_552, 222_903_552, 198_229_248), T5_BASE),
    "switch_large": Published(
        26_309_291_008, (740_813_824, 740_813_824, 707_914_752), SWITCH_LARGE
    ),
    "switch_large:dense": Published(737_668_096, (737_668_096, 737_668_096, 704_769_024)),
    "switch_xxl": Published(394_675_073_024, (11_147_915_264, 11_016_318_976, 10_884_722_688)),
    "switch_xxl:dense": Published(11_135_332_352, (11_135_332_352, 11_003_736_064, 10_872_139_776)),
    "switch_c": Published(1_571_375_798_688, (1_795_152_288, 1_728_326_048, 1_661_499_808)),
    "st_moe": Published(4_105_444_352, (991_173_632, 958_274_560, 925_375_488)),
    "st_moe:32b": Published(269_104_613_376, (35_062_450_176, 34_897_954_816, 34_733_459_456)),
}
