"""Granite 3.1 1B-A400M and 3B-A800M: small experts, a tied head, and four multipliers.

Embeddings are multiplied by 12, residual branches by 0.22, scores by 1 / 64 instead of 1 / 8, and
logits are divided by 6. In every layer a token uses 8 experts with renormalised gates. Source: IBM
2024; config.json of ibm-granite/granite-3.1-1b-a400m-instruct, and the sizes of the 3B in its
README. No released model has the shared expert of the preset `shared`, which transformers calls
GraniteMoeShared; its width is assumed.

    python -m moe_jax.train --config=configs/granite_moe.py:tiny --workdir=runs/granite_moe_tiny
    python -m moe_jax.plan --config=configs/granite_moe.py --topology=h100:4x8

| preset | layers | total | active | without embeddings |
| --- | --- | --- | --- | --- |
| (none) | 24 of 1,024 | 1,334,628,352 | 428,658,688 | 378,323,968 |
| 3b | 32 of 1,536 | 3,298,793,472 | 882,874,368 | 807,372,288 |

The embedding is also the head. Training settings are published in part ("Granite 3.0 Language
Models", sec. 2): training drops no token and uses a balance loss and a z-loss, without their
weights. Here the balance loss has transformers' default weight for the family, and there is no
z-loss. Optimizer, batch and mesh are taken from models of similar size.
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

ATTENTION = Attention(
    num_heads=16, num_kv_heads=8, head_dim=64, scale=1 / 64, rotary=Rotary(base=1.5e6)
)
EXPERTS = MoE(
    num_experts=32,
    num_selected_experts=8,
    expert_dim=512,
    activation=SwiGLU(),
    router=TokenChoice(renormalize=True),
    losses=(HuggingFaceLoadBalance(weight=0.001),),
    capacity=Capacity(train_factor=0.0, eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Granite 3.1 1B-A400M; presets: 3b, shared, tiny, smoke."""
    presets = parse_presets(arg, {"3b", "shared", "tiny"})
    config = config_dict(
        ExperimentConfig(
            name="granite_moe",
            model=LanguageModel(
                vocab_size=49_155,
                model_dim=1024,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=24),
                norm=RMSNorm(1e-6),
                residual_multiplier=0.22,
                embedding_multiplier=12.0,
                logits_multiplier=1 / 6,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=500_000, batch_size=1024, num_microbatches=8),
            mesh=MeshConfig(data=1, fsdp=-1),
        )
    )
    if "3b" in presets:
        config.name = "granite_moe_3b"
        config.model.model_dim, config.model.stack.repeats = 1536, 32
        config.model.parts.attention.num_heads, config.model.parts.moe.num_experts = 24, 40
    if "shared" in presets:
        config.name += "_shared"
        config.model.parts.moe.shared_expert_dim = 1024
    make_smaller(config, presets)
    if "tiny" in presets:
        config.optimizer.learning_rate = 1e-2  # residual and logit multipliers are below 1
    return config
