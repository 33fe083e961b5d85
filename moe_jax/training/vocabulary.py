"""Checks the vocabulary of a model against the token ids of its batches."""

import logging

from moe_jax.config import ExperimentConfig
from moe_jax.data import Tokenizer

logger = logging.getLogger(__name__)


def check_vocabulary(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    """Refuses a model whose vocabulary does not cover the ids of its batches.

    Raises:
      ValueError: naming the size needed; or the objective refuses the sequence length.
    """
    size = config.data.objective.vocab_size(tokenizer, config.data.sequence_length)
    if config.model.vocab_size < size:
        more = size - tokenizer.vocab_size
        sentinels = f", data.objective adds {more} sentinels" if more else ""
        raise ValueError(
            "model.vocab_size must be at least the tokenizer's: "
            f"model.vocab_size={config.model.vocab_size}, {config.data.tokenizer!r} has "
            f"{tokenizer.vocab_size}{sentinels}. Set model.vocab_size={size}."
        )


def warn_of_unused_ids(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    """Warns if at least half of a model's ids never occur, as with a large vocabulary on bytes."""
    size = config.data.objective.vocab_size(tokenizer, config.data.sequence_length)
    if config.model.vocab_size >= 2 * size:
        logger.warning(
            "model.vocab_size=%d, and batches have %d ids at most (data.tokenizer=%r, "
            "data.corpus=%r): the others never occur. Set data.corpus and data.tokenizer, or "
            "model.vocab_size=%d.",
            config.model.vocab_size, size, config.data.tokenizer, config.data.corpus, size,
        )  # fmt: skip
