"""Standard JSON, which any reader can read."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """A value as JSON, with null in place of NaN and infinities.

    Python's own writer would write the words NaN and Infinity, which other readers refuse.

    Args:
      value: numbers, text, None, and mappings and sequences of them.
      options: of `json.dumps`, such as `indent=2`.

    >>> json_text({"loss": float("nan"), "load": [0.5, float("inf")]})
    '{"loss": null, "load": [0.5, null]}'
    """
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The same value with None in place of every NaN or infinite float."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def numbers(value: Any) -> Any:
    """Numbers read from JSON: replaces None by nan, also in lists.

    >>> numbers([0.5, None])
    [0.5, nan]
    """
    if isinstance(value, list):
        return [numbers(part) for part in value]
    return math.nan if value is None else value
