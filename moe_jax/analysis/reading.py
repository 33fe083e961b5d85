"""Tokens in readable form: characters joined from bytes, and names of tokens."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.data import Tokenizer

# Visible signs for characters that cannot be seen.
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\0": "␀"})


class Cell(NamedTuple):
    """Some consecutive tokens that make up whole characters; most often one.

    Attributes:
      text: the characters; empty for a token that is not text. Bytes that are not UTF-8 are U+FFFD.
      first: index of the first token.
      num_tokens: how many tokens.
    """

    text: str
    first: int
    num_tokens: int


def readable_cells(pieces: Sequence[bytes], begins: Sequence[bool]) -> list[Cell]:
    """Joins tokens until each piece of text has whole characters.

    A byte tokenizer cuts the letter e with an accent in two, and a window may cut any text within a
    character. A character that is incomplete at the end of a document is closed there.

    Args:
      pieces: the bytes of each token, in order; empty for a token that is not text.
      begins: whether a document begins with the token.

    Returns:
      Cells that cover all tokens in order; none crosses from one document into the next.
    """
    cells: list[Cell] = []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, first = "", 0
    for index, piece in enumerate(pieces):
        last = index + 1 == len(pieces) or begins[index + 1] or not pieces[index + 1]
        text += decoder.decode(piece, final=last)
        unfinished, _ = decoder.getstate()
        if last or not unfinished:
            cells.append(Cell(text, first, index + 1 - first))
            text, first = "", index + 1
    return cells


def token_name(tokenizer: Tokenizer, id_: int) -> str:
    """A single token, with visible white space: `e`, `␣the`, `<C3>`, `[eos]`."""
    specials = {tokenizer.bos_id: "[bos]", tokenizer.eos_id: "[eos]", tokenizer.pad_id: "[pad]"}
    # Ids beyond the tokenizer's are padding of the model's vocabulary.
    piece = tokenizer.bytes_of(id_) if id_ < tokenizer.vocab_size else b""
    if not piece:
        return specials.get(id_, f"[{id_}]")
    try:
        text = piece.decode().translate(VISIBLE)
        return text if text.isprintable() else text.encode("unicode_escape").decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in piece)
