"""A comparison as one self-contained HTML page; every text in it is escaped."""

import base64
import html
from collections.abc import Sequence

from moe_jax.analysis.comparison import Comparison
from moe_jax.analysis.comparison_pairs import Pairs
from moe_jax.analysis.table import Column

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Comparison of {count} runs</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; }}
th {{ vertical-align: bottom; overflow-wrap: anywhere; min-width: 4em; }}
.text {{ text-align: left; }}
img {{ max-width: 100%; }}
.failed td, .damaged td {{ background: #fbe3d6; }}
.unfinished td {{ color: #777; }}
</style></head><body>
<h1>Comparison of {count} runs</h1>
{notes}
<div>{runs}</div>
{seeds}
{pairs}
<figure><img src="data:image/png;base64,{figure}" alt="Held-out and training loss of the runs">
<figcaption>Held-out bits/byte and training loss against steps, tokens, model FLOPs and time. Seeds
of one config have one colour. A dot is a final score on the whole held-out split, where the curve
is of a sample of it.</figcaption></figure>
</body></html>
"""


def comparison_page(comparison: Comparison, pairs: Pairs, png: bytes) -> str:
    """The page: notes, the runs, means over seeds, pairs, the figure.

    Args:
      comparison: what is shown.
      pairs: the paired differences of its configs.
      png: its figure.
    """
    seeds = comparison.seed_columns
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in [*comparison.notes, *pairs.notes])
    heading, paired = "<h2>Means over seeds</h2>", "<h2>Paired differences</h2>"
    return PAGE.format(
        count=len(comparison.entries),
        notes=f"<ul>{notes}</ul>" if notes else "",
        runs=html_table(comparison.shown_columns, [entry.state for entry in comparison.entries]),
        seeds=f"{heading}<div>{html_table(seeds)}</div>" if seeds else "",
        pairs=f"{paired}<div>{html_table(pairs.columns)}</div>" if pairs.columns else "",
        figure=base64.b64encode(png).decode(),
    )


def html_table(columns: Sequence[Column], classes: Sequence[str] = ()) -> str:
    """An HTML table; `classes` are the CSS classes of its rows."""
    kinds = [' class="text"' if column.is_text else "" for column in columns]
    heads = (
        f"<th{kind}>{html.escape(column.title)}</th>"
        for kind, column in zip(kinds, columns, strict=True)
    )
    lines = [f"<tr>{''.join(heads)}</tr>"]
    for place, row in enumerate(zip(*(column.cells() for column in columns), strict=True)):
        cells = (
            f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)
        )
        name = f' class="{html.escape(classes[place])}"' if classes else ""
        lines.append(f"<tr{name}>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"
