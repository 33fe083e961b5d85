"""Settings: frozen dataclasses that check themselves, made of what a user writes.

A user writes an `ml_collections.ConfigDict` (see `configs/`); `from_config_dict` turns it once,
before any device work, into an `ExperimentConfig`, and nothing below that reads the `ConfigDict`.
The settings of a model stand in its parts: `kinds` says where each kind is.
"""

from collections.abc import Mapping
from typing import Any

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


def from_config_dict(config: Mapping[str, Any]) -> ExperimentConfig:
    """Checks a user's config and freezes it.

    Args:
      config: a (nested) mapping of settings; a field that is absent keeps its default.

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
    "read_config",
    "to_dict",
    "write_config",
]
