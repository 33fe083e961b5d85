"""GPT-4 as rumoured: eight experts of about 220 billion parameters each, two per token.

This is only a rumour: OpenAI has published nothing about the model. Source: an interview with
George Hotz in June 2023 (Latent Space), "an eight-way mixture of 220 billion"; the SemiAnalysis
report of July 2023 gives other numbers, 16 experts of 111 billion. Only three numbers here are
rumoured: 8 experts of 220 billion each and, by the report, two per token.

All other numbers are assumed to match these, in the proportions of GPT-3: 116 layers, 15,360 dims,
120 heads of 128, GELU networks of 61,440 with biases, LayerNorm, a vocabulary of 100,352. An expert
has 218,951,577,600 parameters in its 116 layers. Rotary positions are assumed too.

    python -m moe_jax.train --config=configs/gpt4_rumour.py:tiny --workdir=runs/gpt4_rumour_tiny
    python -m moe_jax.plan --config=configs/gpt4_rumour.py --topology=h100:512x8

| layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- |
| 116 of 15,360 | 1,862,653,900,800 | 548,944,435,200 | 548,944,435,200 | 547,403,028,480 |
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
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import GeluTanh
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

EXPERTS = MoE(
    num_experts=8,
    num_selected_experts=2,
    expert_dim=4 * 15_360,
    activation=GeluTanh(),
    use_bias=True,
    router=TokenChoice(renormalize=True),
    capacity=Capacity(eval_factor=0.0),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The rumour; presets: tiny, smoke."""
    presets = parse_presets(arg, {"tiny"})
    config = config_dict(
        ExperimentConfig(
            name="gpt4_rumour",
            model=LanguageModel(
                vocab_size=100_352,
                model_dim=15_360,
                parts={
                    "attention": Attention(
                        num_heads=120, head_dim=128, biases=("q", "k", "v", "o")
                    ),
                    "moe": EXPERTS,
                },
                stack=StackLayout(repeats=116),
                norm=LayerNorm(1e-5),
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=4096),
            optimizer=OptimizerConfig(learning_rate=6e-5, warmup_steps=2000),
            training=TrainingConfig(num_steps=500_000, batch_size=4096),
            mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        )
    )
    make_smaller(config, presets)
    return config
