"""Inference: continuing tokens and texts."""

from moe_jax.inference.anew import stream_anew
from moe_jax.inference.generation import Piece, generate_tokens, stream_tokens
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.text import TextPiece, continue_text, stream_text

__all__ = [
    "Piece",
    "Sampling",
    "TextPiece",
    "continue_text",
    "generate_tokens",
    "stream_anew",
    "stream_text",
    "stream_tokens",
]
