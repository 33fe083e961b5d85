"""How a setting is refused: the rule, the value that broke it, what to change."""

from collections.abc import Iterable
from typing import Any


def require(condition: bool, rule: str, got: str, fix: str) -> None:
    """Raises `ValueError` unless the condition holds.

    Args:
      condition: what must be true.
      rule: the rule in words, naming the field by its config path.
      got: the values that broke it.
      fix: what to change.

    Raises:
      ValueError: "<rule>: <got>. <fix>."
    """
    if not condition:
        raise ValueError(f"{rule}: {got}. {fix}.")


def require_choice(field: str, value: Any, known: Iterable[str]) -> None:
    """Raises `ValueError` unless `value` is one of the known names."""
    names = sorted(known)
    require(value in names, f"{field} is one of {names}", f"{field}={value!r}", "Use a known name")


def require_at_least(field: str, value: float, least: float) -> None:
    """Raises `ValueError` unless `least <= value < infinity`."""
    require(
        least <= value < float("inf"),
        f"{field} is at least {least} and finite",
        f"{field}={value}",
        "Change it",
    )


def require_positive(field: str, value: float) -> None:
    """Raises `ValueError` unless `0 < value < infinity`."""
    require(
        0 < value < float("inf"), f"{field} is positive and finite", f"{field}={value}", "Change it"
    )


def require_fraction(field: str, value: float) -> None:
    """Raises `ValueError` unless `0 <= value < 1`."""
    require(0 <= value < 1, f"{field} lies in [0, 1)", f"{field}={value}", f"Change {field}")
