"""Settings: frozen dataclasses that check themselves, made from a user's config.

A user writes an `ml_collections.ConfigDict` (see `configs/`). Before any device work,
`from_config_dict` converts it once into an `ExperimentConfig`; later code does not read the
`ConfigDict`. Each part of a model has its own settings: `kinds` lists where each kind is defined.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.check import require
from moe_jax.config.convert import (
    build,
    config_dict,
    difference,
    read_config,
    to_dict,
    write_config,
)
from moe_jax.config.mesh import MeshConfig
from moe_jax.config.run import (
    DataConfig,
    ExperimentConfig,
    InitFrom,
    Lengths,
    OptimizerConfig,
    TrainingConfig,
)


def parse_mesh(text: str, flag: str, separator: str = ",") -> MeshConfig:
    """The mesh of a trained model, such as "data=2,fsdp=-1"; other sizes are 1.

    Raises:
      ValueError: the text has another form, or a mesh has no such size; it names the flag.
    """
    sizes: dict[str, int] = {}
    bools = {"0": False, "1": True, "false": False, "true": True}
    for part in text.split(separator):
        name, _, size = part.partition("=")
        require(name not in sizes, f"{flag} must name each axis once",
                f"{name!r} comes twice in {flag}={text}", "Remove one")  # fmt: skip
        try:
            sizes[name] = bools[size.lower()] if name == "experts_span_slices" else int(size)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{flag} must be NAME=SIZE{separator}NAME=SIZE: got {part!r} in {flag}={text}. "
                "Correct it."
            ) from error
    mesh: Any = build(MeshConfig, {"data": 1, **sizes}, flag)
    assert isinstance(mesh, MeshConfig)
    return mesh


def from_config_dict(config: Mapping[str, Any]) -> ExperimentConfig:
    """Checks a user's config and freezes it.

    Args:
      config: a (nested) mapping of settings; an absent field keeps its default.

    Raises:
      ValueError: an unknown field, a value of another type, or settings that break a rule.
    """
    if hasattr(config, "to_dict"):  # an `ml_collections.ConfigDict`
        config = config.to_dict()
    result = build(ExperimentConfig, config, "config")
    assert isinstance(result, ExperimentConfig)
    return result


__all__ = [
    "DataConfig",
    "ExperimentConfig",
    "InitFrom",
    "Lengths",
    "MeshConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "build",
    "config_dict",
    "difference",
    "from_config_dict",
    "parse_mesh",
    "read_config",
    "to_dict",
    "write_config",
]
