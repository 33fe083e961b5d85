"""Inference: continuing tokens and texts, and scoring continuations."""

from moe_jax.inference.anew import stream_anew
from moe_jax.inference.draft import Draft
from moe_jax.inference.generation import generate_tokens, generate_with_routes, stream_tokens
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.scoring import Scored, score_continuations
from moe_jax.inference.text import TextPiece, continue_text, stream_text
from moe_jax.inference.writer import Piece

__all__ = [
    "Draft",
    "Piece",
    "Sampling",
    "Scored",
    "TextPiece",
    "continue_text",
    "generate_tokens",
    "generate_with_routes",
    "score_continuations",
    "stream_anew",
    "stream_text",
    "stream_tokens",
]
