"""Qwen3-30B-A3B and 235B-A22B: eight of 128 experts, a norm on each head's query and key.

Source: Qwen team 2025, arXiv:2505.09388; config.json of Qwen/Qwen3-30B-A3B and 235B-A22B.

    python -m moe_jax.train --config=configs/qwen3_moe.py:tiny --workdir=runs/qwen3_moe_tiny
    python -m moe_jax.plan --config=configs/qwen3_moe.py --topology=h100:64x8

| preset | layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- | --- |
| (none) | 48 of 2,048 | 30,532,122,624 | 3,353,032,704 | 3,041,867,776 | 2,730,702,848 |
| 235b | 94 of 4,096 | 235,093,634,560 | 22,190,763,520 | 21,568,433,664 | 20,946,103,808 |

Optimizer, batch and mesh are not published. The balance loss is over the global batch, as in Qwen's
training. It is transformers' form, which pools the layers; Qwen's, in Megatron, is per layer (Qiu
et al. 2025, arXiv:2501.11873).
"""

import ml_collections

from configs.base import make_smaller, parse_presets
from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    config_dict,
)
from moe_jax.layers.attention import Attention
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

NORM = RMSNorm(1e-6)
ATTENTION = Attention(
    num_heads=32, num_kv_heads=4, head_dim=128, qk_norm=NORM, rotary=Rotary(base=1e6)
)
EXPERTS = MoE(
    num_experts=128,
    num_selected_experts=8,
    expert_dim=768,
    activation=SwiGLU(),
    router=TokenChoice(renormalize=True),
    losses=(HuggingFaceLoadBalance(weight=0.001),),
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Qwen3-30B-A3B; presets: 235b, tiny, smoke."""
    presets = parse_presets(arg, {"235b", "tiny"})
    config = config_dict(
        ExperimentConfig(
            name="qwen3_moe",
            model=LanguageModel(
                vocab_size=151_936,
                model_dim=2048,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=48),
                norm=NORM,
                tie_embeddings=False,
                embedding_multiplier=1.0,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=500_000, batch_size=1024),
            mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        )
    )
    if "235b" in presets:
        config.name = "qwen3_moe_235b"
        model, parts = config.model, config.model.parts
        model.model_dim, model.stack.repeats = 4096, 94
        parts.attention.num_heads, parts.moe.expert_dim = 64, 1536
    make_smaller(config, presets)
    return config
