"""A Switch-style MoE on the embedded corpus, and its dense twin.

Six domains of real text, bytes as tokens; every second layer is MoE, top-1 of 8 experts.

    python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m moe_jax.train --config=configs/quickstart.py:dense --workdir=runs/quickstart_dense

The twin has one FFN of an expert's size in place of the experts: equal active FLOPs a token, and
the same data in the same order.
"""

import ml_collections

from configs.base import default_config, make_smoke, parse_presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The quickstart model; presets: dense, smoke."""
    presets = parse_presets(arg, {"dense"})
    config = default_config()
    config.name = "quickstart"

    model = config.model
    model.num_layers, model.model_dim, model.ffn_dim = 4, 128, 512
    model.num_heads, model.head_dim = 4, 32
    model.scan_layers = False  # four layers compile fast, and run faster unrolled on a CPU
    moe = model.moe
    moe.num_experts, moe.num_selected_experts, moe.expert_dim = 8, 1, 512
    moe.layer_period, moe.layer_offset = 2, 1

    config.data.sequence_length = 256
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    training = config.training
    training.num_steps, training.batch_size = 1200, 16
    training.evaluate_every, training.checkpoint_every = 300, 300

    if "dense" in presets:
        config.name = "quickstart_dense"
        moe.layer_period = 0
    if "smoke" in presets:
        make_smoke(config)
    return config
