"""JSON as its standard has it: every file and line that is written can be read by any reader."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """A value as JSON, in which null stands for NaN and for infinities.

    Python's own writer would put the words NaN and Infinity, which other readers refuse.

    Args:
      value: numbers, text, None, and mappings and sequences of them.
      options: of `json.dumps`, such as `indent=2`.

    >>> json_text({"loss": float("nan"), "load": [0.5, float("inf")]})
    '{"loss": null, "load": [0.5, null]}'
    """
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The same value with None for every float in it that is no number or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def numbers(value: Any) -> Any:
    """What was read where numbers were written: nan for None, alone or in lists.

    >>> numbers([0.5, None])
    [0.5, nan]
    """
    if isinstance(value, list):
        return [numbers(part) for part in value]
    return math.nan if value is None else value
