"""gpt-oss 20b and 120b: attention sinks, windows in every second layer, clamped experts.

A token uses the four experts with the largest logits, which include a bias; gates are a softmax
over the four. In an expert the gate is clamped from above; the other half is clamped on both sides
and increased by one. Attention, router and experts have biases. Rotary positions are stretched by
YaRN; its ramp need not begin at a whole pair. Source: OpenAI 2025, arXiv:2508.10925; config.json
of openai/gpt-oss-20b and openai/gpt-oss-120b.

    python -m moe_jax.train --config=configs/gpt_oss.py:tiny --workdir=runs/gpt_oss_tiny
    python -m moe_jax.plan --config=configs/gpt_oss.py --topology=h100:64x8

| preset | layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- | --- |
| (none) | 24 of 2,880 | 20,914,757,184 | 4,187,440,704 | 3,608,307,264 | 3,029,173,824 |
| 120b | 36 of 2,880 | 116,829,156,672 | 5,711,982,912 | 5,132,849,472 | 4,553,716,032 |

The published active sizes exclude the input embedding: 3.6 and 5.1 billion. Training settings are
not published: optimizer, batch and mesh are taken from models of similar size. The weight of the
balance loss is assumed: config.json has 0.9 but disables it; it would add 3.6 nats at uniform
routing.
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
from moe_jax.layers.rotary_scaling import Yarn
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import ClampedSwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Linear, SoftmaxOverSelected
from moe_jax.moe.routing.token_choice import TokenChoice

YARN = Yarn(factor=32.0, original_length=4096, truncate=False)
ATTENTION = {
    "num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "biases": ("q", "k", "v", "o"),
    "sink": True, "rotary": Rotary(base=150_000.0, scaling=YARN),
}  # fmt: skip
EXPERTS = MoE(
    num_experts=32,
    num_selected_experts=4,
    expert_dim=2880,
    activation=ClampedSwiGLU(),
    use_bias=True,
    router=TokenChoice(score=SoftmaxOverSelected(), projection=Linear(use_bias=True)),
    losses=(HuggingFaceLoadBalance(weight=0.01),),  # assumed
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """gpt-oss 20b; presets: 120b, tiny, smoke."""
    presets = parse_presets(arg, {"120b", "tiny"})
    config = config_dict(
        ExperimentConfig(
            name="gpt_oss_20b",
            model=LanguageModel(
                vocab_size=201_088,
                model_dim=2880,
                parts={
                    "sliding": Attention(**ATTENTION, window=128),
                    "attention": Attention(**ATTENTION),
                    "moe": EXPERTS,
                },
                stack=StackLayout(unit=(("sliding", "moe"), ("attention", "moe")), repeats=12),
                norm=RMSNorm(1e-5),
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
    if "120b" in presets:
        config.name = "gpt_oss_120b"
        config.model.parts.moe.num_experts, config.model.stack.repeats = 128, 18
    make_smaller(config, presets)
    return config
