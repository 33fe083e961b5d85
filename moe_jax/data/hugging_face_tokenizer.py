"""Hugging Face tokenizers, from a `tokenizer.json`."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax.config.check import require
from moe_jax.data.tokenizer import PieceTokenizer, read_tokenizer_file, special_ids

_FIX = (
    "Use one that does: byte-level BPE (GPT-2, Llama 3, Qwen), or BPE with byte fallback "
    "(Llama 2, Mistral, Gemma)"
)
_SPACE = "\u2581"
GENERATION_FILE = "generation_config.json"
# Control characters, and the first bytes of characters beyond U+3FFFF: a tokenizer may lack them
# (SmolLM2's does), and a text with one is refused.
_RARE = {bytes([byte]) for byte in {*range(0x20), 0x7F, *range(0xF1, 0xF5)} - set(b"\t\n\r")}
# A long text is encoded in pieces that end with a line, to bound memory.
_PIECE = 2**20  # characters


class HuggingFaceTokenizer(PieceTokenizer):
    """A BPE tokenizer of the package `tokenizers` that keeps every byte.

    Encodes as the file specifies, with three differences that bits per byte need: no space is put
    in front of a text, it is not normalised to NFC, and the names of special tokens in a text are
    text.

    Attributes:
        path: path of the file.
        special_tokens: ids by name, including tokens that absorb spaces of the text around them.
    """

    def __init__(self, path: str, bos_token: str = "", eos_token: str = ""):
        """Reads a tokenizer.

        Args:
            path: the `tokenizer.json`.
            bos_token: token that begins a document; "": the usual one.
            eos_token: token that ends a document; "": the usual one.

        Raises:
            ValueError: the tokenizer does not exist or is not supported.
        """
        self.name = f"tokenizers:{path}"
        self.path = file = pathlib.Path(path).expanduser()
        self._data = read_tokenizer_file(file, "Correct config.data.tokenizer")
        spec = _parse(self._data, file)
        decoders = _types(spec.get("decoder"))
        is_byte_level = "ByteLevel" in decoders
        require(
            spec["model"].get("type") == "BPE"
            and (is_byte_level or bool(spec["model"].get("byte_fallback"))),
            "A tokenizer must be a BPE that falls back on bytes, so that the bytes of a token are "
            "known",
            f"{file} is a {spec['model'].get('type')} with the decoder {sorted(decoders)}",
            _FIX,
        )
        self._tokenizer = _load(spec, file, self._data)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.pad_id = 0  # Padding is recognised by its weight and segment.
        added = {token["content"]: token for token in spec.get("added_tokens") or ()}
        declared = {token: ids[token] for token, says in added.items() if says.get("special")}
        specials = {token: ids[token] for token, says in added.items() if _is_special(says)}
        self.special_tokens = specials
        self.bos_id, self.eos_id = special_ids(declared, file, bos_token, eos_token)
        pieces = [b""] * self.vocab_size
        for token in ids.keys() - specials.keys():
            # Added tokens are text, except that a run of spaces (Gemma) is written as a piece is.
            if is_byte_level:
                pieces[ids[token]] = token.encode() if token in added else _byte_level(token)
            else:
                pieces[ids[token]] = _byte_fallback(token)
        self.pieces = pieces
        self.token_bytes_V = np.array([len(piece) for piece in pieces], np.int32)
        # UTF-8 never uses 0xc0, 0xc1 or 0xf5 to 0xff.
        needed = {bytes([b]) for b in range(0xF5) if b not in (0xC0, 0xC1)}
        self._missing = needed - set(pieces)
        require(
            self._missing <= _RARE,
            "A tokenizer must have a token for every byte that text is made of",
            f"{file} has none for {sorted(self._missing - _RARE)[:8]}",
            _FIX,
        )
        self._space_ids = [] if is_byte_level else [ids[f"<0x{b:02X}>"] for b in _SPACE.encode()]
        self.check_keeps_bytes(file, _FIX)

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text to ids [N]; see `Tokenizer.encode`.

        Raises:
            ValueError: the text has a rare byte without a token.
        """
        if self._missing:
            lost = sorted(self._missing & {bytes([byte]) for byte in set(text.encode())})
            require(
                not lost,
                "A text may contain only bytes that its tokenizer has tokens for",
                f"{self.name} has none for {lost}",
                "Remove these characters from the text, or use another tokenizer",
            )
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE) if self._space_ids else [text]):
            ids += self._space_ids if number else []
            for piece in pieces_of(part):
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return np.array(ids, self.dtype)

    def encode_rendered(self, text: str) -> np.ndarray:
        """Encodes the output of a chat template to ids [N], as the file specifies.

        Names of special tokens become these tokens, and steps that `encode` skips are done, such as
        a space put in front.
        """
        return np.array(self._as_written.encode(text, add_special_tokens=False).ids, np.int64)

    @functools.cached_property
    def _as_written(self) -> Any:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_buffer(self._data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See `Tokenizer`: also those of the `generation_config.json` beside the file.

        Raises:
            ValueError: that file is not a JSON object.
        """
        path = self.path.parent / GENERATION_FILE
        if not path.is_file():
            return (self.eos_id,)
        try:
            ids = json.loads(path.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError):
            raise ValueError(
                f"{GENERATION_FILE} must be a JSON object: {path} is not. Copy it again."
            ) from None
        others = ids if isinstance(ids, list) else [ids]
        specials = self.special_tokens.values()
        return tuple(dict.fromkeys([self.eos_id, *(one for one in others if one in specials)]))

    def fingerprint(self) -> str:
        """Sha256 of the file and of the ids that begin and end a document."""
        return hashlib.sha256(self._data + f"\0{self.bos_id} {self.eos_id}".encode()).hexdigest()


def pieces_of(text: str) -> Iterator[str]:
    """Cuts a long text after line ends; joined, the pieces are the text."""
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = max(stop, start + 1)


def _load(spec: dict[str, Any], path: pathlib.Path, data: bytes) -> Any:
    """The package's tokenizer; it encodes names of special tokens in a text as text."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "A tokenizer.json is read by the package tokenizers, which is not installed: "
            f"{path}. Run: pip install tokenizers."
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_exact(spec)))
    except Exception as error:  # The package raises nothing narrower.
        raise _no_tokenizer(path, data, str(error)) from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _parse(data: bytes, path: pathlib.Path) -> dict[str, Any]:
    try:
        spec = json.loads(data)
    except ValueError as error:
        raise _no_tokenizer(path, data, str(error)) from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise _no_tokenizer(path, data, "it has no model")
    return spec


def _no_tokenizer(path: pathlib.Path, data: bytes, reason: str) -> ValueError:
    return ValueError(
        f"A Hugging Face tokenizer is read from a tokenizer.json: {path}, {len(data)} bytes, is "
        f"cut short or something else: {' '.join(reason.split())[:120]}. Copy it again."
    )


def _is_special(token: dict[str, Any]) -> bool:
    """Whether an added token is not text; tokens that absorb spaces have no fixed bytes."""
    return bool(token.get("special") or token.get("lstrip") or token.get("rstrip"))


def _exact(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification without optional steps that lose, add or cut bytes."""

    def without(part: Any, names: set[str]) -> Any:
        if not isinstance(part, dict) or part.get("type") in names:
            return None
        if part.get("type") == "Sequence" and "normalizers" in part:
            kept = [p for p in (without(p, names) for p in part["normalizers"]) if p]
            return {**part, "normalizers": kept} if kept else None
        return part

    def never_prepends(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        inner = {
            key: [never_prepends(p) for p in value] if key == "pretokenizers" else value
            for key, value in part.items()
        }
        if part.get("type") == "Metaspace":
            inner.pop("add_prefix_space", None)
            inner["prepend_scheme"] = "never"
        elif part.get("type") == "ByteLevel":
            inner["add_prefix_space"] = False
        return inner

    return spec | {
        "normalizer": without(spec.get("normalizer"), {"NFC", "Prepend"}),
        "pre_tokenizer": never_prepends(spec.get("pre_tokenizer")),
        "post_processor": None,
        "added_tokens": [
            token | {"special": _is_special(token)} for token in spec.get("added_tokens") or ()
        ],
        "truncation": None,
        "padding": None,
        "model": spec["model"] | {"dropout": None},
    }


def _types(part: Any) -> set[str]:
    """Types of a component and of the components inside it."""
    if not isinstance(part, dict):
        return set()
    inner = [p for value in part.values() if isinstance(value, list) for p in value]
    return {str(part.get("type"))}.union(*(_types(p) for p in inner))


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes as they are, others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    table = _byte_of_character()
    return bytes(table[c] for c in token) if all(c in table for c in token) else b""


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()
