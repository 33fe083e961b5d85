"""Extracts clean text from HTML, source code and bytes of uncertain encoding."""

import html
import re
import unicodedata

_INVISIBLE_ELEMENTS = re.compile(
    r"(?is)<(script|style|head|header|aside|nav|footer|button|svg|noscript)\b.*?</\1\s*>"
)
_BLOCK_TAG = re.compile(
    r"(?i)</?(p|div|h[1-6]|li|ul|ol|tr|table|pre|blockquote|dt|dd|section|article|br)\b[^>]*>"
)
_TAG = re.compile(r"(?s)<[^>]*>")
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

# Regular expressions that match one comment.
C_COMMENTS = r"/\*.*?\*/|//[^\n]*"
HASH_COMMENTS = r"#[^\n]*"
SEMICOLON_COMMENTS = r";[^\n]*"
_LICENCE_WORDS = re.compile(r"(?i)copyright|licen[cs]e")
# A longer match is a file of only comments, not a notice above code.
_LONGEST_NOTICE = 12_000


def decode(contents: bytes) -> str:
    """Decodes UTF-8, or else Latin-1, and cleans the text.

    Args:
        contents: a file.

    Returns:
        The text; see `clean`.
    """
    try:
        return clean(contents.decode())
    except UnicodeDecodeError:
        return clean(contents.decode("latin-1"))


def clean(text: str) -> str:
    """Normalises Unicode and white space, and removes control characters.

    Args:
        text: any text.

    Returns:
        The text in NFC, with line feeds as line ends, no control characters except tab and line
        feed, no spaces at line ends, at most one empty line in a row, and no white space around
        it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = _CONTROL_CHARACTERS.sub("", unicodedata.normalize("NFC", text))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def html_text(markup: str) -> str:
    """Strips HTML; keeps line breaks and spaces if the markup has a `<pre>`.

    Args:
        markup: an HTML page or a part of one.

    Returns:
        Clean text with one line per block element.
    """
    visible = _INVISIBLE_ELEMENTS.sub(" ", markup)
    if "<pre" not in visible.lower():
        visible = re.sub(r"[ \t\r\n]+", " ", visible)
    return clean(html.unescape(_TAG.sub("", _BLOCK_TAG.sub("\n", visible))))


def html_lines(markup: str) -> list[str]:
    """Strips HTML to one line per block element, without repeated spaces or empty lines.

    Args:
        markup: an HTML page or a part of one.

    Returns:
        The lines.
    """
    lines = (" ".join(line.split()) for line in html_text(markup).split("\n"))
    return [line for line in lines if line]


def without_licence_notice(code: str, comments: str) -> str:
    """Drops the comments at the start of a source file if they contain a licence notice.

    In C, C++ and Java such notices are a quarter to two fifths of all long lines.

    Args:
        code: a source file.
        comments: regular expression that matches one comment, such as `C_COMMENTS`.

    Returns:
        The rest of the file.
    """
    match = re.match(rf"(?s)(?:#![^\n]*\n)?\s*(?:(?:{comments})\s*)+", code)
    if match and match.end() < _LONGEST_NOTICE and _LICENCE_WORDS.search(match.group()):
        return code[match.end() :]
    return code


def lines_in_script(lines: list[str], script: str) -> list[str]:
    """Drops untranslated lines: Latin letters, and no character of the language's own script.

    Args:
        lines: the lines of a text.
        script: the script's characters as the inside of a regular-expression class, such as
            `Ѐ-ӿ`; '' for Latin script, which keeps every line.

    Returns:
        The lines that remain.
    """
    if not script:
        return lines
    own = re.compile(f"[{script}]")
    return [line for line in lines if own.search(line) or not re.search("[A-Za-z]", line)]
