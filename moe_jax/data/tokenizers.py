"""Tokenizers by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moe_jax.config.check import require
from moe_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from moe_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe_jax.data.tiktoken_tokenizer import TiktokenTokenizer
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "open_tokenizer",
]

BYTES = ("byte", "bytes")  # names of the tokenizer without a file
# Each is called with (path, bos_token, eos_token).
FORMS: Mapping[str, Callable[[str, str, str], Tokenizer]] = MappingProxyType(
    {
        "sentencepiece": SentencePieceTokenizer,
        "tokenizers": HuggingFaceTokenizer,
        "tiktoken": TiktokenTokenizer,
    }
)
SUFFIXES: Mapping[str, str] = MappingProxyType(
    {".model": "sentencepiece", ".json": "tokenizers", ".tiktoken": "tiktoken"}
)


def open_tokenizer(name: str, bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """Opens the tokenizer that `name` describes.

    Args:
        name: `byte`; the path of a .model file of SentencePiece, a `tokenizer.json` of Hugging Face
            or a .tiktoken file; or `sentencepiece:PATH`, `tokenizers:PATH`, `tiktoken:PATH`.
        bos_token: token that begins a document; "": the tokenizer's usual one.
        eos_token: token that ends a document; "": the tokenizer's usual one.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the name has none of these forms, or the file is not supported.
    """
    if name in BYTES:
        require(
            not bos_token and not eos_token,
            "The byte tokenizer has a bos and an eos of its own",
            f"data.bos_token={bos_token!r}, data.eos_token={eos_token!r}",
            "Leave them empty",
        )
        return ByteTokenizer()
    form, path = form_and_path(name)
    require(
        bool(form and path),
        "A tokenizer must be 'byte', a .model, tokenizer.json or .tiktoken file, or KIND:PATH with "
        f"a kind of {', '.join(FORMS)}",
        f"got {name!r}",
        "Correct config.data.tokenizer",
    )
    return FORMS[form](path, bos_token, eos_token)


def form_and_path(name: str) -> tuple[str, str]:
    """Splits the name of a tokenizer into its form and the path of its file.

    >>> form_and_path("tiktoken:a/ranks.model"), form_and_path("a/bpe.model")
    (('tiktoken', 'a/ranks.model'), ('sentencepiece', 'a/bpe.model'))
    >>> form_and_path("byte"), form_and_path("a/text")
    (('byte', ''), ('', 'a/text'))
    """
    if name in BYTES:
        return BYTES[0], ""
    form, _, path = name.partition(":")
    if form in FORMS:
        return form, path
    return next((form for suffix, form in SUFFIXES.items() if name.endswith(suffix)), ""), name
