"""Text to token ids and back, with the number of text bytes per token.

Losses per token cannot be compared across tokenizers; bits per byte can. A tokenizer therefore
has `token_bytes_V`, whose sum over the tokens of a text is the number of bytes of the text.
"""

import abc
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from moe_jax.config.check import require
from moe_jax.data.open_file import check_file

# Usual names of the tokens that begin and end a document.
BOS_TOKENS = (
    "<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
EOS_TOKENS = (
    "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
# Leading and repeated spaces, line ends, a ligature, a full-width letter and a decomposed one that
# Unicode normalisation would change, capitals, a rare character.
PROBES = ("a", "Ab", " a  b\n\t\r c \ufb01\uff21 e\u0301 \U0001f41d ")


class DocumentEncoder(Protocol):
    """Encodes documents for token files, as a tokenizer does."""

    @property
    def name(self) -> str:
        """The name of the encoder, for file names."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the tokens, uint16 or uint32."""

    def encode_document(self, text: str) -> np.ndarray:
        """The tokens of a document, `dtype` [N].

        Raises:
            ValueError: the text cannot be encoded.
        """

    def fingerprint(self) -> str:
        """Hexadecimal sha256 that changes whenever an encoding may change."""


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        name: the string that `open_tokenizer` turns into this tokenizer.
        vocab_size: V, number of ids.
        pad_id: fills padding, which has loss weight 0.
        bos_id: begins every document; the first token of the text is predicted from it.
            Generation starts from it.
        eos_id: ends every document.
        token_bytes_V: int32 [V], UTF-8 bytes per id; 0 for ids that are not text.
        num_sentinels: ids at the end of the vocabulary that no text encodes to.
    """

    name: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    token_bytes_V: np.ndarray
    num_sentinels: int = 0

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Encodes a text, without `bos_id` and `eos_id`.

        Args:
            text: any text that UTF-8 can express.

        Returns:
            `dtype` [N], the ids.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids, skipping ids that are not text.

        Args:
            ids: integers [N] in [0, V).

        Returns:
            The text; bytes that are not UTF-8 (a sequence cut inside a character) become U+FFFD.
        """

    @abc.abstractmethod
    def bytes_of(self, id_: int) -> bytes:
        """The UTF-8 bytes of an id in [0, V); empty if the id is not text.

        They may be part of a character: join the bytes of several tokens before decoding.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal sha256 that changes whenever an encoding may change."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end generation: `eos_id`, and others that a model's files list."""
        return (self.eos_id,)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the ids: uint16, or uint32 if there are more than 65,536."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_document(self, text: str) -> np.ndarray:
        """Encodes a whole document.

        Args:
            text: any text that UTF-8 can express.

        Returns:
            `dtype` [N + 2]: `bos_id`, the N ids of the text, `eos_id`.
        """
        ids = self.encode(text)
        document = np.empty(len(ids) + 2, self.dtype)
        document[0], document[1:-1], document[-1] = self.bos_id, ids, self.eos_id
        return document


class PieceTokenizer(Tokenizer):
    """A tokenizer whose ids have fixed bytes, independent of their context.

    Attributes:
        pieces: [V] the bytes of each id; empty for ids that are not text.
    """

    pieces: Sequence[bytes]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids, leaving out special ids; see `Tokenizer.decode`."""
        return b"".join(self.pieces[int(id_)] for id_ in ids).decode(errors="replace")

    def bytes_of(self, id_: int) -> bytes:
        """The bytes of an id; see `Tokenizer.bytes_of`."""
        return self.pieces[id_]

    def check_keeps_bytes(self, path: pathlib.Path, fix: str) -> None:
        """Refuses a tokenizer whose tokens are not the bytes of the text.

        Raises:
            ValueError: a text changes when encoded and decoded; the message shows both.
        """
        for text in PROBES:
            require(
                (decoded := self.decode(self.encode(text))) == text,
                "A tokenizer must keep every byte (no normalisation, no space put in front, bytes "
                "for what it does not know), or bits per byte mean nothing",
                f"{path} turns {text!r} into {decoded!r}",
                fix,
            )


def read_tokenizer_file(path: pathlib.Path, fix: str) -> bytes:
    """Reads the file of a tokenizer.

    Raises:
        ValueError: the file is missing, empty, a folder, or a Git LFS pointer.
    """
    if not path.exists():
        raise ValueError(f"A tokenizer must be a file: there is none at {str(path)!r}. {fix}.")
    check_file(path, "A tokenizer")
    data = path.read_bytes()
    require(bool(data), "A tokenizer must be a file with its contents", f"{path} is empty", fix)
    return data


def special_ids(
    ids: Mapping[str, int], path: pathlib.Path, bos_token: str, eos_token: str
) -> tuple[int, int]:
    """Finds the ids that begin and end a document.

    Args:
        ids: ids of the special tokens, by name.
        path: the tokenizer's file, for messages.
        bos_token: a name in `ids`; "": the first of `BOS_TOKENS` that is in `ids`.
        eos_token: a name in `ids`; "": the first of `EOS_TOKENS` that is in `ids`.

    Returns:
        bos, eos. If only one is found, it serves as both.

    Raises:
        ValueError: a named token is missing, or no usual name is found.
    """
    require(
        bool(ids),
        "A tokenizer must have a special token that begins or ends a document",
        f"{path} has no special token",
        'Add one: python -c "import tokenizers; t = tokenizers.Tokenizer.from_file'
        f"('{path}'); t.add_special_tokens(['{EOS_TOKENS[0]}']); t.save('{path}')\"",
    )
    for field, token in (("bos_token", bos_token), ("eos_token", eos_token)):
        require(
            not token or token in ids,
            f"data.{field} must be a special token of the tokenizer",
            f"{path} has no {token!r}",
            f"Set config.data.{field}, for instance to one of {list(ids)[:12]}",
        )
    bos = next((ids[token] for token in (bos_token, *BOS_TOKENS) if token in ids), None)
    eos = next((ids[token] for token in (eos_token, *EOS_TOKENS) if token in ids), None)
    bos, eos = (eos if bos is None else bos), (bos if eos is None else eos)
    if bos is None or eos is None:
        raise ValueError(
            f"A tokenizer must have a special token that begins or ends a document: {path} has "
            f"none of {[*BOS_TOKENS, *EOS_TOKENS]}. Set config.data.bos_token and "
            f"config.data.eos_token, for instance to one of {list(ids)[:12]}."
        )
    return bos, eos


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte; vocabulary of 384.

    Ids: 0 pad, 1 bos, 2 eos; 3 to 258 the bytes 0 to 255; 259 to 383 are 125 sentinels,
    reserved for span corruption, which no text encodes to. 384 is a multiple of 128, so that an
    embedding divides evenly over devices.
    """

    name = "byte"
    vocab_size = 384
    pad_id = 0
    bos_id = 1
    eos_id = 2
    num_sentinels = 125
    _FIRST_BYTE = 3

    def __init__(self) -> None:
        self.token_bytes_V = np.zeros(self.vocab_size, np.int32)
        self.token_bytes_V[self._FIRST_BYTE : self._FIRST_BYTE + 256] = 1

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text to uint16 [bytes]; see `Tokenizer.encode`."""
        bytes_N = np.frombuffer(text.encode(), np.uint8)
        return bytes_N.astype(np.uint16) + np.uint16(self._FIRST_BYTE)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes ids, leaving out special ids and sentinels; see `Tokenizer.decode`."""
        bytes_N = np.asarray(ids, np.int64) - self._FIRST_BYTE
        is_byte_N = (bytes_N >= 0) & (bytes_N < 256)
        return bytes_N[is_byte_N].astype(np.uint8).tobytes().decode(errors="replace")

    def bytes_of(self, id_: int) -> bytes:
        """One byte, or none for a special id or sentinel; see `Tokenizer.bytes_of`."""
        byte = int(id_) - self._FIRST_BYTE
        return bytes([byte]) if 0 <= byte < 256 else b""

    def fingerprint(self) -> str:
        """Sha256 of the layout of the vocabulary."""
        return hashlib.sha256(b"byte: pad bos eos, 256 bytes, 125 sentinels").hexdigest()
