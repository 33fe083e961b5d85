"""Every setting at its default, and the presets that all configs share.

Each field's meaning, unit and constraint stand beside its default: `moe_jax/config/` has data,
optimizer, training and devices, and each part of a model has its own, `moe_jax/moe/block.py` those
of the MoE block.

    python -m moe_jax.train --config=configs/base.py:smoke --workdir=runs/base_smoke
"""

from collections.abc import Iterable

import ml_collections

from moe_jax.config import ExperimentConfig, config_dict

# The most that a part of a smoke run has of each size.
SMALL = {
    "num_experts": 8, "num_selected_experts": 2, "expert_dim": 128, "shared_expert_dim": 128,
    "dim": 128, "num_kv_heads": 2, "head_dim": 16, "group_size": 0,
}  # fmt: skip
SMALL_LAYERS = 4


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
    model.model_dim, model.vocab_size = 64, 384
    for part in model.parts.values():
        shrink_part(part)
    shrink_stack(model.stack)
    config.data.corpus, config.data.tokenizer, config.data.sequence_length = "embedded", "byte", 64
    config.data.domain_weights = ()
    config.optimizer.warmup_steps = 5
    training.num_steps, training.batch_size, training.num_microbatches = 20, 8, 1
    training.log_every, training.checkpoint_every, training.evaluate_every = 5, 10, 20
    training.evaluation_batches, training.sample_tokens = 4, 32


def shrink_part(part: ml_collections.ConfigDict | str) -> None:
    """Bounds the sizes that a part has; one without settings is its kind alone."""
    if isinstance(part, str):
        return
    for name, most in SMALL.items():
        if name in part:
            part[name] = min(part[name], most)
    if "num_heads" in part:
        part.num_heads = 4  # a multiple of any num_kv_heads of 2 or less


def shrink_stack(stack: ml_collections.ConfigDict) -> None:
    """Repeats the unit as often as `SMALL_LAYERS` allow, and once at least."""
    if stack.repeats:
        others = len(stack.first) + len(stack.last)
        stack.repeats = max(1, min(stack.repeats, (SMALL_LAYERS - others) // len(stack.unit)))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults; presets: smoke."""
    config = default_config()
    if "smoke" in parse_presets(arg):
        make_smoke(config)
    return config
