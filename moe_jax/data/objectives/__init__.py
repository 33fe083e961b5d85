"""Objectives: what a model is asked to predict, made from windows of tokens."""

from moe_jax.data.objectives.causal_lm import CausalLM, causal_lm
from moe_jax.data.objectives.objective import Example, Key, Lengths, Objective
from moe_jax.data.objectives.pairs import EncoderPrefixLM, Pairs
from moe_jax.data.objectives.prefix_lm import PrefixLM
from moe_jax.data.objectives.span_corruption import SpanCorruption
from moe_jax.data.objectives.supervised import EncoderSupervised, Supervised

__all__ = [
    "CausalLM",
    "EncoderPrefixLM",
    "EncoderSupervised",
    "Example",
    "Key",
    "Lengths",
    "Objective",
    "Pairs",
    "PrefixLM",
    "SpanCorruption",
    "Supervised",
    "causal_lm",
]
