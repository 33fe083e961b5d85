"""SentencePiece models as tokenizers."""

import functools
import hashlib
import pathlib

import numpy as np
import sentencepiece

from moe_jax.config.check import require
from moe_jax.data.tokenizer import PieceTokenizer, read_tokenizer_file

_FIX = "Train one with `python -m moe_jax.data.train_tokenizer --out=bpe.model`"


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model that keeps every byte, such as `train_tokenizer` makes.

    Any text survives the round trip. U+2581, which SentencePiece itself uses for a space, is
    encoded as its three bytes.
    """

    _SPACE = "\u2581"

    def __init__(self, path: str, bos_token: str = "", eos_token: str = ""):
        """Reads a model.

        Args:
            path: the .model file.
            bos_token: piece that begins a document; "": the model's own.
            eos_token: piece that ends a document; "": the model's own.

        Raises:
            ValueError: the model does not exist or is not supported.
        """
        self.name = f"sentencepiece:{path}"
        file = pathlib.Path(path).expanduser()
        self._model = read_tokenizer_file(
            file,
            f"Train one with `python -m moe_jax.data.train_tokenizer --out={path}`, or set "
            "config.data.tokenizer to 'byte'",
        )
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (RuntimeError, ValueError, TypeError):
            fix = f"Copy it again. {_FIX}"
            if self._model.splitlines()[0].count(b" ") == 1 and self._model.isascii():
                fix = f"It looks like a tiktoken file: set config.data.tokenizer=tiktoken:{path}"
            raise ValueError(
                f"A SentencePiece tokenizer is read from a .model file: {file} is cut short, or "
                f"something else, of {len(self._model)} bytes. {fix}."
            ) from None
        self.vocab_size = self._processor.vocab_size()
        self._specials = (bos_token, eos_token)
        self.bos_id = self._id_of(bos_token, self._processor.bos_id())
        self.eos_id = self._id_of(eos_token, self._processor.eos_id())
        require(
            min(self.bos_id, self.eos_id) >= 0,
            "A tokenizer must have a token that begins a document, and one that ends it",
            f"{file} has bos_id={self.bos_id}, eos_id={self.eos_id}",
            f"Set config.data.bos_token and config.data.eos_token to pieces that it has. {_FIX}",
        )
        # Padding is recognised by its weight and segment, so any id will do.
        self.pad_id = max(self._processor.pad_id(), 0)
        self.pieces = [self._text_bytes(id_) for id_ in range(self.vocab_size)]
        self.token_bytes_V = np.array([len(b) for b in self.pieces], np.int32)
        self.check_keeps_bytes(file, _FIX)

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text to ids [N]; see `Tokenizer.encode`."""
        pieces = self._processor.encode(text.split(self._SPACE))
        ids = pieces[0]
        for piece in pieces[1:]:
            ids += self._space_ids
            ids += piece
        return np.array(ids, self.dtype)

    def fingerprint(self) -> str:
        """Sha256 of the model file, and of `bos_token` and `eos_token` if named."""
        named = "\0".join(self._specials) if any(self._specials) else ""
        return hashlib.sha256(self._model + named.encode()).hexdigest()

    @functools.cached_property
    def _space_ids(self) -> list[int]:
        pieces = [f"<0x{byte:02X}>" for byte in self._SPACE.encode()]
        return [self._processor.piece_to_id(piece) for piece in pieces]

    def _id_of(self, token: str, default: int) -> int:
        id_ = self._processor.piece_to_id(token) if token else default
        return -1 if token and id_ == self._processor.unk_id() else id_

    def _text_bytes(self, id_: int) -> bytes:
        if self._processor.is_control(id_) or self._processor.is_unknown(id_):
            return b""
        piece = self._processor.id_to_piece(id_)
        if self._processor.is_byte(id_):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(self._SPACE, " ").encode()
