"""Llama 4 Scout and Maverick, the text models: attention in chunks of 8,192 tokens and in full.

Three layers of four have rotary positions and attend within a chunk. The fourth has no positions,
attends to all earlier tokens, and scales up the queries of late tokens. A token uses a shared
expert and the best of the others, whose input is multiplied by a sigmoid. Scout normalises queries
and keys, and stretches positions; Maverick has experts in every second layer. Source: Meta 2025;
config.json of meta-llama/Llama-4-Scout-17B-16E and meta-llama/Llama-4-Maverick-17B-128E.

    python -m moe_jax.train --config=configs/llama4.py:tiny --workdir=runs/llama4_tiny
    python -m moe_jax.train --config=configs/llama4.py:maverick,tiny --workdir=runs/maverick_tiny
    python -m moe_jax.plan --config=configs/llama4.py --topology=h100:128x8

| preset | layers | total | active | without input embedding | without embeddings |
| --- | --- | --- | --- | --- | --- |
| (none) | 48 of 5,120 | 107,769,861,120 | 17,172,894,720 | 16,138,408,960 | 15,103,923,200 |
| maverick | 48 of 5,120 | 400,711,848,960 | 17,184,691,200 | 16,150,205,440 | 15,115,719,680 |

The published 109 billion of Scout include the vision model. Training settings are not published:
losses, optimizer, batch and mesh are taken from models of similar size.
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
from moe_jax.layers.attention import Attention, Temperature
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import Llama3Scaling
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.token_choice import TokenChoice

HEADS = {"num_heads": 40, "num_kv_heads": 8, "head_dim": 128}
# Each frequency is either kept or divided by 16: there is no ramp.
STRETCHED = Llama3Scaling(factor=16.0, low_turns=1.0, high_turns=1.0, original_length=8192)
NOPE = Attention(**HEADS, rotary=None, temperature=Temperature(floor=8192, scale=0.1))
MIXERS = ("chunked", "chunked", "chunked", "nope")


def chunked(*, scout: bool) -> Attention:
    """Chunked attention, for layers with positions."""
    return Attention(
        **HEADS,
        qk_norm=RMSNorm(1e-5, use_scale=False) if scout else None,
        qk_norm_at="rotated" if scout else "heads",
        rotary=Rotary(500_000.0, interleaved=True, scaling=STRETCHED if scout else None),
        chunk=8192,
    )


def experts(count: int) -> MoE:
    """The experts of a layer."""
    return MoE(
        num_experts=count,
        num_selected_experts=1,
        expert_dim=8192,
        shared_expert_dim=8192,
        activation=SwiGLU(),
        gate_on_input=True,
        router=TokenChoice(score=Sigmoid()),
        losses=(LoadBalance(weight=0.001),),
        capacity=Capacity(eval_factor=0.0),
    )


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Llama 4 Scout; presets: maverick, tiny, smoke."""
    presets = parse_presets(arg, {"maverick", "tiny"})
    scout = "maverick" not in presets
    ffns = ("moe",) * 4 if scout else ("mlp", "moe") * 2
    parts = {"chunked": chunked(scout=scout), "nope": NOPE, "moe": experts(16 if scout else 128)}
    if not scout:
        parts["mlp"] = Mlp(dim=16_384, activation=SwiGLU())
    config = config_dict(
        ExperimentConfig(
            name="llama4_scout" if scout else "llama4_maverick",
            model=LanguageModel(
                vocab_size=202_048,
                model_dim=5120,
                parts=parts,
                stack=StackLayout(unit=tuple(zip(MIXERS, ffns, strict=True)), repeats=12),
                norm=RMSNorm(1e-5),
                tie_embeddings=False,
                embedding_multiplier=1.0,
                compute_dtype="bfloat16",
                remat="full",
            ),
            data=DataConfig(sequence_length=8192),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
            training=TrainingConfig(num_steps=500_000, batch_size=1024),
            mesh=MeshConfig(data=1, fsdp=-1, expert=16),
        )
    )
    make_smaller(config, presets)
    return config
