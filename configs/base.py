"""Every setting at its default, and the presets that all configs share.

Each field's meaning, unit and constraint stand beside its default in `moe_jax/config/`: `moe.py`
for the MoE block, `model.py` for the decoder, `run.py` for data, optimizer and training,
`mesh.py` for the devices.

    python -m moe_jax.train --config=configs/base.py:smoke --workdir=runs/base_smoke
"""

from collections.abc import Iterable

import ml_collections

from moe_jax.config import ExperimentConfig, config_dict


def default_config() -> ml_collections.ConfigDict:
    """Every field at its default, locked: an unknown field is an error."""
    return config_dict(ExperimentConfig())


def parse_presets(arg: str, known: Iterable[str] = ()) -> set[str]:
    """Splits the text after the colon of `--config=file.py:a,b` into preset names.

    Raises:
      ValueError: a preset that neither the config nor this file knows.
    """
    presets = {name for name in (arg or "").split(",") if name}
    known = {*known, "smoke"}
    if presets - known:
        raise ValueError(
            f"The presets of this config are {sorted(known)}: got {sorted(presets - known)}. "
            "Write them after the colon of --config=FILE:PRESET,PRESET."
        )
    return presets


def make_smoke(config: ml_collections.ConfigDict) -> None:
    """Shrinks a config to a minute on two CPU cores: same kind of model, few and small steps."""
    config.name += "_smoke"
    model, training = config.model, config.training
    model.num_layers = min(model.num_layers, 4)
    model.model_dim, model.ffn_dim = 64, min(model.ffn_dim, 128)
    model.num_heads, model.num_kv_heads, model.head_dim = 4, min(model.num_kv_heads, 2), 16
    model.moe.num_experts = min(model.moe.num_experts, 8)
    model.moe.num_selected_experts = min(model.moe.num_selected_experts, 2)
    model.moe.expert_dim = min(model.moe.expert_dim, 128)
    model.moe.group_size = 0
    config.data.corpus, config.data.tokenizer, config.data.sequence_length = "embedded", "byte", 64
    config.data.domain_weights = ()
    model.vocab_size = 384
    config.optimizer.warmup_steps = 5
    training.num_steps, training.batch_size, training.num_microbatches = 20, 8, 1
    training.log_every, training.checkpoint_every, training.evaluate_every = 5, 10, 20
    training.evaluation_batches, training.sample_tokens = 4, 32


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults; presets: smoke."""
    config = default_config()
    if "smoke" in parse_presets(arg):
        make_smoke(config)
    return config
