"""Mixtral 8x7B and 8x22B: grouped queries, and two of eight experts in every layer.

Gates are a softmax over the two chosen logits. Source: Jiang et al. 2024, arXiv:2401.04088;
config.json of mistralai/Mixtral-8x7B-v0.1 and mistralai/Mixtral-8x22B-v0.1.

    python -m moe_jax.train --config=configs/mixtral.py:tiny --workdir=runs/mixtral_tiny
    python -m moe_jax.plan --config=configs/mixtral.py --topology=h100:32x8

| preset | layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- | --- |
| (none) | 32 of 4,096 | 46,702,792,704 | 12,879,925,248 | 12,748,853,248 | 12,617,781,248 |
| 8x22b | 56 of 6,144 | 140,630,071,296 | 39,161,468,928 | 38,960,142,336 | 38,758,815,744 |

The first release of 8x22B has a vocabulary of 32,000 and 140,620,634,112 parameters. Training
settings are not published: optimizer, batch and mesh are taken from models of similar size.
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

ATTENTION = Attention(num_heads=32, num_kv_heads=8, head_dim=128, rotary=Rotary(base=1e6))
EXPERTS = MoE(
    num_experts=8,
    num_selected_experts=2,
    expert_dim=14_336,
    activation=SwiGLU(),
    router=TokenChoice(renormalize=True),
    losses=(HuggingFaceLoadBalance(weight=0.02),),
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Mixtral 8x7B; presets: 8x22b, tiny, smoke."""
    presets = parse_presets(arg, {"8x22b", "tiny"})
    config = config_dict(
        ExperimentConfig(
            name="mixtral",
            model=LanguageModel(
                vocab_size=32_000,
                model_dim=4096,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=32),
                norm=RMSNorm(1e-5),
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
    if "8x22b" in presets:
        config.name = "mixtral_8x22b"
        model, parts = config.model, config.model.parts
        model.vocab_size, model.model_dim, model.stack.repeats = 32_768, 6144, 56
        parts.attention.num_heads, parts.moe.expert_dim = 48, 16_384
        parts.moe.losses.huggingface_load_balance.weight = 0.001
    make_smaller(config, presets)
    return config
