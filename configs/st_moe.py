"""ST-MoE, L and 32B: T5 with two of many experts in every fourth layer.

A sparse layer has a dense FFN after its experts, with its own norm. A second expert is used with
probability min(1, gate / 0.2) in training, and always in evaluation. A full expert serves first
choices in the order of positions, then second choices, so in training a later token can take the
slot of a second choice. There is no priority for likely tokens: the paper's appendix D tries that
with one choice, and flaxformer's st_moe_base.gin turns it off.
Source: Zoph et al. 2022, arXiv:2202.08906; sizes: flaxformer's t5x/configs/moe.

    python -m moe_jax.train --config=configs/st_moe.py:tiny --workdir=runs/st_moe_tiny
    python -m moe_jax.plan --config=configs/st_moe.py --topology=h100:16x8

| preset | total | active |
| --- | --- | --- |
| (none) | 4,105,444,352 | 991,173,632 |
| 32b | 269,104,613,376 | 35,062,450,176 |

`dense` is the twin with equal training FLOPs: an FFN 1.25 times as wide replaces the experts, since
their capacity serves 1.25 choices per token. `tiny` has a sparse layer every second layer. A group
is four sequences, 2,048 encoder tokens and 456 decoder tokens (sec. 7.2). For 32B it is eight
sequences, or 4,096 encoder tokens as in flaxformer's st_moe_32b.gin. Training reads 0.5T encoder
tokens, for 32B 1.5T. Table 1 of the paper prints 27 layers for 32B; the released config has 24,
which gives 269 billion parameters.
"""

import ml_collections

from configs.base import parse_presets
from configs.switch_base import (
    DECODER_LENGTH,
    ENCODER_LENGTH,
    INIT_SCALE,
    experiment,
    finish,
    t5_parts,
)
from moe_jax.config import config_dict
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import GeGLUTanh
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import SwitchLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import ChoiceMajor
from moe_jax.moe.routing.selection import RandomChoices
from moe_jax.moe.routing.token_choice import TokenChoice


def st_moe_experts(num_experts: int, dim: int, group_size: int) -> MoE:
    """The experts of a sparse layer."""
    return MoE(
        num_experts=num_experts,
        num_selected_experts=2,
        expert_dim=dim,
        activation=GeGLUTanh(),
        init_scale=INIT_SCALE,
        group_size=group_size,
        router=TokenChoice(renormalize=True, choices=RandomChoices(threshold=0.2)),
        losses=(
            SwitchLoadBalance(weight=0.01, over_layers="sum", scope="group"),
            RouterZ(weight=1e-3, over_layers="sum"),
        ),
        capacity=Capacity(
            train_factor=1.25, eval_factor=2.0, per="token", rounding="nearest", minimum=4,
            queue=ChoiceMajor(),
        ),
    )  # fmt: skip


def st_moe_model(
    *, model_dim: int, num_heads: int, head_dim: int, dim: int, num_experts: int, sequences: int
) -> EncoderDecoder:
    """An ST-MoE with 24 layers per stack; `sequences` is the number of sequences in a group."""
    dense, sparse = (("mlp",),) * 3, ("moe", "mlp")
    return EncoderDecoder(
        vocab_size=32_128,
        model_dim=model_dim,
        parts={
            **t5_parts(num_heads, head_dim, dim, GeGLUTanh()),
            "encoder_moe": st_moe_experts(num_experts, dim, sequences * ENCODER_LENGTH),
            "moe": st_moe_experts(num_experts, dim, sequences * DECODER_LENGTH),
        },
        encoder=StackLayout(
            unit=tuple(("attention", *one) for one in (*dense, ("encoder_moe", "mlp"))),
            repeats=6, shared=("position",), causal=False,
        ),
        stack=StackLayout(
            unit=tuple(("attention", "cross_attention", *one) for one in (*dense, sparse)),
            repeats=6, shared=("position",), allow_lookahead=True,
        ),
        tie_embeddings=False,
        head_init_scale=INIT_SCALE,
        embedding_multiplier=1.0,
        embedding_stddev=1.0,
        compute_dtype="bfloat16",
        remat="full",
    )  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """ST-MoE-L; presets: 32b, dense, finetune, tiny, smoke."""
    presets = parse_presets(arg, {"32b", "dense", "finetune", "tiny"})
    if "32b" in presets:
        model = st_moe_model(
            model_dim=5120, num_heads=64, head_dim=128, dim=20_480, num_experts=64, sequences=8
        )
        config = config_dict(experiment("st_moe_32b", model))
        config.training.num_steps = 1_430_000
    else:
        model = st_moe_model(
            model_dim=1024, num_heads=16, head_dim=64, dim=2816, num_experts=32, sequences=4
        )
        config = config_dict(experiment("st_moe", model))
    finish(config, presets)
    return config
