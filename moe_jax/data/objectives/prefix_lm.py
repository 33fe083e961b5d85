"""Prefix LM: predict the rest of a text from its beginning."""

import dataclasses
from typing import Any

import numpy as np

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.data.objectives.causal_lm import causal_lm
from moe_jax.data.objectives.objective import Example, Key, Objective, generator
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.windows import RawWindow


@dataclasses.dataclass(frozen=True)
class PrefixLengths(Settings):
    """Lengths of prefixes: all lengths that the two shares allow are equally likely."""

    shortest_prefix: float = setting(0.0, at_least=0, at_most=1)  # of the tokens; at least 1 token
    longest_prefix: float = setting(1.0, at_least=0, at_most=1)  # of the tokens; at most all but 1

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.shortest_prefix <= self.longest_prefix,
            "shortest_prefix must be at most longest_prefix",
            f"shortest_prefix={self.shortest_prefix}, longest_prefix={self.longest_prefix}",
            "Lower the first",
        )

    def draw_prefix(self, num_tokens: int, rng: np.random.Generator) -> int:
        """Draws the length of a prefix in [1, num_tokens - 1]; 0 for a single token.

        With shares 0 and 1 this is T5's `random_prefix_noise_mask`.
        """
        last = num_tokens - 1
        low = min(max(round(self.shortest_prefix * num_tokens), 1), last)
        high = max(min(round(self.longest_prefix * num_tokens), last), low)
        return int(rng.integers(low, high + 1))


@dataclasses.dataclass(frozen=True)
class PrefixLM(PrefixLengths, Objective):
    """Predict what follows a prefix of random length of each document, in a decoder.

    The rows are those of `causal_lm`. Each document in a window, or part of a document, has one
    prefix; targets in the prefix have loss weight 0. If `bidirectional`, `in_prefix` is 1 at the
    inputs in the prefix, and every token of the document sees the whole prefix.

    Source: Raffel et al. 2020, T5, arXiv:1910.10683, sec. 3.2.1.
    """

    bidirectional: bool = False  # tokens of a prefix see each other in both directions

    @property
    def sees_prompt(self) -> bool:
        """See `Objective`."""
        return self.bidirectional

    def arrays(self, sequence_length: int) -> dict[str, Any]:
        """See `Objective`."""
        more = {"in_prefix": ((sequence_length,), np.int32)} if self.bidirectional else {}
        return super().arrays(sequence_length) | more

    def example(
        self, window: RawWindow, *, sequence_length: int, tokenizer: Tokenizer, key: Key
    ) -> Example:
        """See `Objective`."""
        rng = generator(key)
        example = causal_lm(window, sequence_length=sequence_length, pad_id=tokenizer.pad_id)
        sizes = np.bincount(window.segment_ids)[1:]
        prefixes = np.array([self.draw_prefix(size, rng) for size in sizes])
        in_prefix_N = window.positions < prefixes[window.segment_ids - 1]
        num_inputs = len(window.tokens) - 1
        example["loss_weights"][:num_inputs] *= ~in_prefix_N[1:]
        if self.bidirectional:
            example["in_prefix"] = np.zeros(sequence_length, np.int32)
            example["in_prefix"][:num_inputs] = in_prefix_N[:-1]
        return example

    def check_model(self, model: Any) -> None:
        """See `Objective`."""
        super().check_model(model)
        require(
            not self.bidirectional or any(part.reads_prefix for part in model.part.values()),
            "a part of the model must see a bidirectional prefix from both sides",
            f"none of {sorted(model.part)} does",
            "Use a model with attention, or set data.objective.bidirectional=False",
        )
