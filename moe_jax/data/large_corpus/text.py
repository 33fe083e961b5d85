"""Clean text out of HTML, source code and bytes of uncertain encoding."""

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

# Regular expressions of one comment.
C_COMMENTS = r"/\*.*?\*/|//[^\n]*"
HASH_COMMENTS = r"#[^\n]*"
SEMICOLON_COMMENTS = r";[^\n]*"
_LICENCE_WORDS = re.compile(r"(?i)copyright|licen[cs]e")
# A longer match is a file that is all comments, not a notice above code.
_LONGEST_NOTICE = 12_000


def decode(contents: bytes) -> str:
    """Decodes UTF-8, or Latin-1 where it is not UTF-8, and cleans the text.

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
    """Normalises what carries no meaning.

    Args:
        text: any text.

    Returns:
        The text in NFC, with line feeds alone, without control characters but tab and line
        feed, without spaces at line ends, without more than one empty line in a row, and
        without white space around it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = _CONTROL_CHARACTERS.sub("", unicodedata.normalize("NFC", text))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def html_text(markup: str) -> str:
    """Strips HTML, keeping the layout of `<pre>` where there is any.

    Args:
        markup: an HTML page or a part of one.

    Returns:
        Clean text with a line a block element.
    """
    visible = _INVISIBLE_ELEMENTS.sub(" ", markup)
    if "<pre" not in visible.lower():
        visible = re.sub(r"[ \t\r\n]+", " ", visible)
    return clean(html.unescape(_TAG.sub("", _BLOCK_TAG.sub("\n", visible))))


def html_lines(markup: str) -> list[str]:
    """Strips HTML to one line a block element, white space collapsed and empty lines left out.

    Args:
        markup: an HTML page or a part of one.

    Returns:
        The lines.
    """
    lines = (" ".join(line.split()) for line in html_text(markup).split("\n"))
    return [line for line in lines if line]


def without_licence_notice(code: str, comments: str) -> str:
    """Drops the comments that open a source file, if they hold a licence notice.

    In C, C++ and Java such notices are a quarter to two fifths of all long lines.

    Args:
        code: a source file.
        comments: regular expression of one comment, such as `C_COMMENTS`.

    Returns:
        The rest of the file.
    """
    match = re.match(rf"(?s)(?:#![^\n]*\n)?\s*(?:(?:{comments})\s*)+", code)
    if match and match.end() < _LONGEST_NOTICE and _LICENCE_WORDS.search(match.group()):
        return code[match.end() :]
    return code


def lines_in_script(lines: list[str], script: str) -> list[str]:
    """Drops lines of Latin letters that have none of a language's own: text left untranslated.

    Args:
        lines: of a text.
        script: the inside of a regular-expression class of the script's characters, such as
            `Ѐ-ӿ`; '' for a language in Latin script, which keeps every line.

    Returns:
        The lines that remain.
    """
    if not script:
        return lines
    own = re.compile(f"[{script}]")
    return [line for line in lines if own.search(line) or not re.search("[A-Za-z]", line)]
