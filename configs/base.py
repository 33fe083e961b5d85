"""Every setting at its default, and the presets that all configs share.

Each field's meaning, unit and constraints are documented beside its default: `moe_jax/config/`
covers data, optimizer, training and devices, and each part of a model has its own file, for
example `moe_jax/moe/part.py` for the MoE block.

    python -m moe_jax.train --config=configs/base.py:smoke --workdir=runs/base_smoke
"""

import itertools
from collections.abc import Iterable

import ml_collections

from moe_jax.config import ExperimentConfig, MeshConfig, config_dict

# Upper bounds of the sizes of every part of a small model.
SMALL = {
    "num_experts": 8, "num_selected_experts": 2, "expert_dim": 128, "shared_expert_dim": 128,
    "dim": 128, "group_size": 0, "num_groups": 4, "num_selected": 2,
    # Attention; windows and chunks are shorter than a sequence.
    "num_kv_heads": 2, "head_dim": 16, "q_rank": 32, "kv_rank": 32, "nope_dim": 16, "rope_dim": 8,
    "value_dim": 16, "window": 24, "chunk": 32, "floor": 16, "original_length": 32,
    # Mamba
    "state_dim": 8, "dt_rank": 8, "chunk_size": 16,
}  # fmt: skip
SMALL_LAYERS = 4


def default_config() -> ml_collections.ConfigDict:
    """Every field at its default, locked: an unknown field is an error."""
    return config_dict(ExperimentConfig())


def parse_presets(arg: str, known: Iterable[str] = ()) -> set[str]:
    """Splits the text after the colon of `--config=file.py:a,b` into preset names.

    Raises:
      ValueError: a preset is unknown to the config and to this file.
    """
    presets = {name for name in (arg or "").split(",") if name}
    known = {*known, "smoke"}
    if presets - known:
        raise ValueError(
            f"The presets of this config are {sorted(known)}: got {sorted(presets - known)}. "
            "Write them after the colon of --config=FILE:PRESET,PRESET."
        )
    return presets


def make_smaller(config: ml_collections.ConfigDict, presets: set[str]) -> None:
    """Applies "tiny" and "smoke" if they are among the presets."""
    if "tiny" in presets:
        make_tiny(config)
    if "smoke" in presets:
        make_smoke(config)


def make_tiny(config: ml_collections.ConfigDict) -> None:
    """Shrinks a published model to one that a CPU trains in minutes, on the embedded corpus.

    It keeps every kind of layer and every option. Windows and chunks are shorter than a sequence,
    so they take effect. A config file may change sizes and the optimizer afterwards.
    """
    config.name += "_tiny"
    shrink_model(config)
    config.model.compute_dtype, config.model.remat = "float32", "none"
    config.data.sequence_length = 96
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 20
    training = config.training
    training.num_steps, training.batch_size, training.num_microbatches = 150, 16, 1
    training.log_every, training.checkpoint_every, training.evaluate_every = 10, 150, 150
    training.evaluation_batches, training.sample_tokens = 8, 64


def make_smoke(config: ml_collections.ConfigDict) -> None:
    """Shrinks a config to a minute on two CPU cores: the same kind of model, few small steps."""
    config.name += "_smoke"
    shrink_model(config)
    config.data.sequence_length = 64
    config.optimizer.warmup_steps = 5
    training = config.training
    training.num_steps, training.batch_size, training.num_microbatches = 20, 8, 1
    training.log_every, training.checkpoint_every, training.evaluate_every = 5, 10, 20
    training.evaluation_batches, training.sample_tokens = 4, 32


def shrink_model(config: ml_collections.ConfigDict) -> None:
    """Shrinks the model, and sets the embedded corpus, byte tokens and the default mesh."""
    config.model.model_dim, config.model.vocab_size = 64, 384
    shrink(config.model)
    config.data.corpus, config.data.tokenizer, config.data.domain_weights = "embedded", "byte", ()
    config.mesh = config_dict(MeshConfig())


def shrink(part: ml_collections.ConfigDict) -> None:
    """Bounds the sizes of a part and of its inner parts."""
    old = part.get("head_dim")
    if "num_heads" in part:
        if part.get("num_kv_heads") == part.num_heads:
            part.num_kv_heads = 0  # equal to num_heads
        part.num_heads = 4  # a multiple of num_kv_heads, which is at most 2
    for name, most in SMALL.items():
        if part.get(name) is not None:
            part[name] = min(part[name], most)
    if isinstance(part.get("rotary"), ml_collections.ConfigDict):
        shrink_rotary(part.rotary, old, part)
    if "repeats" in part:
        shrink_stack(part)
    for inner in part.values():
        if isinstance(inner, ml_collections.ConfigDict):
            shrink(inner)


def shrink_rotary(
    rotary: ml_collections.ConfigDict, old: int | None, part: ml_collections.ConfigDict
) -> None:
    """Keeps the fraction of a head's dims that rotate; thins out factors per frequency."""
    new = part.get("head_dim", part.get("rope_dim"))
    if rotary.dim is not None and old is not None:
        rotary.dim = new = max(2, rotary.dim * new // old // 2 * 2)
    scaling = rotary.scaling
    for name in ("short_factors", "long_factors"):
        factors = () if scaling is None else scaling.get(name, ())
        if factors:
            scaling[name] = factors[:: len(factors) // (new // 2)][: new // 2]


def shrink_stack(stack: ml_collections.ConfigDict) -> None:
    """Keeps one of equal consecutive layers; bounds repeats by `SMALL_LAYERS`, at least one."""
    for name in ("first", "unit", "last"):
        stack[name] = tuple(layer for layer, _ in itertools.groupby(stack[name]))
    if stack.repeats:
        others = len(stack.first) + len(stack.last)
        stack.repeats = max(1, min(stack.repeats, (SMALL_LAYERS - others) // len(stack.unit)))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults; presets: smoke."""
    config = default_config()
    if "smoke" in parse_presets(arg):
        make_smoke(config)
    return config
