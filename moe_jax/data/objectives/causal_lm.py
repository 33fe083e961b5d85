"""The next-token objective."""

import dataclasses

import numpy as np

from moe_jax.data.objectives.objective import Example, Key, Objective
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.windows import RawWindow


def causal_lm(window: RawWindow, *, sequence_length: int, pad_id: int) -> Example:
    """Predict each token from the tokens before it in its document.

    Args:
        window: N tokens, 2 <= N <= L + 1.
        sequence_length: L. A window of fewer than L + 1 tokens is padded at its end.
        pad_id: fills inputs and targets beyond the window.

    Returns:
        `inputs`: int32 [L]; `targets`: int32 [L], the token after each input;
        `segment_ids`: int32 [L], number of the input's document in the window from 1 on, 0 only
        for padding; `positions`: int32 [L], 0 at the start of the window and of each document;
        `loss_weights`: float32 [L], 1 if the target is in the input's document, 0 if it begins
        the next document or is padding; `domain`: int32 scalar.
    """
    num_inputs = len(window.tokens) - 1
    assert 1 <= num_inputs <= sequence_length, (num_inputs, sequence_length)
    same_document = window.segment_ids[1:] == window.segment_ids[:-1]
    if num_inputs == sequence_length:
        inputs, targets = window.tokens[:-1], window.tokens[1:]
        segment_ids, positions = window.segment_ids[:-1], window.positions[:-1]
        loss_weights = same_document.astype(np.float32)
    else:
        padding = (0, sequence_length - num_inputs)
        inputs = np.pad(window.tokens[:-1], padding, constant_values=pad_id)
        targets = np.pad(window.tokens[1:], padding, constant_values=pad_id)
        segment_ids = np.pad(window.segment_ids[:-1], padding)
        positions = np.pad(window.positions[:-1], padding)
        loss_weights = np.pad(same_document.astype(np.float32), padding)
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": loss_weights,
        "domain": np.int32(window.domain),
    }


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Predict each token from the tokens before it in its document; see `causal_lm`."""

    def example(
        self, window: RawWindow, *, sequence_length: int, tokenizer: Tokenizer, key: Key
    ) -> Example:
        """See `Objective`; nothing is drawn."""
        del key
        return causal_lm(window, sequence_length=sequence_length, pad_id=tokenizer.pad_id)
