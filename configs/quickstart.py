"""A Switch-style MoE on the embedded corpus, and its dense twin: five minutes each on two cores.

Six domains of real text, bytes as tokens; two layers, each with 8 experts under a capacity factor
and Switch's load-balance loss. A token uses two experts of half the size, with gates that sum to 1
as in GShard: with Switch's own single gate, which starts near 1 / 8, a run this short ends above
its dense twin.

    python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m moe_jax.train --config=configs/quickstart.py:dense --workdir=runs/quickstart_dense

The twin has one FFN of two experts' size in place of the experts: equal active FLOPs a token but
for the router, and the same data in the same order. Numbers: experiments/moe_against_dense.
"""

import ml_collections

from configs.base import default_config, make_smoke, parse_presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The quickstart model; presets: dense, smoke."""
    presets = parse_presets(arg, {"dense"})
    config = default_config()
    config.name = "quickstart"

    model = config.model
    model.num_layers, model.model_dim, model.ffn_dim = 2, 256, 1024
    model.num_heads, model.head_dim = 2, 64
    model.scan_layers = False  # two layers compile fast, and run faster unrolled on a CPU
    moe = model.moe
    moe.num_experts, moe.num_selected_experts, moe.expert_dim = 8, 2, 512
    moe.router.renormalize = True
    moe.capacity.train_factor = 2.0  # of one sequence's mean load; 1.25 drops a tenth early on

    config.data.sequence_length = 256
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    training = config.training
    training.num_steps, training.batch_size = 700, 16  # 2.9 M tokens, half an epoch
    training.evaluate_every, training.checkpoint_every = 100, 350
    training.evaluation_batches = 5

    if "dense" in presets:
        config.name = "quickstart_dense"
        moe.layer_period = 0
    if "smoke" in presets:
        make_smoke(config)
    return config
