"""Settings that check themselves: the base class of every config section and of every part."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from moe_jax.config.check import require


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The allowed values of a setting; None: no such bound.

    NaN and infinity are never allowed, nor an integer beyond int32 without an upper bound. A float
    must also satisfy the bounds as float32, its type on a device: 1 - 1e-9 is 1 there.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None

    def describe(self) -> str:
        """The rule in words, such as "lies in [0, 1)" or "is one of ['ceil', 'floor']"."""
        if self.choices is not None:
            return f"is one of {list(self.choices)}"
        low = "(-inf" if self.above is None else f"({self.above:.12g}"
        low = low if self.at_least is None else f"[{self.at_least:.12g}"
        high = "inf)" if self.below is None else f"{self.below:.12g})"
        high = high if self.at_most is None else f"{self.at_most:.12g}]"
        return f"lies in {low}, {high}"

    def allow(self, value: Any) -> bool:
        """Whether a value satisfies the bounds."""
        if self.choices is not None:
            return value in self.choices
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        return self._contain(value) and self._contain(self.as_used(value))

    def as_used(self, value: Any) -> Any:
        """The number on a device; an integer with an upper bound may be beyond int32."""
        bounded = self.below is not None or self.at_most is not None
        return value if bounded and isinstance(value, numbers.Integral) else on_device(value)

    def _contain(self, value: Any) -> bool:
        return bool(
            float("-inf") < value < float("inf")
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def on_device(value: Any) -> Any:
    """A number as int32 or float32; infinity or 0 if it is out of range."""
    if isinstance(value, numbers.Integral):
        return value if abs(int(value)) < 2**31 else float("inf")
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


def rounded(value: Any, bounds: Bounds) -> str:
    """The number that a value becomes on a device, as ", in float32 1"; "" if it is equal."""
    if not isinstance(value, numbers.Real) or value != value or bounds.as_used(value) == value:
        return ""
    integral = isinstance(value, numbers.Integral)
    return ", beyond int32" if integral else f", in float32 {on_device(value):g}"


def setting(
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] | None = None,
    changes_results: bool = True,
) -> Any:
    """A field of `Settings` with bounds, which are checked when an object is made.

    `changes_results=False` declares that a run may continue with another value, such as another
    mesh: its steps stay the same except for rounding.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Noise(Settings):
    ...     std: float = setting(0.1, at_least=0)
    >>> Noise(std=-1.0)
    Traceback (most recent call last):
    ValueError: std lies in [0, inf): std=-1.0. The default is 0.1.
    """
    known = None if choices is None else tuple(choices)
    bounds = Bounds(at_least, above, at_most, below, known)
    metadata: dict[str, Any] = {"changes_results": changes_results}
    if bounds != Bounds():
        metadata["bounds"] = bounds
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field[Any], bounds: Bounds) -> str:
    """The fix for a value out of bounds: the default, if there is one."""
    if field.default is dataclasses.MISSING:
        return "Name one of them" if bounds.choices is not None else "Use a value within"
    return f"The default is {field.default!r}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A frozen dataclass whose fields are settings.

    Attributes:
      family: the table of kinds (`config.kinds`) that a subclass belongs to; "" for a section with
        only one kind.
    """

    family: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Checks every bounded field, then calls `check`."""
        for field in dataclasses.fields(self):
            bounds, value = field.metadata.get("bounds"), getattr(self, field.name)
            if bounds is None or value is None:
                continue
            values = value if isinstance(value, tuple) else (value,)
            bad = [one for one in values if not bounds.allow(one)]
            require(
                not bad,
                f"{field.name} {bounds.describe()}",
                f"{field.name}={value!r}{''.join(rounded(one, bounds) for one in bad)}",
                default_of(field, bounds),
            )
        self.check()

    def check(self) -> None:
        """Checks fields against each other.

        Raises:
          ValueError: they break a rule; see `require`.
        """
