"""Compares runs: `python -m moe_jax.compare RUN... [--baseline=RUN] [--csv=FILE] [--out=DIR]`.

A RUN is a workdir, a folder of workdirs, or a pattern in quotes. Prints a table with a row per run:
the settings in which they differ, and their results. Then prints means over seeds. Configs that
were run with the same seeds are compared with one of them, the baseline, pair by pair. Unfinished,
failed and damaged runs are shown as such. A table that is wider than the terminal is continued
below; in a file or a pipe it is one. --out writes a page (compare.html) and its figure
(compare.png). docs/runs.md explains each column.
"""

import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from moe_jax import command_line
from moe_jax.analysis.names import printable
from moe_jax.analysis.table import ORDERS, csv_text, text_of

if TYPE_CHECKING:  # it takes seconds to import
    from moe_jax.analysis.comparison import Comparison
    from moe_jax.analysis.comparison_pairs import Pairs

PAGE_FILE, FIGURE_FILE = "compare.html", "compare.png"


def said(comparison: "Comparison", pairs: "Pairs", width: int | None = None) -> str:
    """What the command prints, in tables of at most `width` characters per line."""
    columns = [column for column in comparison.shown_columns if column.name != "note"]
    seeds = comparison.seed_columns
    wrong = [entry for entry in comparison.entries if entry.note]
    parts = [
        text_of(columns, width),
        f"Means over seeds:\n{text_of(seeds, width)}" if seeds else "",
        f"Paired differences:\n{text_of(pairs.columns, width)}" if pairs.columns else "",
        "\n".join(f"{entry.state}: {printable(f'{entry.name}: {entry.note}')}" for entry in wrong),
        "\n".join([*comparison.notes, *pairs.notes]),
    ]
    return "\n\n".join(filter(None, parts))


def write(comparison: "Comparison", pairs: "Pairs", out: pathlib.Path) -> pathlib.Path:
    """Writes the page and the figure into a directory, made if absent; returns the page's path."""
    from moe_jax.analysis.comparison_figure import comparison_png
    from moe_jax.analysis.comparison_page import comparison_page
    from moe_jax.files import write_atomically

    png = comparison_png(comparison)
    page = comparison_page(comparison, pairs, png)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / FIGURE_FILE, png)
    write_atomically(out / PAGE_FILE, page)
    return out / PAGE_FILE


def run(
    paths: Sequence[str | pathlib.Path], order: str, csv: str, out: str, baseline: str = ""
) -> None:
    """Prints the comparison of runs, and writes the requested files.

    Raises:
      ValueError: there is no run, the runs cannot be sorted like this, or the baseline is unknown.
    """
    from moe_jax.analysis.comparison import compare
    from moe_jax.analysis.comparison_pairs import pairs_of
    from moe_jax.analysis.runs import find_runs, read_entries
    from moe_jax.files import write_atomically

    comparison = compare(read_entries(find_runs(paths)), order)
    pairs = pairs_of(comparison, baseline)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(said(comparison, pairs, width))
    if csv:
        tables = (comparison.columns, comparison.seed_columns, pairs.columns)
        for path, columns in zip(csv_files(csv), tables, strict=True):
            if columns:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, csv_text(columns))
                print(f"wrote {path}")
    if out:
        page = write(comparison, pairs, pathlib.Path(out))
        print(f"wrote {page} and {FIGURE_FILE}")


def csv_files(name: str) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """The files of the three tables: of the runs, of means over seeds, of pairs of seeds."""
    file = pathlib.Path(name)
    return file, file.with_stem(f"{file.stem}_means"), file.with_stem(f"{file.stem}_pairs")


def main(paths: Sequence[str]) -> None:
    """Compares the runs that the command line names."""
    values = flags.FLAGS
    if values.csv:
        for file in csv_files(values.csv):
            command_line.require_file("csv", str(file), "run,")
    if values.out:
        command_line.require_folder("out", values.out)
    run(paths, values.sort, values.csv, values.out, values.baseline)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("sort", ORDERS[0], ORDERS, "What the runs are ordered by.")
    flags.DEFINE_string(
        "baseline", "", "A run of the config that the others are compared with, seed by seed; by "
        "default the first by name that was run with several seeds.",
    )  # fmt: skip
    flags.DEFINE_string(
        "csv", "", "A file for the table of the runs, numbers in full, such as runs.csv; means "
        "over seeds and paired differences go to runs_means.csv and runs_pairs.csv.",
    )  # fmt: skip
    flags.DEFINE_string("out", "", "A directory for the page and its figure.")


command = command_line.Command(main, define_flags, positional="RUN", uses_devices=False)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
