"""Rotary positions in a config.json: today's "rope_parameters", and "rope_theta" + "rope_scaling".

Source: `modeling_rope_utils.py` of transformers.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.family import Reader
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    RotaryScaling,
    Yarn,
)

# Default "max_position_embeddings" by "model_type"; 2,048 for others.
LONGEST = {
    "olmoe": 4096, "deepseek_v3": 4096,
    "qwen2": 32_768, "qwen3": 32_768, "qwen2_moe": 32_768, "qwen3_moe": 32_768,
    "mistral": 131_072, "mixtral": 131_072, "phimoe": 131_072, "gpt_oss": 131_072,
    "llama4": 131_072, "llama4_text": 131_072,
}  # fmt: skip

# "model_type" of models whose positions transformers 4 scales if a file has no "rope_scaling".
SCALED = ("gpt_oss",)


def read_rotary(
    config: Reader, head_dim: int, *, theta: float = 10_000.0, interleaved: bool = False
) -> Rotary:
    """The rotary positions of a config.json.

    Args:
      config: of the model.
      head_dim: of queries; only a fraction of it may be rotated.
      theta: default base.
      interleaved: whether the family pairs features (2j, 2j + 1).

    Raises:
      ValueError: the scaling is unknown or lacks a factor, or there is a fraction without scaling:
        transformers rotates all dims then.
    """
    theta_beside, rope = config.get("rope_theta"), rope_of(config)
    rope = {**rope, "rope_theta": rope.get("rope_theta") or theta_beside}
    fraction = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    base = float(rope.get("rope_theta") or theta)
    turning = int(head_dim * fraction)
    dim = None if turning == head_dim else turning
    scaling = read_scaling(config, rope)
    require(
        dim is None or scaling is not None,
        "partial_rotary_factor needs a rope_type other than 'default', which turns all of a head",
        f"partial_rotary_factor={fraction}",
        "Remove it, or set it to 1",
    )
    return Rotary(base, dim, interleaved, scaling)


def rope_of(config: Reader) -> Mapping[str, Any]:
    """The settings of rotary positions; of two dicts, transformers reads only the older."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    rope: Mapping[str, Any] = older or newer or {}
    return rope


def read_scaling(config: Reader, rope: Mapping[str, Any]) -> RotaryScaling | None:
    """The scaling of frequencies, by its "rope_type"."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    family = config.settings.get("model_type", "")
    longest = config.get("max_position_embeddings", LONGEST.get(family, 2048))
    outside = config.get("original_max_position_embeddings")  # Phi keeps it there
    original = outside or rope.get("original_max_position_embeddings") or longest
    known = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    require(kind in known, f"rope_type must be one of {known}", f"{kind!r}", "Add its scaling")
    if kind == "default":
        return None
    needed = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
    }
    lacks = [name for name in needed.get(kind, ()) if rope.get(name) is None]
    require(
        not lacks, f"rope_type={kind!r} needs {' and '.join(needed.get(kind, ()))}",
        f"{dict(rope)} lacks {lacks}", "Add them",
    )  # fmt: skip
    if kind == "longrope":
        return LongRope(
            short_factors=tuple(map(float, rope["short_factor"])),
            long_factors=tuple(map(float, rope["long_factor"])),
            original_length=original,
            factor=float(rope.get("factor") or longest / original),
            attention_factor=rope.get("attention_factor"),
        )
    factor = float(rope.get("factor") or (longest / original if kind == "yarn" else 0))
    require(factor > 0, f"rope_type={kind!r} needs a factor", f"{dict(rope)}", "Add it")
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "dynamic":
        return DynamicScaling(factor, longest)  # transformers reads no other length
    if kind == "llama3":
        return Llama3Scaling(
            factor, float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original
        )
    return Yarn(
        factor=factor,
        original_length=original,
        fast_turns=float(rope.get("beta_fast") or 32),
        slow_turns=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate", True),
        attention_factor=rope.get("attention_factor"),
        mscale=float(rope.get("mscale") or 0),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )


def rope_settings(rotary: Rotary | None, head_dim: int) -> dict[str, Any]:
    """The config.json settings for these positions; the inverse of `read_rotary`."""
    if rotary is None:
        return {}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    if rotary.dim is not None:
        rope["partial_rotary_factor"] = rotary.dim / head_dim
    scaling, longest = rotary.scaling, {}
    if isinstance(scaling, DynamicScaling):
        longest = {"max_position_embeddings": scaling.original_length}
    if scaling is not None:
        rope |= scaling_settings(scaling)
        if "original_max_position_embeddings" in rope:
            original = rope["original_max_position_embeddings"]
            longest = {"max_position_embeddings": round(original * rope["factor"])}
    return {"rope_parameters": rope, **longest}


def rope_of_transformers_4(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same positions as "rope_theta" and "rope_scaling", the only ones of transformers 4.

    Args:
      settings: a config.json with "rope_parameters" if the model has rotary positions.

    Returns:
      Settings to write beside "rope_parameters"; transformers 5 and `read_rotary` read either form.
    """
    rope = settings.get("rope_parameters")
    if not rope:
        return {}
    outside, kind = ("rope_theta", "partial_rotary_factor"), rope["rope_type"]
    older: dict[str, Any] = {name: rope[name] for name in outside if name in rope}
    if kind != "default" or settings.get("model_type") in SCALED:
        older["rope_scaling"] = {name: one for name, one in rope.items() if name not in outside}
    if kind == "longrope":
        older["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return older


def scaling_settings(scaling: RotaryScaling) -> dict[str, Any]:
    """The settings of one scaling; optional settings that are unset are left out."""
    original = {"original_max_position_embeddings": getattr(scaling, "original_length", 0)}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, DynamicScaling):
        return {"rope_type": "dynamic", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        turns = {"low_freq_factor": scaling.low_turns, "high_freq_factor": scaling.high_turns}
        return {"rope_type": "llama3", "factor": scaling.factor, **turns, **original}
    attention = {}
    if isinstance(scaling, LongRope | Yarn) and scaling.attention_factor is not None:
        attention = {"attention_factor": scaling.attention_factor}
    if isinstance(scaling, LongRope):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "factor": scaling.factor,
            **original,
            **attention,
        }
    require(
        isinstance(scaling, Yarn), "a scaling can be written only if transformers has it",
        repr(scaling), "Use another",
    )  # fmt: skip
    assert isinstance(scaling, Yarn)
    mscales = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "beta_fast": scaling.fast_turns,
        "beta_slow": scaling.slow_turns,
        "truncate": scaling.truncate,
        **{name: value for name, value in mscales.items() if value},
        **original,
        **attention,
    }
