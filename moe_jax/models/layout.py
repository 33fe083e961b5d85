"""The layers of a stack, by the names of their parts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting

SEGMENTS = ("first", "unit", "last")
LayerNames = tuple[str, ...] | str


@dataclasses.dataclass(frozen=True)
class StackLayout(Settings):
    """The layers of a stack, by the names of their parts.

    A layer is a tuple of names, one per branch. A bare name is a part that is a whole layer.
    """

    first: tuple[Any, ...] = ()  # layers before the repeated unit
    unit: tuple[Any, ...] = (("attention", "moe"),)  # layers that are repeated together
    repeats: int = setting(4, at_least=0, at_most=10_000)  # of the unit
    last: tuple[Any, ...] = ()  # layers after the repeated unit
    shared: tuple[str, ...] = ()  # parts that run once before the layers; see `Call.shared`
    tied: tuple[str, ...] = ()  # parts of the unit whose layers share one copy of parameters
    causal: bool = True  # no token sees later ones
    allow_lookahead: bool = False  # accept parts that look at later tokens in a causal stack

    def check(self) -> None:
        """See `Settings`; lists become tuples."""
        for segment in SEGMENTS:
            layers = getattr(self, segment)
            require(
                all(isinstance(layer, str | tuple | list) for layer in layers),
                "a layer must be a tuple of names of parts, or one name",
                f"{segment}={layers}",
                "Correct it",
            )
            require(all(layers), "a layer must name at least one part", f"{segment}={layers}",
                    "Leave it out")  # fmt: skip
            layers = tuple(one if isinstance(one, str) else tuple(one) for one in layers)
            object.__setattr__(self, segment, layers)
        for names in ("shared", "tied"):
            object.__setattr__(self, names, tuple(getattr(self, names)))
        require(
            self.num_layers >= 1 and bool(self.unit) == (self.repeats > 0),
            "a stack needs layers, and a unit needs repeats of at least 1",
            f"first={self.first}, unit={self.unit}, repeats={self.repeats}, last={self.last}",
            "Set repeats=0 without a unit, and at least 1 with one",
        )

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.first) + len(self.unit) * self.repeats + len(self.last)

    @property
    def layers(self) -> tuple[LayerNames, ...]:
        """Every layer in order."""
        return self.first + self.unit * self.repeats + self.last

    @property
    def names(self) -> set[str]:
        """Names of all parts in use."""
        layers = ((layer,) if isinstance(layer, str) else layer for layer in self.layers)
        return {name for layer in layers for name in layer} | set(self.shared)

    @classmethod
    def of(cls, layers: Sequence[LayerNames], **settings: Any) -> "StackLayout":
        """The layout of these layers with the fewest compiled layers.

        Among equals it has the earliest, then the shortest unit.

        >>> layout = StackLayout.of(["dense", "moe", "moe", "moe"])
        >>> layout.first, layout.unit, layout.repeats, layout.last
        (('dense',), ('moe',), 3, ())
        """
        layers = tuple(layer if isinstance(layer, str) else tuple(layer) for layer in layers)
        best: tuple[Any, ...] = ((), layers, 1, ())
        fewest = len(layers)
        for start in range(len(layers)):
            for period in range(1, (len(layers) - start) // 2 + 1):
                unit = layers[start : start + period]
                end = start + period
                while layers[end : end + period] == unit:
                    end += period
                compiled = len(layers) - (end - start) + period
                if compiled < fewest:
                    fewest = compiled
                    best = (layers[:start], unit, (end - start) // period, layers[end:])
        first, unit, repeats, last = best
        return cls(first=first, unit=unit, repeats=repeats, last=last, **settings)
