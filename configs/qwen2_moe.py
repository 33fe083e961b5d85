"""Qwen1.5-MoE-A2.7B: four of 60 experts, and a gated shared expert of four times their size.

Gates are not renormalised; queries, keys and values have biases. Source: Qwen team 2024, "Qwen1.5-
MoE"; config.json of Qwen/Qwen1.5-MoE-A2.7B. 14,315,784,192 parameters; a token uses 2,689,173,504,
2,378,008,576 without the input embedding, 2,066,843,648 without embeddings. Training settings are
not published.

    python -m moe_jax.train --config=configs/qwen2_moe.py:tiny --workdir=runs/qwen2_moe_tiny
    python -m moe_jax.plan --config=configs/qwen2_moe.py --topology=h100:32x8
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

ATTENTION = Attention(
    num_heads=16, num_kv_heads=16, head_dim=128, biases=("q", "k", "v"), rotary=Rotary(base=1e6)
)
EXPERTS = MoE(
    num_experts=60,
    num_selected_experts=4,
    expert_dim=1408,
    shared_expert_dim=5632,
    shared_expert_gate=True,
    activation=SwiGLU(),
    losses=(HuggingFaceLoadBalance(weight=0.001),),
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Qwen1.5-MoE-A2.7B; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="qwen2_moe",
            model=LanguageModel(
                vocab_size=151_936,
                model_dim=2048,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=24),
                norm=RMSNorm(1e-6),
                tie_embeddings=False,
                embedding_multiplier=1.0,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=500_000, batch_size=1024),
            mesh=MeshConfig(data=1, fsdp=-1, expert=4),
        )
    )
    make_smaller(config, presets)
    return config
