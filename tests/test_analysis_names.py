"""Names of all kinds in figures and in Markdown."""

import numpy as np
import pytest
from matplotlib.image import imread

from moe_jax.analysis import figures
from moe_jax.analysis.drawing import Figure, stamp
from moe_jax.analysis.names import fenced, in_code, in_figure, in_markdown, printable

NAMES = (
    "a$b^$", "$\\frac{$", "\\$", "_hidden", "x" * 300, "中文", "й ع é", "a\nb", "\udcff",
    "<b>&|`*[x](y)",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prose", "prose"),
        ("folio_1623", "folio_1623"),
        ("a$b^$", r"a\$b^\$"),
        ("_hidden", " _hidden"),
        ("中", r"\u4e2d"),  # missing from matplotlib's fonts
        ("x" * 50 + "end", "x" * 20 + "..." + "x" * 14 + "end"),
        ("a\nb", r"a\nb"),
    ],
)
def test_a_name_in_a_figure(name, expected):
    assert in_figure(name) == expected


def test_every_name_is_drawn_as_it_is():
    """No warning, no error, and a legend with all names."""
    curve = (np.array([1, 2]), np.array([2.0, 1.0]))
    figure = figures.loss_figure(curve, {}, dict.fromkeys(NAMES, curve))
    legend = figure.axes[1].get_legend()
    assert len(legend.get_texts()) == len(NAMES)
    stamp(figure, "sees later tokens")._repr_png_()
    assert not any(text._preprocess_math(text.get_text())[1] for text in legend.get_texts())
    share = {name: [0.5, 0.5] for name in NAMES}
    figures.domain_figure({"layer_00": share}, text="a$b^$.txt")._repr_png_()


def test_a_notebook_shows_a_figure_without_pyplot(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(Figure(figsize=(2, 1))._repr_png_())
    assert imread(path).shape[:2] == (110, 220)


def test_a_stamp_is_drawn_only_if_there_is_something_to_say():
    assert not stamp(Figure(), "").texts
    assert stamp(Figure(), "sees later tokens").texts[0].get_text() == "sees later tokens"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("folio_1623", "folio_1623"),
        ("_a_", r"\_a\_"),
        ("<script>&", "&lt;script&gt;&amp;"),
        ("[x](y) `*~$", r"\[x\](y) \`\*\~\$"),
        ("a\r\nb\\", r"a\\r\\nb\\"),
    ],
)
def test_a_name_in_markdown(name, expected):
    assert in_markdown(name) == expected


def test_a_fence_is_longer_than_any_in_the_text():
    assert fenced("a") == "```text\na\n```"
    assert fenced("```").startswith("````text\n")
    assert in_code("a") == "`a`" and in_code("a`b") == "`` a`b ``"


@pytest.mark.parametrize("name", NAMES)
def test_a_printable_name_is_one_line_of_utf8(name):
    assert printable(name).isprintable() and printable(name).encode()
