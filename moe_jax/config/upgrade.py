"""Converts written configs with earlier layouts."""

import math
from collections.abc import Mapping
from typing import Any

from moe_jax.config.check import require

# Of a written config. Format 1 had no parts. Format 2 had other settings of attention: `rotary` on
# or off, `rope_base`, `qkv_bias`, `output_bias`, `qk_norm` on or off, `norm_epsilon`. Format 3
# counted `training.evaluation_batches` in microbatches.
FORMAT = 4
OLDEST = 2


def upgrade(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """A written config in the current layout.

    Raises:
      ValueError: it has a layout that cannot be read.
    """
    check_format(written)
    version = written["format"]
    if version < 3:
        written = upgrade_sections(written)
    if version < 4:
        written = {**written, "training": training_of_format_3(written.get("training", {}))}
    return {**written, "format": FORMAT}


def check_format(written: Mapping[str, Any], where: str = "this one") -> None:
    """Refuses a config with a layout that cannot be read.

    Raises:
      ValueError: with `where` it is from.
    """
    version = written.get("format", 1)
    require(
        version in range(OLDEST, FORMAT + 1),
        f"only configs in the layouts of formats {OLDEST} to {FORMAT} can be read",
        f"{where} is of format {version}",
        "Use the release that wrote it, or start the run anew",
    )


def training_of_format_3(section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training in format 4: `evaluation_batches` in whole batches, rounded up."""
    microbatches = section.get("evaluation_batches", 0)
    batches = math.ceil(microbatches / section.get("num_microbatches", 1))
    return {**section, "evaluation_batches": batches}


def upgrade_sections(value: Any) -> Any:
    """Converts a section of format 2, and all sections in it, to format 3."""
    if isinstance(value, list | tuple):
        return type(value)(upgrade_sections(one) for one in value)
    if not isinstance(value, Mapping):
        return value
    section = {name: upgrade_sections(one) for name, one in value.items()}
    # Detects attention by its fields: a user's class derived from `Attention` has them too.
    return attention_of_format_2(section) if "rope_base" in section else section


def attention_of_format_2(section: dict[str, Any]) -> dict[str, Any]:
    """Settings of attention in format 3; a missing setting had its default."""
    base, epsilon = section.pop("rope_base"), section.pop("norm_epsilon", 1e-6)
    biases = "qkv" * section.pop("qkv_bias", False) + "o" * section.pop("output_bias", False)
    norm = {"kind": "rmsnorm", "epsilon": epsilon} if section.pop("qk_norm", False) else None
    rotary = {"kind": "rotary", "base": base} if section.pop("rotary", True) else None
    return {**section, "biases": list(biases), "qk_norm": norm, "rotary": rotary}
