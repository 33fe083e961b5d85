"""DeepSeek-V2 and V2-Lite: latent attention, fine-grained experts, groups of experts.

The first layer has a dense SwiGLU. The others have small SwiGLU experts, six per token, and two
shared experts, implemented as one of twice the width. Gates are softmax probabilities, not
renormalised. In V2 a token uses experts of three of eight groups, queries have a latent of their
own, and gates are multiplied by 16.

    python -m moe_jax.plan --config=configs/deepseek_v2.py --topology=v5p:8x8x8
    python -m moe_jax.train --config=configs/deepseek_v2.py:tiny --workdir=runs/deepseek_v2_tiny

| preset | layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- | --- |
| (none) | 60 of 5,120 | 235,741,434,880 | 21,375,800,320 | 20,851,512,320 | 20,327,224,320 |
| lite | 27 of 2,048 | 15,706,484,224 | 2,661,150,208 | 2,451,435,008 | 2,241,719,808 |

Source: DeepSeek-AI 2024, arXiv:2405.04434, sec. 2, 3.1 and appendix B; config.json of
deepseek-ai/DeepSeek-V2 and DeepSeek-V2-Lite, which stretch positions by YaRN (pre-training used
4,096 tokens and no YaRN). The balance losses of the layers are summed. Differences from the paper:

- only the balance loss over experts is used, of V2's three; tokens are dropped per expert, with an
  assumed capacity, not per device;
- the learning rate decays by a cosine to a tenth; in the paper it is multiplied by 0.316 after 60 %
  of the tokens (Lite: 80 %) and again after 90 %;
- the batch is always 9,216 sequences; V2's grows from 2,304 over the first 225B tokens;
- the scale of initial weights depends on fan-in; in the paper all have a standard deviation of
  0.006.
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
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import Yarn
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice

YARN = Yarn(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707)
ATTENTION = LatentAttention(
    num_heads=128,
    q_rank=1536,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    rotary=Rotary(interleaved=True, scaling=YARN),
)
EXPERTS = MoE(
    num_experts=160,
    num_selected_experts=6,
    expert_dim=1536,
    shared_expert_dim=2 * 1536,
    activation=SwiGLU(),
    router=TokenChoice(scaling_factor=16.0, groups=ExpertGroups(num_groups=8, num_selected=3)),
    losses=(LoadBalance(weight=0.003, over_layers="sum", scope="sequence"),),
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """DeepSeek-V2; presets: lite, tiny, smoke."""
    presets = parse_presets(arg, {"lite", "tiny"})
    config = config_dict(
        ExperimentConfig(
            name="deepseek_v2",
            model=LanguageModel(
                vocab_size=102_400,
                model_dim=5120,
                parts={
                    "attention": ATTENTION,
                    "mlp": Mlp(dim=12_288, activation=SwiGLU()),
                    "moe": EXPERTS,
                },
                stack=StackLayout(
                    first=(("attention", "mlp"),), unit=(("attention", "moe"),), repeats=59
                ),
                tie_embeddings=False,
                embedding_multiplier=1.0,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=2.4e-4, warmup_steps=2000),
            # 37.7 M tokens per step, 8.1 T in total
            training=TrainingConfig(num_steps=215_000, batch_size=9216, num_microbatches=18),
            mesh=MeshConfig(data=1, fsdp=16, expert=32),
        )
    )
    if "lite" in presets:
        make_lite(config)
    make_smaller(config, presets)
    return config


def make_lite(config: ml_collections.ConfigDict) -> None:
    """DeepSeek-V2-Lite."""
    config.name = "deepseek_v2_lite"
    model, parts = config.model, config.model.parts
    model.model_dim, model.stack.repeats, parts.mlp.dim = 2048, 26, 10_944
    parts.attention.num_heads, parts.attention.q_rank = 16, 0
    moe = parts.moe
    moe.num_experts, moe.expert_dim, moe.shared_expert_dim = 64, 1408, 2 * 1408
    moe.router.scaling_factor, moe.router.groups = 1.0, None
    moe.losses.load_balance.weight = 0.001
    config.optimizer.learning_rate = 4.2e-4
    config.training.num_steps, config.training.batch_size = 302_000, 4608  # 5.7 T tokens
    config.training.num_microbatches = 9
