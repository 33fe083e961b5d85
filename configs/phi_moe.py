"""Phi-3.5-MoE: LayerNorm, biases throughout, and two of sixteen experts chosen by SparseMixer.

The gate of each choice is a softmax over the experts with logits close to the best; in training the
choice is sampled. Every pair of features has its own stretch of positions, and another in documents
of more than 4,096 tokens (LongRoPE). Source: Abdin et al. 2024, arXiv:2404.14219; Liu et al. 2024,
arXiv:2409.12136; config.json of microsoft/Phi-3.5-MoE-instruct.

    python -m moe_jax.train --config=configs/phi_moe.py:tiny --workdir=runs/phi_moe_tiny
    python -m moe_jax.plan --config=configs/phi_moe.py --topology=h100:32x8

| layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- |
| 32 of 4,096 | 41,873,153,344 | 6,640,999,744 | 6,509,665,600 | 6,378,299,392 |

The published sizes are 41.9 and 6.6 billion. Training settings are published in part: optimizer,
batch and mesh are taken from models of similar size. Liu et al. (sec. 3.3) drop no token and
balance each layer over the global batch, with an unpublished weight; the 0.0 of config.json is for
fine-tuning.
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
from moe_jax.layers.rotary_scaling import LongRope
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.noise import Jitter
from moe_jax.moe.routing.sparse_mixer import SparseMixer

# One factor per pair of features.
SHORT = (
    1.0, 1.0399999618530273, 1.0399999618530273, 1.0399999618530273, 1.0499999523162842,
    1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0499999523162842,
    1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0499999523162842,
    1.0499999523162842, 1.059999942779541, 1.059999942779541, 1.0699999332427979,
    1.0699999332427979, 1.0699999332427979, 1.0699999332427979, 1.1399999856948853,
    1.159999966621399, 1.159999966621399, 1.159999966621399, 1.159999966621399,
    1.1799999475479126, 1.1999999284744263, 1.3199999332427979, 1.3399999141693115,
    1.3499999046325684, 1.3999998569488525, 1.4799998998641968, 1.4999998807907104,
    1.589999794960022, 1.6499998569488525, 1.71999990940094, 1.8999998569488525,
    1.9099998474121094, 1.9099998474121094, 1.9899998903274536, 1.9999998807907104,
    1.9999998807907104, 2.009999990463257, 2.009999990463257, 2.009999990463257,
    2.009999990463257, 2.009999990463257, 2.009999990463257, 2.009999990463257,
    2.009999990463257, 2.009999990463257, 2.009999990463257, 2.009999990463257,
    2.009999990463257, 2.009999990463257, 2.009999990463257, 2.009999990463257,
    2.009999990463257, 2.009999990463257, 2.0999999046325684, 2.319999933242798,
    2.419999837875366, 2.5899999141693115, 2.7899999618530273,
)  # fmt: skip
LONG = (
    1.0199999809265137, 1.0299999713897705, 1.0399999618530273, 1.0499999523162842,
    1.0499999523162842, 1.0499999523162842, 1.059999942779541, 1.059999942779541,
    1.059999942779541, 1.059999942779541, 1.059999942779541, 1.059999942779541,
    1.0999999046325684, 1.1799999475479126, 1.1799999475479126, 1.3700000047683716,
    1.4899998903274536, 2.109999895095825, 2.8899998664855957, 3.9499998092651367,
    4.299999713897705, 6.429999828338623, 8.09000015258789, 10.690000534057617,
    12.050000190734863, 18.229999542236328, 18.84000015258789, 19.899999618530273,
    21.420000076293945, 26.200000762939453, 34.28000259399414, 34.590003967285156,
    38.730003356933594, 40.22000503540039, 42.54000473022461, 44.000003814697266,
    47.590003967285156, 54.750003814697266, 56.19000244140625, 57.44000244140625,
    57.4900016784668, 61.20000076293945, 61.540000915527344, 61.75, 61.779998779296875,
    62.06999969482422, 63.11000061035156, 63.43000030517578, 63.560001373291016,
    63.71000289916992, 63.92000198364258, 63.94000244140625, 63.94000244140625,
    63.96000289916992, 63.980003356933594, 64.0300064086914, 64.0300064086914, 64.0300064086914,
    64.04000854492188, 64.10000610351562, 64.19000244140625, 64.20999908447266, 64.75,
    64.95999908447266,
)  # fmt: skip
SCALING = LongRope(
    short_factors=SHORT,
    long_factors=LONG,
    original_length=4096,
    factor=32.0,
    attention_factor=1.243163121016122,
)
ATTENTION = Attention(
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    biases=("q", "k", "v", "o"),
    rotary=Rotary(scaling=SCALING),
    window=131_072,
)
EXPERTS = MoE(
    num_experts=16,
    num_selected_experts=2,
    expert_dim=6400,
    activation=SwiGLU(),
    router=SparseMixer(jitter=0.01, noise=(Jitter(0.01),)),
    losses=(LoadBalance(weight=0.01),),  # assumed
    capacity=Capacity(train_factor=0.0, eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Phi-3.5-MoE; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="phi_moe",
            model=LanguageModel(
                vocab_size=32_064,
                model_dim=4096,
                parts={"attention": ATTENTION, "moe": EXPERTS},
                stack=StackLayout(repeats=32),
                norm=LayerNorm(1e-5),
                tie_embeddings=False,
                embedding_multiplier=1.0,
                head_bias=True,
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
