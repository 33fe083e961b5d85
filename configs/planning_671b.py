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

from configs.base import make_smoke, parse_presets
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
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice

ROUTER = TokenChoice(
    score=Sigmoid(),
    renormalize=True,
    scaling_factor=2.5,
    groups=ExpertGroups(num_groups=8, num_selected=4, worth="top2_sum"),
)
EXPERTS = MoE(
    num_experts=256,
    num_selected_experts=8,
    expert_dim=2048,
    shared_expert_dim=2048,
    activation=SwiGLU(),
    router=ROUTER,
    losses=(LoadBalance(weight=1e-4, scope="sequence"), RouterZ()),
    bias=SignUpdate(rate=1e-3),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The model; presets: smoke."""
    presets = parse_presets(arg)
    config = config_dict(
        ExperimentConfig(
            name="planning_671b",
            model=LanguageModel(
                vocab_size=129_280,
                model_dim=7168,
                parts={
                    "attention": Attention(num_heads=128, num_kv_heads=8, head_dim=128),
                    "mlp": Mlp(dim=18_432, activation=SwiGLU()),
                    "moe": EXPERTS,
                },
                stack=StackLayout(
                    first=(("attention", "mlp"),) * 3, unit=(("attention", "moe"),), repeats=58
                ),
                tie_embeddings=False,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=500_000, batch_size=2048),  # 8.4 M tokens a step
            mesh=MeshConfig(data=1, fsdp=32, expert=64),
        )
    )
    if "smoke" in presets:
        make_smoke(config)
    return config
