"""DBRX: 40 layers, four of 16 experts, gates that sum to 1; clipped queries, keys and values.

LayerNorm has no bias. Source: config.json of databricks/dbrx-instruct, model code of
databricks/dbrx. 131,596,523,520 parameters; a token uses 36,469,708,800, 35,853,146,112 without
the input embedding, 35,236,583,424 without embeddings. Training settings are not published, except
the weight of the balance loss, 0.05. This is MegaBlocks' `moe_loss_weight`, for a loss per layer
that is 1 at uniform routing; transformers uses the same weight for a loss that is 4.

    python -m moe_jax.train --config=configs/dbrx.py:tiny --workdir=runs/dbrx_tiny
    python -m moe_jax.plan --config=configs/dbrx.py --topology=h100:32x8
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
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

ATTENTION = Attention(
    num_heads=48, num_kv_heads=8, head_dim=128, clip_qkv=8.0, rotary=Rotary(base=500_000.0)
)
EXPERTS = MoE(
    num_experts=16,
    num_selected_experts=4,
    expert_dim=10_752,
    activation=SwiGLU(),
    router=TokenChoice(renormalize=True),
    losses=(LoadBalance(weight=0.05),),
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """DBRX; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="dbrx",
            model=LanguageModel(
                vocab_size=100_352,
                model_dim=6144,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=40),
                norm=LayerNorm(1e-5, use_bias=False),
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
