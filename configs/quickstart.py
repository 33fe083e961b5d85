"""A Switch-style MoE on the embedded corpus, and its dense twin: five minutes each on two cores.

The corpus has six domains of real text, with bytes as tokens. Each of two layers has 8 experts, a
capacity factor and a load-balance loss. A token uses two experts of half the size, with gates that
sum to 1 as in GShard. With Switch's single gate, which starts near 1 / 8, a run this short ends
with a higher loss than its dense twin.

    python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m moe_jax.train --config=configs/quickstart.py:dense --workdir=runs/quickstart_dense

The twin replaces the experts by one FFN of the size of two: equal active FLOPs per token except the
router, and the same data in the same order. Results: experiments/moe_against_dense.
"""

import ml_collections

from configs.base import make_smoke, parse_presets
from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainingConfig,
    config_dict,
)
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

EXPERTS = MoE(
    num_experts=8,
    num_selected_experts=2,
    expert_dim=512,
    router=TokenChoice(renormalize=True),
    capacity=Capacity(train_factor=2.0),  # times the mean load in a sequence; 1.25 drops 10 % early
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The quickstart model; presets: dense, smoke."""
    presets = parse_presets(arg, {"dense"})
    name, ffn = ("mlp", Mlp(dim=1024)) if "dense" in presets else ("moe", EXPERTS)
    config = config_dict(
        ExperimentConfig(
            name="quickstart_dense" if "dense" in presets else "quickstart",
            model=LanguageModel(
                model_dim=256,
                parts={"attention": Attention(num_heads=2, head_dim=64), name: ffn},
                stack=StackLayout(unit=(("attention", name),), repeats=2),
                scan_layers=False,  # two layers compile fast unrolled, and run faster on a CPU
            ),
            data=DataConfig(sequence_length=256),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
            training=TrainingConfig(
                num_steps=700,  # 2.9 M tokens, half an epoch
                batch_size=16,
                evaluate_every=100,
                evaluation_batches=5,
                checkpoint_every=350,
            ),
        )
    )
    if "smoke" in presets:
        make_smoke(config)
    return config
