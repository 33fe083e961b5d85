"""Which layers are alike, so that repeated ones compile once."""

from typing import NamedTuple


class Pattern(NamedTuple):
    """Layers as `prefix`, then `unit` taken `repeats` times, then `suffix`.

    Attributes:
      prefix: for each layer before the repetition, whether it is MoE.
      unit: the layers that are repeated.
      repeats: how often, at least 1.
      suffix: the layers after the repetition.
    """

    prefix: tuple[bool, ...]
    unit: tuple[bool, ...]
    repeats: int
    suffix: tuple[bool, ...]


def find_pattern(is_moe: tuple[bool, ...]) -> Pattern:
    """The pattern with the fewest layers to compile; the earliest and shortest of equals.

    >>> find_pattern((False, True, True, True))
    Pattern(prefix=(False,), unit=(True,), repeats=3, suffix=())
    >>> find_pattern((False, True, False, True))
    Pattern(prefix=(), unit=(False, True), repeats=2, suffix=())
    """
    num_layers = len(is_moe)
    best = Pattern((), is_moe, 1, ())
    fewest = num_layers
    for start in range(num_layers):
        for period in range(1, (num_layers - start) // 2 + 1):
            unit = is_moe[start : start + period]
            end = start + period
            while is_moe[end : end + period] == unit:
                end += period
            compiled = num_layers - (end - start) + period
            if compiled < fewest:
                fewest = compiled
                repeats = (end - start) // period
                best = Pattern(is_moe[:start], unit, repeats, is_moe[end:])
    return best
