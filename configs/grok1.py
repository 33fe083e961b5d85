"""Grok-1: norms before and after every branch, capped scores, two of eight tanh GEGLU experts.

The gates are a softmax over all experts, not renormalised. Scores times 128**-0.5 are capped at 30.
Embeddings are multiplied by 6,144**0.5, and logits by 3**-0.5. Source: `model.py` and `run.py` of
xai-org/grok-1; names and settings: config.json of hpcai-tech/grok-1.

    python -m moe_jax.train --config=configs/grok1.py:tiny --workdir=runs/grok1_tiny
    python -m moe_jax.plan --config=configs/grok1.py --topology=h100:128x8

| layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- |
| 64 of 6,144 | 315,684,820,992 | 83,756,587,008 | 83,756,587,008 | 82,951,280,640 |

The published size is 314 billion: 314,879,514,624 without the embedding, which is also the head.
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
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import GeGLUTanh
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE

ATTENTION = Attention(
    num_heads=48, num_kv_heads=8, head_dim=128, scale=0.08838834764831845, softcap=30.0
)
EXPERTS = MoE(
    num_experts=8,
    num_selected_experts=2,
    expert_dim=32_768,
    activation=GeGLUTanh(),
    losses=(HuggingFaceLoadBalance(weight=0.001),),
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Grok-1; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="grok1",
            model=LanguageModel(
                vocab_size=131_072,
                model_dim=6144,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=64),
                norm=RMSNorm(1e-5),
                norm_placement="sandwich",
                embedding_multiplier=78.38367176906169,
                logits_multiplier=0.5773502691896257,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=8192),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=500_000, batch_size=1024),
            mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        )
    )
    make_smaller(config, presets)
    return config
