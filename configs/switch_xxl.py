"""Switch Transformer, XXL: T5-XXL with one of 128 experts in every second layer.

Source: Fedus et al. 2021, arXiv:2101.03961. Table 9 prints 64 experts, which would be 201 billion
parameters. Its 395 billion parameters match 128 experts, as in flaxformer's config.

    python -m moe_jax.train --config=configs/switch_xxl.py:tiny --workdir=runs/switch_xxl_tiny
    python -m moe_jax.plan --config=configs/switch_xxl.py --topology=h100:32x8

| preset | total | active |
| --- | --- | --- |
| (none) | 394,675,073,024 | 11,147,915,264 |
| dense (T5-XXL, version 1.1) | 11,135,332,352 | 11,135,332,352 |
"""

import ml_collections

from configs.base import parse_presets
from configs.switch_base import experiment, finish, switch_model
from moe_jax.config import config_dict
from moe_jax.moe.activations import GeGLUTanh


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Switch-XXL; presets: dense, finetune, tiny, smoke."""
    presets = parse_presets(arg, {"dense", "finetune", "tiny"})
    model = switch_model(
        model_dim=4096, num_heads=64, head_dim=64, dim=10_240, num_experts=128, repeats=12,
        activation=GeGLUTanh(), tie_embeddings=False,
    )  # fmt: skip
    config = config_dict(experiment("switch_xxl", model))
    finish(config, presets)
    return config
