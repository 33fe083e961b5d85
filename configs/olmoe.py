"""OLMoE-1B-7B: 16 layers of 64 small experts, 8 per token; gates are not renormalised.

Queries and keys are normalised over all heads at once. Source: Muennighoff et al. 2024,
arXiv:2409.02060; config.json of allenai/OLMoE-1B-7B-0924; configs/ of allenai/OLMoE.
6,919,161,856 parameters; a token uses 1,282,017,280, 1,178,994,688 without the input embedding,
1,075,972,096 without embeddings.

Peak learning rate, batch and loss weights are those of its pre-training, which drops no token.
MegaBlocks divides both losses by layers, tokens and K: the balance loss is 1 at uniform routing,
and a z-loss weight of 1e-3 equals 1.25e-4 in the paper's z-loss. MegaBlocks balances the tokens of
a device; here the balance loss is over the global batch. Differences from the paper: weight decay
excludes embeddings and norms; the scale of initial weights depends on fan-in, where the paper's
all have a truncated normal of 0.02.

    python -m moe_jax.train --config=configs/olmoe.py:tiny --workdir=runs/olmoe_tiny
    python -m moe_jax.plan --config=configs/olmoe.py --topology=h100:32x8
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
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE

NORM = RMSNorm(1e-5)
ATTENTION = Attention(
    num_heads=16, num_kv_heads=16, head_dim=128, qk_norm=NORM, qk_norm_at="projection"
)
EXPERTS = MoE(
    num_experts=64,
    num_selected_experts=8,
    expert_dim=1024,
    activation=SwiGLU(),
    losses=(LoadBalance(weight=0.01), RouterZ(weight=0.001 / 8)),
    capacity=Capacity(train_factor=0.0, eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """OLMoE-1B-7B; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="olmoe",
            model=LanguageModel(
                vocab_size=50_304,
                model_dim=2048,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=16),
                norm=NORM,
                tie_embeddings=False,
                embedding_multiplier=1.0,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2500),
            training=TrainingConfig(num_steps=1_220_000, batch_size=1024),
            mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        )
    )
    make_smaller(config, presets)
    return config
