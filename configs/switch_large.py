"""Switch Transformer, Large: T5-Large with one of 128 experts in every second layer.

Source: Fedus et al. 2021, arXiv:2101.03961; released checkpoint: flaxformer's t5x/configs/moe, with
ReLU of 4,096 hidden units, where table 9 of the paper prints GEGLU of 2,816 (27.15 billion).

    python -m moe_jax.train --config=configs/switch_large.py:tiny --workdir=runs/switch_large_tiny
    python -m moe_jax.plan --config=configs/switch_large.py --topology=h100:16x8

| preset | total | active |
| --- | --- | --- |
| (none) | 26,309,291,008 | 740,813,824 |
| dense (T5-Large) | 737,668,096 | 737,668,096 |
"""

import ml_collections

from configs.base import parse_presets
from configs.switch_base import experiment, finish, switch_model
from moe_jax.config import config_dict


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Switch-Large-128; presets: dense, finetune, tiny, smoke."""
    presets = parse_presets(arg, {"dense", "finetune", "tiny"})
    model = switch_model(
        model_dim=1024, num_heads=16, head_dim=64, dim=4096, num_experts=128, repeats=12
    )
    config = config_dict(experiment("switch_large", model))
    finish(config, presets)
    return config
