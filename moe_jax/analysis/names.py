"""Users' names of domains, files, runs and parts, in the form that each place can show."""

import functools
import re

LONGEST = 40  # characters of a name in a figure


def printable(name: str) -> str:
    r"""A name on one line, with escapes for characters that cannot be printed.

    >>> printable("a\nb")
    'a\\nb'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def in_figure(name: str, longest: int = LONGEST) -> str:
    r"""A name as matplotlib draws it: not mathematics, not hidden, and short.

    Matplotlib reads mathematics between two "$", and a legend omits names that start with "_". A
    character that no font has would be an empty box; its escape is distinguishable.

    >>> in_figure("a$b^$")
    'a\\$b^\\$'
    """
    drawn = "".join(
        c if ord(c) in _characters_of_fonts() else ascii(c)[1:-1] for c in printable(name)
    )
    if len(drawn) > longest:
        half = longest // 2
        drawn = f"{drawn[:half]}...{drawn[len(drawn) - half + 3 :]}"
    drawn = drawn.replace("$", r"\$")
    return f" {drawn}" if drawn.startswith("_") else drawn


def in_markdown(name: str) -> str:
    r"""A name as Markdown shows it: neither markup nor HTML. Tables escape their "|" themselves.

    >>> in_markdown("<b>*x* folio_1623")
    '&lt;b&gt;\\*x\\* folio_1623'
    """
    text = re.sub(r"([\\`*\[\]~$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(name))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of Markdown cells; with over two columns, all but the first align right."""
    align = ["---"] + ["---:" if len(header) > 2 else "---"] * (len(header) - 1)
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [header, align, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str) -> str:
    """A text as a block of code, within a fence longer than any in it."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}text\n{text}\n{fence}"


def in_code(text: str) -> str:
    """A line of text as code, within more backticks than any in it."""
    ticks = "`" * (1 + max([0, *map(len, re.findall("`+", text))]))
    space = " " * (len(ticks) > 1)
    return f"{ticks}{space}{printable(text)}{space}{ticks}"


@functools.cache
def _characters_of_fonts() -> frozenset[int]:
    """The code points that the figures' fonts contain."""
    import matplotlib  # takes half a second, and most names are not drawn
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found: set[int] = set()
    for family in FontProperties().get_family():
        for name in matplotlib.rcParams.get(f"font.{family}", [family]):
            try:
                path = findfont(FontProperties(family=name), fallback_to_default=False)
            except ValueError:  # not installed
                continue
            found.update(get_font(path).get_charmap())
    return frozenset(found)
