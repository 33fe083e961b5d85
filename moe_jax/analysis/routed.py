"""What a model's routers chose for some text, as flat arrays.

Shapes: X MoE layers, J tokens without padding, K choices of a token (see `moe_jax.moe`).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.data import Example, RawWindow, Tokenizer
from moe_jax.data.objectives import causal_lm
from moe_jax.models import RoutingRecord, record_routing
from moe_jax.training.state import TrainState


class Routed(NamedTuple):
    """The choices of the tokens of some text, before drops.

    Attributes:
      expert_XJK: int32 in [0, E), best first; -1 is a choice that does not count.
      gate_XJK: float32, weight of each choice in the token's output; 0 where it does not count.
      token_J: int32 ids.
      domain_J: int32, an index into the domains, of each token's sequence.
      document_J: int64, the same for the tokens of one document in one sequence, which stand
        together: a document that the end of a window cuts counts as two.
    """

    expert_XJK: np.ndarray
    gate_XJK: np.ndarray
    token_J: np.ndarray
    domain_J: np.ndarray
    document_J: np.ndarray


def route_batches(
    state: TrainState,
    config: ModelConfig,
    batches: Iterable[Example],
    max_tokens: int,
    input_noise: float = 0.0,
) -> Routed:
    """Runs a model as in evaluation, dropless, and keeps what its routers chose.

    Experts that choose have the capacity of training, without which each would take every token.

    Args:
      state: of a run; parameters, selection biases and the step are read.
      config: of its model.
      batches: of one shape, as `data.heldout_batches` yields them.
      max_tokens: where to stop; padding is not counted.
      input_noise: relative size of noise on the input: every number of a token's embedding is
        multiplied by 1 + input_noise * N(0, 1), the same at every call.

    Returns:
      The `Routed`, of at most `max_tokens` tokens.

    Raises:
      ValueError: the model has no MoE layers.
    """
    parts: list[Routed] = []
    missing = max_tokens
    for index, batch in enumerate(batches):
        record = record_routing(
            state.params,
            state.router_bias_XE,
            batch["inputs"],
            config,
            positions_BL=batch["positions"],
            segment_ids_BL=batch["segment_ids"],
            step=state.step,
            input_factor_BLM=noise_factor(batch["inputs"].shape, config, input_noise, index),
        )
        part = flatten(record, batch["domain"])
        # Documents of other batches have other numbers.
        parts.append(part._replace(document_J=part.document_J + index * 2**32))
        missing -= len(part.token_J)
        if missing <= 0:
            break
    joined = Routed(*(
        np.concatenate(arrays, axis=0 if arrays[0].ndim == 1 else 1)
        for arrays in zip(*parts, strict=True)
    ))  # fmt: skip
    return first_tokens(joined, max_tokens)


def noise_factor(
    shape: tuple[int, ...], config: ModelConfig, size: float, seed: int
) -> jax.Array | None:
    """What multiplies the embeddings of [B, L] tokens; None without noise."""
    if not size:
        return None
    return 1 + size * jax.random.normal(jax.random.key(seed), (*shape, config.model_dim))


def first_tokens(routed: Routed, num_tokens: int) -> Routed:
    """The first tokens of some text."""
    by_layer, by_token = routed[:2], routed[2:]
    return Routed(*(a[:, :num_tokens] for a in by_layer), *(a[:num_tokens] for a in by_token))


def flatten(record: RoutingRecord, domain_B: np.ndarray) -> Routed:
    """The tokens of a record without padding, sequence after sequence.

    Args:
      record: of some sequences.
      domain_B: int32, the domain of each.
    """
    segments_BL = record.segment_ids_BL
    is_token_BL = segments_BL > 0
    rows, length = segments_BL.shape
    document_BL = np.arange(rows)[:, None] * (length + 1) + segments_BL.astype(np.int64)
    expert_XBLK = np.where(record.chosen_XBLK, record.expert_index_XBLK, -1)
    return Routed(
        expert_XJK=expert_XBLK[:, is_token_BL],
        gate_XJK=record.gate_XBLK[:, is_token_BL],
        token_J=record.tokens_BL[is_token_BL],
        domain_J=np.broadcast_to(domain_B[:, None], segments_BL.shape)[is_token_BL],
        document_J=document_BL[is_token_BL],
    )


def text_batches(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int,
) -> list[Example]:
    """Texts as batches, cut into windows like the documents that a model is trained on.

    Args:
      texts: each a document, and a domain of its own.
      tokenizer: of the model.
      sequence_length: L.
      batch_size: B; the last batch is filled up with padding.
      max_tokens: of all texts; each may have an equal part of them, and what is longer is cut.

    Returns:
      Batches as `data.heldout_batches` yields them; `domain` is an index into the texts.
    """
    examples = []
    for domain, text in enumerate(texts):
        document = tokenizer.encode_document(text).astype(np.int32)[: max_tokens // len(texts) + 1]
        for start in range(0, len(document) - 1, sequence_length):
            tokens = document[start : start + sequence_length + 1]
            positions = np.arange(len(tokens), dtype=np.int32)
            window = RawWindow(tokens, np.ones_like(tokens), positions, domain)
            examples.append(
                causal_lm(window, sequence_length=sequence_length, pad_id=tokenizer.pad_id)
            )
    padding = {name: np.zeros_like(value) for name, value in examples[0].items()}
    examples += [padding] * (-len(examples) % batch_size)
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    return [{name: np.stack([e[name] for e in rows]) for name in padding} for rows in batches]
