"""Capacity rules of other systems, by name: fields of `capacity.Capacity`."""

import dataclasses
from typing import Any

from moe_jax.config.check import require
from moe_jax.config.kinds import load_kind
from moe_jax.config.settings import Settings

# What each system computes, including its queue, read from its source. DeepSpeed's entry is its
# top-2 gate; its top-1 gate serves tokens at random.
PRESETS: dict[str, dict[str, Any]] = {
    "mesh_tensorflow": {
        "per": "token", "rounding": "floor", "minimum": 4, "queue": "choice_major",
    },
    "flaxformer": {
        "per": "token", "rounding": "nearest", "minimum": 4, "queue": "choice_major",
    },
    "vmoe": {"rounding": "ceil", "multiple_of": 4, "queue": "choice_major"},
    "maxtext": {"rounding": "floor", "round_mean_up": True, "queue": "token_major"},
    "megatron": {"rounding": "ceil", "queue": "probability"},
    "deepspeed": {"rounding": "ceil", "minimum": 4, "queue": "choice_major"},
    "tutel": {
        "per": "choice", "rounding": "floor", "round_mean_up": True, "queue": "choice_major",
    },
    "megablocks": {"rounding": "floor", "queue": "token_major"},
    "olmo_core": {"rounding": "floor", "multiple_of": 8, "queue": "token_major"},
    "simply": {"per": "token", "rounding": "floor", "queue": "token_major"},
    "axlearn": {
        "per": "token", "rounding": "floor", "multiple_of": 4, "queue": "choice_major",
    },
}  # fmt: skip


def preset_fields(given: Settings, preset: str) -> dict[str, Any]:
    """The fields of a preset; none for "".

    Args:
      given: a `Capacity`, whose other fields are at their defaults or agree with the preset.
      preset: a name of `PRESETS`.

    Raises:
      ValueError: the name is unknown, or a field is set to another value.
    """
    if not preset:
        return {}
    known = f"preset is one of {sorted(PRESETS)}"
    require(preset in PRESETS, known, f"preset={preset!r}", "Use a known name")
    fields = dict(PRESETS[preset])
    fields["queue"] = load_kind("queue", str(fields["queue"]))()
    for field in dataclasses.fields(given):
        if field.name in fields:
            value, own = fields[field.name], getattr(given, field.name)
            require(
                own in (field.default, value),
                f"preset={preset!r} sets {field.name}={value!r}",
                f"{field.name}={own!r} as well",
                f"Drop {field.name}, or the preset",
            )
    return fields
