"""What a model's routers chose for some text, as flat arrays.

Shapes: X MoE layers, J tokens without padding, K choices per token (see `moe_jax.moe`).
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data import Example, RawWindow, Tokenizer
from moe_jax.data.objectives import causal_lm
from moe_jax.models.model import LanguageModel
from moe_jax.models.routing_record import (
    RoutingRecord,
    choices_of,
    record_of,
    recorded_pass,
)
from moe_jax.moe.routing import Choices
from moe_jax.part import Aux, Call
from moe_jax.training.loss import call_of_batch
from moe_jax.training.state import TrainState


class RoutedLayer(NamedTuple):
    """A layer that routes tokens.

    Attributes:
      name: such as "layer_03", or "layer_03_PART" if several parts of the layer route.
      part: the name of its part.
      row: its index among the layers of this part, from 0.
    """

    name: str
    part: str
    row: int


def routed_layers(layers_of: Mapping[str, Sequence[int]]) -> list[RoutedLayer]:
    """The layers of all MoE parts in the order of the model.

    Args:
      layers_of: the layers of each MoE part, such as `LanguageModel.moe_layers`.
    """
    found = sorted(
        (layer, part, row) for part, layers in layers_of.items() for row, layer in enumerate(layers)
    )
    places = [layer for layer, *_ in found]
    return [
        RoutedLayer(
            f"layer_{layer:02d}" + (f"_{part}" if places.count(layer) > 1 else ""), part, row
        )
        for layer, part, row in found
    ]


class Routed(NamedTuple):
    """The choices of the tokens of some text, before drops.

    Attributes:
      expert_XJK: int32 in [0, E) of the layer, best first; -1 is a choice that does not count.
        Layers are those of all MoE parts, in the order of the model; K is the maximum over them.
      gate_XJK: float32, weight of each choice in the token's output; 0 where it does not count.
      token_J: int32 ids.
      domain_J: int32, an index into the domains, of each token's sequence.
      document_J: int64, the same for the tokens of one document in one sequence, which are
        consecutive: a document that is cut at the end of a window counts as two.
    """

    expert_XJK: np.ndarray
    gate_XJK: np.ndarray
    token_J: np.ndarray
    domain_J: np.ndarray
    document_J: np.ndarray


def route_batches(
    state: TrainState,
    model: LanguageModel,
    batches: Iterable[Example],
    max_tokens: int,
    input_noise: float = 0.0,
    *,
    of_encoder: bool = False,
) -> Routed:
    """Runs a model as in evaluation, dropless, and keeps its routers' choices.

    Experts that choose tokens have the capacity of training; without it, each would take every
    token.

    Args:
      state: of a run; parameters, the state of parts and the step are read.
      model: its model.
      batches: of one shape, as `data.heldout_batches` yields them.
      max_tokens: stop after this many tokens; padding is not counted.
      input_noise: relative size of noise on the input: every element of a token's embedding is
        multiplied by 1 + input_noise * N(0, 1), the same at every call.
      of_encoder: whether to keep the tokens and layers of the encoder instead of the decoder's.

    Returns:
      The `Routed`, of at most `max_tokens` tokens.

    Raises:
      ValueError: the model has no MoE layers.
    """
    parts: list[Routed] = []
    missing = max_tokens
    for index, batch in enumerate(batches):
        call = call_of_batch({name: jnp.asarray(value) for name, value in batch.items()})
        call = dataclasses.replace(call, step=state.step, capacity=0.0, record=True)
        of_model = (state.params, state.model_state, call)
        if input_noise:
            key = jax.random.key(index)
            choices = noisy_pass(*of_model, key, np.float32(input_noise), model=model)
        else:
            choices = recorded_pass(*of_model, model=model)
        record = record_of(model, call, choices)
        if of_encoder:
            assert record.encoder is not None
            record = record.encoder
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


@functools.partial(jax.jit, static_argnames="model")
def noisy_pass(
    params: Any,
    state: Mapping[str, Any] | None,
    call: Call,
    key: jax.Array,
    noise: jax.Array | np.float32,
    *,
    model: LanguageModel,
) -> dict[str, Choices]:
    """`recorded_pass` with the elements of embeddings multiplied by 1 + noise * N(0, 1)."""

    def factor(tokens: jax.Array, key: jax.Array) -> jax.Array:
        return 1 + noise * jax.random.normal(key, (*tokens.shape, model.model_dim))

    tokens_BL = call.tokens_BL
    assert tokens_BL is not None
    encoded: Mapping[str, Aux] = {}
    if call.encoder is not None:
        own = factor(call.encoder.tokens_BT, jax.random.fold_in(key, 1))
        call, said = model.encode(params, call, state=state, factor_BTM=own)
        encoded = said.aux
    x_BLM = model.embed(params, tokens_BL) * factor(tokens_BL, key)
    aux = model.run_embedded(params, x_BLM, call, state=state).aux
    return choices_of({**encoded, **aux})


def first_tokens(routed: Routed, num_tokens: int) -> Routed:
    """The first `num_tokens` tokens."""
    by_layer, by_token = routed[:2], routed[2:]
    return Routed(*(a[:, :num_tokens] for a in by_layer), *(a[:num_tokens] for a in by_token))


def flatten(record: RoutingRecord, domain_B: np.ndarray) -> Routed:
    """The tokens of a record without padding, sequence after sequence.

    Args:
      record: of some sequences.
      domain_B: int32, the domain of each.
    """
    segments_BL = record.segments_BL
    is_token_BL = segments_BL > 0
    rows, length = segments_BL.shape
    document_BL = np.arange(rows)[:, None] * (length + 1) + segments_BL.astype(np.int64)
    experts, gates = [], []
    for layer in routed_layers({name: part.layers for name, part in record.parts.items()}):
        choices = jax.tree.map(lambda a, i=layer.row: a[i], record.parts[layer.part].choices)
        experts.append(np.where(choices.chosen, choices.expert_index, -1)[is_token_BL])
        gates.append(choices.gate[is_token_BL])
    return Routed(
        expert_XJK=joined_layers(experts, -1),
        gate_XJK=joined_layers(gates, 0),
        token_J=record.tokens_BL[is_token_BL],
        domain_J=np.broadcast_to(domain_B[:, None], segments_BL.shape)[is_token_BL],
        document_J=document_BL[is_token_BL],
    )


def joined_layers(layers: Sequence[np.ndarray], filler: int) -> np.ndarray:
    """Arrays [J, K] as one, [X, J, K]; arrays with fewer choices are filled up."""
    longest = max(values_JK.shape[1] for values_JK in layers)
    return np.stack([
        np.pad(
            values_JK, ((0, 0), (0, longest - values_JK.shape[1])), constant_values=filler
        )
        for values_JK in layers
    ])  # fmt: skip


def text_batches(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> list[Example]:
    """Texts as batches, cut into windows like the documents that a model is trained on.

    Args:
      texts: each a document, and a domain of its own.
      tokenizer: of the model.
      sequence_length: L.
      batch_size: B; the last batch is filled up with padding.
      max_tokens: the most tokens of all texts; each may have an equal share, and longer texts are
        cut. None: no limit.

    Returns:
      Batches as `data.heldout_batches` yields them; `domain` is an index into the texts.
    """
    examples = []
    part = None if max_tokens is None else max_tokens // len(texts) + 1
    for domain, text in enumerate(texts):
        document = tokenizer.encode_document(text).astype(np.int32)[:part]
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
