"""Switch Transformer, C: 1.6 trillion parameters, 2,048 experts in every layer.

Source: Fedus et al. 2021, arXiv:2101.03961, table 9.

    python -m moe_jax.train --config=configs/switch_c.py:tiny --workdir=runs/switch_c_tiny
    python -m moe_jax.plan --config=configs/switch_c.py --topology=h100:32x8

| preset | total | active |
| --- | --- | --- |
| (none) | 1,571,375,798,688 | 1,795,152,288 |
"""

import ml_collections

from configs.base import parse_presets
from configs.switch_base import experiment, finish, switch_model
from moe_jax.config import config_dict


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Switch-C-2048; presets: finetune, tiny, smoke."""
    presets = parse_presets(arg, {"finetune", "tiny"})
    model = switch_model(
        model_dim=2080, num_heads=32, head_dim=64, dim=6144, num_experts=2048,
        layers=(("moe",),), repeats=15, tie_embeddings=False,
    )  # fmt: skip
    config = config_dict(experiment("switch_c", model))
    config.mesh.expert = 256
    finish(config, presets)
    return config
