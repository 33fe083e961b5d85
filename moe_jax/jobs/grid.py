"""The grid of a sweep: parses `--set NAME=VALUE,VALUE`, and names the points."""

import dataclasses
import difflib
import hashlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moe_jax.config.check import require

PRESETS = "presets"  # in place of a setting: what follows the colon of --config=FILE:PRESET
NO_PRESET = "none"
MAX_NAME = 120  # characters in the name of a directory


@dataclasses.dataclass(frozen=True)
class Axis:
    """Settings that vary together, and their values as text."""

    names: tuple[str, ...]
    values: tuple[str, ...]

    def points(self) -> list[tuple[tuple[str, str], ...]]:
        """The settings and values of each point of this axis."""
        return [tuple((name, value) for name in self.names) for value in self.values]


def parse_axis(text: str) -> Axis:
    """Parses an axis: "optimizer.learning_rate=1e-3,3e-3", "seed,data.seed=0,1,2".

    Raises:
      ValueError: a name or a value is missing, or a value is repeated.
    """
    left, equals, right = text.partition("=")
    names = tuple(re.sub(r"^(--)?config\.", "", name.strip()) for name in left.split(","))
    values = tuple(split_values(right))
    require(
        bool(equals) and all(names) and all(values),
        "--set varies a setting, NAME=VALUE,VALUE",
        f"--set={text}",
        "Write, for example, --set=optimizer.learning_rate=1e-3,3e-3",
    )
    require(
        len(set(values)) == len(values),
        "the values of --set must differ",
        f"--set={text}",
        "Remove what comes twice",
    )
    return Axis(names, values)


def split_values(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes.

    >>> split_values("1e-3,(1, 2),'a,b'")
    ['1e-3', '(1, 2)', "'a,b'"]
    """
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def without_quotes(text: str) -> str:
    """Removes the pair of quotes around a text, which protects its commas.

    >>> without_quotes("'a,b'"), without_quotes("'a' or 'b'"), without_quotes("a")
    ('a,b', "'a' or 'b'", 'a')
    """
    found = re.fullmatch(r"(['\"])((?:(?!\1).)*)\1", text, re.DOTALL)
    return found[2] if found else text


def grid(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Every combination, the last axis fastest: texts of the values by setting."""
    for point in itertools.product(*(axis.points() for axis in axes)):
        yield dict(pair for pairs in point for pair in pairs)


def check_names(axes: Sequence[Axis], settings: Collection[str]) -> None:
    """Refuses names that are not settings, and settings that are varied twice.

    Args:
      axes: axes of the grid.
      settings: dotted paths of all settings, without "config.".

    Raises:
      ValueError: naming the setting that may be meant.
    """
    names = [name for axis in axes for name in axis.names]
    for name in names:
        require(names.count(name) == 1, "a setting may be varied only once",
                f"--config.{name} in two --set", "Put its values in one")  # fmt: skip
        inside = [one for one in settings if one.startswith(f"{name}.")]
        varied = [one for one in sorted(inside) if not one.endswith(".kind")]
        require(
            not inside,
            "--set varies a setting, not a section; the kind of a part comes from the config file "
            f"or a preset (--set={PRESETS}=...)",
            f"--config.{name} has {len(varied)} settings"
            + f", such as {', '.join(varied[:3])}" * bool(varied),
            "Vary these, or a preset",
        )
        if name not in settings and name != PRESETS:
            raise ValueError(
                f"--set varies a setting of the config: there is no --config.{name}. "
                + proposal(name, settings)
            )


def proposal(name: str, settings: Collection[str]) -> str:
    """A proposal of what the user may have meant."""
    last = name.rpartition(".")[2]
    ends = [one for one in sorted(settings) if one.rpartition(".")[2] == last]
    near = ends or difflib.get_close_matches(name, sorted(settings), n=1)
    if not near:
        by_last = {one.rpartition(".")[2]: one for one in sorted(settings)}
        near = [by_last[one] for one in difflib.get_close_matches(last, by_last, n=1)]
    return f"Did you mean --set={near[0]}=...?" if near else "Correct the name."


def names_of(axes: Sequence[Axis], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The directory name of each point: what differs, "learning_rate=0.001,seed=0".

    Args:
      axes: axes of the grid.
      points: the values of the settings, as the config has them, by name.
    """
    firsts = [axis.names[0] for axis in axes]
    shown = {name: short_name(name, firsts) for name in firsts}
    names = []
    for point in points:
        whole = ",".join(f"{shown[name]}={value_text(point[name])}" for name in firsts)
        name = re.sub(r"[^\w.,=+-]+", "_", whole)
        if name != whole or len(name) > MAX_NAME:
            digest = hashlib.sha256(whole.encode()).hexdigest()[:6]
            name = f"{name[: MAX_NAME - 7]}_{digest}"
        names.append(name)
    return names


def short_name(name: str, among: Sequence[str]) -> str:
    """The shortest ending, in whole words, that only this setting's name has.

    >>> short_name("data.seed", ["data.seed", "seed"]), short_name("optimizer.b1", ["optimizer.b1"])
    ('data.seed', 'b1')
    """
    words = name.split(".")
    for count in range(1, len(words)):
        short = ".".join(words[-count:])
        if sum(f".{other}".endswith(f".{short}") for other in among) == 1:
            return short
    return name


def value_text(value: Any) -> str:
    """A value as text in a directory's name: 0.001, even if 1e-3 was written."""
    return value if isinstance(value, str) else repr(value)
