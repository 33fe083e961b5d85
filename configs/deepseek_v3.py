"""DeepSeek-V3: latent attention, 256 small experts balanced by a bias, multi-token prediction.

61 layers of 7,168 dims and 128 heads. The first three have a dense SwiGLU; the other 58 have 256
SwiGLU experts, eight per token, and a shared expert. Scores are sigmoids. A token uses four of
eight groups of experts. A selection bias balances the loads, with a weak loss per sequence. One
module predicts the token after the next.

    python -m moe_jax.plan --config=configs/deepseek_v3.py --topology=v5p:8x16x16
    python -m moe_jax.train --config=configs/deepseek_v3.py:tiny --workdir=runs/deepseek_v3_tiny

| | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- |
| of the model | 671,026,419,200 | 37,552,282,624 | 36,625,603,584 | 35,698,924,544 |
| of the module | 11,610,068,224 | | | |

The total includes the selection biases, 256 in each of 58 layers. The module runs only in training.

Source: DeepSeek-AI 2024, arXiv:2412.19437, sec. 2 and 4.2; config.json of deepseek-ai/DeepSeek-V3,
which stretches positions by YaRN (pre-training used 4,096 tokens and no YaRN). The mesh is for
2,048 chips; docs/planning.md shows the plan.

As published: no token is dropped, the balance losses of the layers are summed (the module counts as
one layer), and the rates of the bias. Differences from the paper:

- a step has 2,048 sequences; the paper's grow from 3,072 to 15,360 over the first 469B tokens;
- the learning rate decays by one cosine to a tenth; the paper's stays at 2.2e-4 up to 10T tokens,
  decays by a cosine to 2.2e-5 over 4.3T, stays there for 333B, and is 7.3e-6 for the last 167B;
- the module always has weight 0.3; in the paper it has 0.1 after 10T tokens;
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
from moe_jax.models.multi_token import MultiToken
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice

ATTENTION = LatentAttention(
    num_heads=128,
    q_rank=1536,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    rotary=Rotary(
        interleaved=True,
        scaling=Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
    ),
)
EXPERTS = MoE(
    num_experts=256,
    num_selected_experts=8,
    expert_dim=2048,
    shared_expert_dim=2048,
    activation=SwiGLU(),
    router=TokenChoice(
        score=Sigmoid(),
        renormalize=True,
        scaling_factor=2.5,
        groups=ExpertGroups(num_groups=8, num_selected=4, worth="top2_sum"),
    ),
    losses=(LoadBalance(weight=1e-4, over_layers="sum", scope="sequence"),),
    bias=SignUpdate(rate=1e-3, frozen_fraction=0.034),  # no updates in the last 500B of 14.8T
    capacity=Capacity(train_factor=0.0, eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The model; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="deepseek_v3",
            model=LanguageModel(
                vocab_size=129_280,
                model_dim=7168,
                parts={
                    "attention": ATTENTION,
                    "mlp": Mlp(dim=18_432, activation=SwiGLU()),
                    "moe": EXPERTS,
                },
                stack=StackLayout(
                    first=(("attention", "mlp"),) * 3, unit=(("attention", "moe"),), repeats=58
                ),
                tie_embeddings=False,
                embedding_multiplier=1.0,
                multi_token=MultiToken(weight=0.3),
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=1_760_000, batch_size=2048),  # 8.4 M tokens per step
            mesh=MeshConfig(data=1, fsdp=32, expert=64),
        )
    )
    make_smaller(config, presets)
    return config
