"""Converts written configs with earlier layouts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config.check import require

# Of a written config. Format 1 had no parts. Format 2 had other settings of attention: `rotary` on
# or off, `rope_base`, `qkv_bias`, `output_bias`, `qk_norm` on or off, `norm_epsilon`. Format 3
# counted `training.evaluation_batches` in microbatches. In format 4 a router had `norm_order`.
FORMAT = 5
OLDEST = 2


def upgrade(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """A written config in the current layout.

    Raises:
      ValueError: it has a layout that cannot be read.
    """
    check_format(written)
    version = written["format"]
    if version < 3:
        written = convert_sections(written, attention_of_format_2)
    if version < 4:
        written = {**written, "training": training_of_format_3(written.get("training", {}))}
    if version < 5:
        written = convert_sections(written, router_of_format_4)
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


def convert_sections(value: Any, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A config after `convert` of each of its sections, inner ones first."""
    if isinstance(value, list | tuple):
        return type(value)(convert_sections(one, convert) for one in value)
    if not isinstance(value, Mapping):
        return value
    return convert({name: convert_sections(one, convert) for name, one in value.items()})


def attention_of_format_2(section: dict[str, Any]) -> dict[str, Any]:
    """Settings of attention in format 3, if the section has any; a missing one had its default.

    Attention is detected by its fields: a user's class derived from `Attention` has them too.
    """
    if "rope_base" not in section:
        return section
    base, epsilon = section.pop("rope_base"), section.pop("norm_epsilon", 1e-6)
    biases = "qkv" * section.pop("qkv_bias", False) + "o" * section.pop("output_bias", False)
    norm = {"kind": "rmsnorm", "epsilon": epsilon} if section.pop("qk_norm", False) else None
    rotary = {"kind": "rotary", "base": base} if section.pop("rotary", True) else None
    return {**section, "biases": list(biases), "qk_norm": norm, "rotary": rotary}


def router_of_format_4(section: dict[str, Any]) -> dict[str, Any]:
    """Settings of token choice in format 5, where an L_1 norm is the sum: `renormalize`.

    Raises:
      ValueError: gates had another norm.
    """
    if section.get("kind") != "token_choice" and "allow_constant_gate" not in section:
        return section
    order = section.pop("norm_order", None)
    require(order in (None, 1), "the norm of gates is their sum", f"norm_order={order}",
            "Use the release that wrote the config")  # fmt: skip
    return section if order is None else {**section, "renormalize": True}
