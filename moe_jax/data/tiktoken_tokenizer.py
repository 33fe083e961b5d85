"""Tokenizers from .tiktoken files."""

import base64
import binascii
import hashlib
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from moe_jax.config.check import require
from moe_jax.data.hugging_face_tokenizer import pieces_of
from moe_jax.data.tokenizer import PieceTokenizer, read_tokenizer_file, special_ids

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_O200K = "|".join((
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip
# The pattern that cuts a text into words is not in the file: the number of ranks determines it.
# Other files use that of cl100k_base, as Llama 3 (128,000 ranks) does except for details.
PATTERNS: Mapping[int, str] = MappingProxyType(
    {50_256: _GPT2, 50_257: _GPT2, 50_280: _GPT2, 100_256: _CL100K, 199_998: _O200K}
)
# OpenAI's ids of <|endoftext|>; in other files its id follows the last rank.
END_OF_TEXT: Mapping[int, int] = MappingProxyType(
    {50_280: 50_256, 100_256: 100_257, 199_998: 199_999}
)
_MAX_GAPS = 16  # ranks that a file may leave to special tokens


class TiktokenTokenizer(PieceTokenizer):
    """Byte-level BPE from mergeable ranks, with one special token that begins and ends documents.

    Its id is in `END_OF_TEXT` or follows the last rank. `PATTERNS` lists how text is cut before
    merging. Names of special tokens in a text are text.
    """

    def __init__(self, path: str, bos_token: str = "", eos_token: str = ""):
        """Reads the ranks.

        Args:
            path: a file with one line per token: base64 and rank.
            bos_token: "" or "<|endoftext|>".
            eos_token: "" or "<|endoftext|>".

        Raises:
            ValueError: the file is missing or has another format, or tiktoken is not installed.
        """
        try:
            import tiktoken
        except ImportError:
            raise ValueError(
                "A .tiktoken file is read by the package tiktoken, which is not installed: "
                f"config.data.tokenizer={path!r}. Run: pip install tiktoken."
            ) from None
        self.name = f"tiktoken:{path}"
        file = pathlib.Path(path).expanduser()
        self._data = read_tokenizer_file(file, "Correct config.data.tokenizer")
        ranks = _read_ranks(self._data, file)
        self.pad_id = 0  # Padding is recognised by its weight and segment.
        end = END_OF_TEXT.get(len(ranks), max(ranks.values()) + 1)
        specials = {"<|endoftext|>": end}
        self.bos_id, self.eos_id = special_ids(specials, file, bos_token, eos_token)
        self.vocab_size = max(end, *ranks.values()) + 1
        self._pattern = PATTERNS.get(len(ranks), _CL100K)
        self._encoding = tiktoken.Encoding(
            file.stem, pat_str=self._pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        pieces = [b""] * self.vocab_size
        for piece, rank in ranks.items():
            pieces[rank] = piece
        self.pieces = pieces
        self.token_bytes_V = np.array([len(piece) for piece in pieces], np.int32)
        self.check_keeps_bytes(file, "Copy it again")

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text to ids [N]; see `Tokenizer.encode`."""
        ids = [id_ for piece in pieces_of(text) for id_ in self._encoding.encode_ordinary(piece)]
        return np.array(ids, self.dtype)

    def fingerprint(self) -> str:
        """Sha256 of the file, the pattern and the id that begins and ends a document."""
        said = f"\0{self._pattern}\0{self.bos_id} {self.eos_id}"
        return hashlib.sha256(self._data + said.encode()).hexdigest()


def _read_ranks(data: bytes, path: pathlib.Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                "A .tiktoken file must have lines of base64 and rank: "
                f"{path} line {number} is {line[:40].decode(errors='replace')!r}, so that it is "
                "cut short or something else. Copy it again."
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    require(
        not missing and len(set(ranks.values())) == len(ranks) > max(ranks.values()) - _MAX_GAPS,
        "A .tiktoken file must rank every byte, and its ranks must be 0, 1, 2, ...",
        f"{path} has {len(ranks)} ranks and lacks {len(missing)} bytes",
        "Copy it again",
    )
    return ranks
