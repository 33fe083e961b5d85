"""Reads and sets settings of a config by dotted path, as in studies."""

from typing import Any

from ml_collections import ConfigDict

from moe_jax.config import build, to_dict
from moe_jax.config.check import require
from moe_jax.config.settings import Settings
from moe_jax.models.stack import StackLayout


def layout_of(config: ConfigDict) -> StackLayout:
    """The layer layout of a model."""
    return build(StackLayout, config.model.stack.to_dict(), "config.model.stack")


def read(config: ConfigDict, path: str) -> Any:
    """The value of the setting at a dotted path."""
    for name in path.split("."):
        config = config[name]
    return config


def override(config: ConfigDict, path: str, value: Any) -> None:
    """Sets the setting at a dotted path; a function value is first called with the config.

    A part replaces the existing part, or is added under a new name.
    """
    if callable(value):
        value = value(config)
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part] if isinstance(section, ConfigDict) and part in section else None
    is_part = isinstance(value, Settings)
    require(
        isinstance(section, ConfigDict) and (is_part or name in section),
        "an override names a setting",
        path,
        "Correct its path",
    )
    if is_part:
        with section.unlocked(), section.ignore_type():
            section[name] = to_dict(value)
    else:
        section[name] = value


def strings(value: Any) -> set[str]:
    """All strings in a setting."""
    if isinstance(value, ConfigDict):
        return set().union(*(strings(value[name]) for name in value))
    return {value} if isinstance(value, str) else set()
