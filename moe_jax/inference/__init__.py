"""Inference: continuing a text."""

from moe_jax.inference.sampling import continue_text

__all__ = ["continue_text"]
