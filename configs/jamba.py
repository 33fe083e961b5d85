"""Jamba-v0.1: Mamba, attention in every eighth layer, experts in every second, no positions.

In each group of eight layers the fifth has attention. Mamba has norms of dt, B and C. The two
gates come from a softmax over all sixteen experts, not renormalised. Source: Lieber et al. 2024,
arXiv:2403.19887; config.json of ai21labs/Jamba-v0.1.

    python -m moe_jax.train --config=configs/jamba.py:tiny --workdir=runs/jamba_tiny
    python -m moe_jax.plan --config=configs/jamba.py --topology=h100:32x8

| layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- |
| 32 of 4,096 | 51,570,323,328 | 12,110,311,296 | 11,841,875,840 | 11,573,440,384 |

Training settings are not published: optimizer, batch and mesh are taken from models of similar
size.
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
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.mamba import Mamba
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE

EXPERTS = MoE(
    num_experts=16,
    num_selected_experts=2,
    expert_dim=14_336,
    activation=SwiGLU(),
    losses=(HuggingFaceLoadBalance(weight=0.001),),
    capacity=Capacity(eval_factor=0.0),
)
MIXERS = ("mamba", "mamba", "mamba", "mamba", "attention", "mamba", "mamba", "mamba")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Jamba-v0.1; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="jamba",
            model=LanguageModel(
                vocab_size=65_536,
                model_dim=4096,
                parts={
                    "attention": Attention(num_heads=32, num_kv_heads=8, head_dim=128, rotary=None),
                    "mamba": Mamba(dt_rank=256, inner_norms=True),
                    "mlp": Mlp(dim=14_336, activation=SwiGLU()),
                    "moe": EXPERTS,
                },
                stack=StackLayout(
                    unit=tuple(zip(MIXERS, ("mlp", "moe") * 4, strict=True)), repeats=4
                ),
                norm=RMSNorm(1e-6),
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
    make_smaller(config, presets)
    return config
