"""A table as columns of values: for a terminal, for a page, for a CSV file."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

from moe_jax.analysis.names import printable

ORDERS = ("bits_per_byte", "nats_per_token", "name", "tokens_per_s")  # of the runs in a comparison


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the tables.

    Attributes:
      name: its name in a CSV file; for a setting, its flag without the dashes.
      title: its title for readers.
      values: one per row; None if there is none.
      spec: the format of numbers, for readers.
      marks: what follows the value of each row, for readers.
    """

    name: str
    title: str
    values: tuple[Any, ...]
    spec: str = ""
    marks: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the column is left-aligned."""
        return any(isinstance(value, str) for value in self.values)

    def cells(self) -> list[str]:
        """The values as people read them."""
        marks = self.marks or ("",) * len(self.values)
        return [
            plain(value, self.spec) + mark for value, mark in zip(self.values, marks, strict=True)
        ]


def of_all(name: str, title: str, counts: Iterable[int], wholes: Iterable[int]) -> Column:
    """A column such as "3 of 5"; a complete count appears as "5"."""
    values = tuple(counts)
    marks = (f" of {all_}" * (one < all_) for one, all_ in zip(values, wholes, strict=True))
    return Column(name, title, values, "", tuple(marks))


def plain(value: Any, spec: str = "") -> str:
    """A value as people read it."""
    if value is None or value == "":
        return "-"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return format(value, spec) if is_number else printable(str(value))


def csv_text(columns: Sequence[Column]) -> str:
    """A table as the text of a CSV file: a header, a row per run, numbers in full."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows(zip(*(column.values for column in columns), strict=True))
    return stream.getvalue()


def text_of(columns: Sequence[Column], width: int | None = None, most: int = 48) -> str:
    """A table for a terminal: titles broken at dots, cells cut, numbers to the right.

    Args:
      columns: its columns.
      width: characters per line. A wider table is continued below, with its first column repeated.
        None: no limit.
      most: characters per cell.
    """
    height = max(len(broken(column.title)) for column in columns)
    first, *others = (aligned(column, height, most) for column in columns)
    bands = [[first]]
    for cells in others:
        wide = sum(len(some[0]) + 2 for some in bands[-1]) + len(cells[0])
        if width is not None and wide > width and len(bands[-1]) > 1:
            bands.append([first])
        bands[-1].append(cells)
    lines_of = (("  ".join(line).rstrip() for line in zip(*band, strict=True)) for band in bands)
    return "\n\n".join("\n".join(filter(None, lines)) for lines in lines_of)


def aligned(column: Column, height: int, most: int) -> list[str]:
    """The title of a column in `height` lines and its cells, padded to one width."""
    title = broken(column.title)
    body = (cut(cell, most) for cell in column.cells())
    cells = [*[""] * (height - len(title)), *title, *body]
    width = max(map(len, cells))
    return [cell.ljust(width) if column.is_text else cell.rjust(width) for cell in cells]


def broken(title: str, most: int = 24) -> list[str]:
    """A title in lines, broken after dots and commas if it is long."""
    lines = [""]
    for piece in title.replace(".", ".\0").replace(", ", ", \0").split("\0"):
        if lines[-1] and len(lines[-1] + piece) > most:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def cut(cell: str, most: int) -> str:
    """A cell of at most `most` characters, with the middle left out."""
    return cell if len(cell) <= most else f"{cell[: most // 2 - 1]}...{cell[-most // 2 + 2 :]}"
