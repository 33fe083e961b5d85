"""A decoder of the shape of DeepSeek-V3, 675B parameters, to be planned; not to be trained here.

61 layers of 7,168 dims and 128 heads; the first three with a dense SwiGLU of 18,432, the other 58
with 256 SwiGLU experts of 2,048, eight for each token, and a shared one; sigmoid scores, groups of
experts, loss-free balancing; 129,280 tokens, an untied head. Its latent attention is not here yet:
grouped queries with 8 key-value heads of 128 stand for it, 15.2B parameters in place of 11.4B,
674.8B in all in place of 671.0B. Source: DeepSeek-AI 2024, arXiv:2412.19437, sec. 4.2.

    python -m moe_jax.plan --config=configs/planning_671b.py --topology=v5p:8x16x16
    python -m moe_jax.train --config=configs/planning_671b.py:smoke --workdir=runs/planning_smoke

The mesh is for 2,048 chips: parameters and moments over fsdp 32, experts over 64 as well.
docs/planning.md shows the plan.
"""

import ml_collections

from configs.base import default_config, make_smoke, parse_presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The model; presets: smoke."""
    presets = parse_presets(arg)
    config = default_config()
    config.name = "planning_671b"

    model = config.model
    model.vocab_size, model.num_layers, model.model_dim = 129_280, 61, 7168
    model.num_heads, model.num_kv_heads, model.head_dim = 128, 8, 128
    model.ffn_dim, model.activation = 18_432, "swiglu"
    model.tie_embeddings = False
    model.compute_dtype, model.remat = "bfloat16", "full"
    moe = model.moe
    moe.num_experts, moe.num_selected_experts, moe.expert_dim = 256, 8, 2048
    moe.num_shared_experts, moe.num_dense_first, moe.activation = 1, 3, "swiglu"
    router = moe.router
    router.score, router.renormalize, router.scaling_factor = "sigmoid", True, 2.5
    router.num_expert_groups, router.num_selected_groups = 8, 4
    router.group_score = "top2_sum"
    moe.balance.bias_update_rate, moe.balance.load_balance_weight = 1e-3, 1e-4
    moe.balance.load_balance_scope = "sequence"

    config.data.sequence_length = 4096
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 2.2e-4, 2000
    training = config.training
    training.num_steps, training.batch_size = 500_000, 2048  # 8.4 M tokens a step
    config.mesh.data, config.mesh.fsdp, config.mesh.expert = 1, 32, 64

    if "smoke" in presets:
        make_smoke(config)
        router.num_expert_groups, router.num_selected_groups = 2, 1
        config.mesh.data, config.mesh.fsdp, config.mesh.expert = -1, 1, 1
    return config
