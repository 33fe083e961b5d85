"""Text cleaning, on small cases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data.large_corpus import text


@given(st.text())
def test_cleaning_is_idempotent(dirty):
    once = text.clean(dirty)
    assert text.clean(once) == once


def test_cleaning_keeps_what_is_visible():
    assert text.clean(" a \r\nb\u00a0c\x00\n\n\n\nd\te\u0301 ") == "a\nb c\n\nd\t\u00e9"


def test_bytes_that_are_not_utf8_are_read_as_latin1():
    assert text.decode("\u00e9t\u00e9".encode()) == "\u00e9t\u00e9"
    assert text.decode("\u00e9t\u00e9".encode("latin-1")) == "\u00e9t\u00e9"


def test_html_becomes_a_line_a_block():
    markup = "<head><title>no</title></head><p>A <b>bold</b>\n word &amp; more</p><ul><li>x</ul>"
    assert text.html_lines(markup) == ["A bold word & more", "x"]


def test_preformatted_html_keeps_its_layout():
    assert text.html_text("<p>code:</p><pre>if x:\n    y</pre>") == "code:\n\nif x:\n    y"


NOTICE = "/* Copyright 2001 A. Hacker.\n   All rights reserved. */\n// more\n"


def test_a_licence_notice_is_dropped_and_what_follows_kept():
    code = "#include <x.h>\nint main() {}"
    assert text.without_licence_notice(NOTICE + code, text.C_COMMENTS) == code


def test_other_opening_comments_are_kept():
    code = "/* Sorts a list. */\nint main() {}"
    assert text.without_licence_notice(code, text.C_COMMENTS) == code


@pytest.mark.parametrize(
    ("comments", "code"),
    [
        (text.HASH_COMMENTS, "#!/usr/bin/ruby\n# Licence: MIT\n\nputs 1"),
        (text.SEMICOLON_COMMENTS, ";;; x.el -- Copyright FSF\n\n;; GPL\nputs 1"),
    ],
)
def test_notices_in_line_comments_are_dropped(comments, code):
    assert text.without_licence_notice(code, comments) == "puts 1"


def test_untranslated_lines_are_dropped_where_the_script_shows_them():
    lines = ["привет", "Hello", "Файл: File", "123"]
    assert text.lines_in_script(lines, "\u0400-\u04ff") == ["привет", "Файл: File", "123"]
    assert text.lines_in_script(lines, "") == lines
