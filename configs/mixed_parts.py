"""Parts that no published model combines, by config only: no new class and no new branch.

Three of four layers have DeepSeek's latent attention; the fourth has Mamba. In every layer the
experts choose their tokens. A token's experts then depend on later tokens, which the stack has to
allow. In evaluation and generation a predictor replaces the choice, so both are causal. A shared
expert processes every token.

    python -m moe_jax.train --config=configs/mixed_parts.py:tiny --workdir=runs/mixed_parts_tiny
    python -m moe_jax.plan --config=configs/mixed_parts.py --topology=h100:1x8

Sources: latent attention: DeepSeek-AI 2024, arXiv:2405.04434; expert choice: Zhou et al. 2022,
arXiv:2202.09368; predictor: Raposo et al. 2024, arXiv:2404.02258; Mamba: Gu and Dao 2023,
arXiv:2312.00752.
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
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.mamba import Mamba
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.expert_choice import ExpertChoice

EXPERTS = MoE(
    num_experts=16,
    num_selected_experts=2,
    expert_dim=1024,
    shared_expert_dim=1024,
    activation=SwiGLU(),
    router=ExpertChoice(predictor_loss_weight=0.01),
    losses=(),  # expert choice balances the loads
    capacity=Capacity(train_factor=1.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A mixture of parts; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="mixed_parts",
            model=LanguageModel(
                vocab_size=32_000,
                model_dim=1024,
                parts={
                    "latent": LatentAttention(
                        num_heads=16, kv_rank=256, nope_dim=64, rope_dim=32, value_dim=64
                    ),
                    "mamba": Mamba(inner_norms=True),
                    "moe": EXPERTS,
                },
                stack=StackLayout(
                    unit=(*((("latent", "moe"),) * 3), ("mamba", "moe")),
                    repeats=6,
                    allow_lookahead=True,
                ),
                compute_dtype="bfloat16",
                remat="full",  # without it a step needs three times the memory of eight H100
            ),
            data=DataConfig(sequence_length=2048),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=100_000, batch_size=512),
            mesh=MeshConfig(data=-1, fsdp=1, expert=8),
        )
    )
    make_smaller(config, presets)
    return config
