"""FLOPs of a model, from the costs of its parts (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.config import Lengths
from moe_jax.costs import Bytes, Cost
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import NAME
from moe_jax.models.stack import Stack
from moe_jax.part import Dims, Part

KINDS = ("attention", "dense_ffn", "experts", "routing", "other", "head")


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs per token, two per multiply-add; a training step costs three times as much.

    With an encoder, a token is the mean over both stacks: FLOPs per sequence divided by T + L,
    though each token is in one stack only.

    Attributes:
      attention: projections, scores and weighted values; the whole L x L square counts, as
        computed.
      dense_ffn: FFNs of dense layers, and shared experts.
      experts: the experts that process a token.
      padding: expert FLOPs on slots that no token fills; negative if there are fewer slots than
        choices, so that some choices are sure to be dropped.
      dispatch: contractions with dispatch and combine tensors (0 for index dispatch).
      router: router logits and other matmuls of a router; for Soft MoE also its contractions, which
        are part of the model, not dispatch.
      other: Mamba; projections of multi-token modules; parts of components that the library does
        not know.
      head: output logits, including those of multi-token modules.
    """

    attention: float
    dense_ffn: float
    experts: float
    padding: float
    dispatch: float
    router: float
    other: float
    head: float

    @property
    def model(self) -> float:
        """FLOPs that the model needs, without padding and dispatch. MFU counts these."""
        by_component = (self.attention, self.dense_ffn, self.experts, self.router, self.other)
        return sum(by_component) + self.head

    @property
    def computed(self) -> float:
        """FLOPs that are computed, including padded slots and dispatch contractions."""
        return self.model + self.padding + self.dispatch


class InStack(NamedTuple):
    """A stack of a model, and the tokens that it processes.

    Attributes:
      name: its name in `LanguageModel.stacks`.
      stack: the stack.
      dims: sizes that its parts depend on.
      length: tokens per sequence in it.
      share: these tokens, divided by the tokens per sequence in all stacks.
    """

    name: str
    stack: Stack
    dims: Dims
    length: int
    share: float


class Placed(NamedTuple):
    """A part that is listed once, however often it runs.

    Attributes:
      part: a layer, or a part that runs once before the layers.
      times: how often it runs.
      within: the stack that it is in.
    """

    part: Part
    times: int
    within: InStack

    def costs(self, model: LanguageModel) -> tuple[Cost, ...]:
        """The costs of its stages, per token of its stack."""
        return self.part.costs(self.within.dims, self.within.length, model.compute_dtype)


def lengths_of(model: LanguageModel, length: int | Lengths) -> Lengths:
    """Tokens per sequence in each stack; a single number applies to every stack."""
    if isinstance(length, Lengths):
        return length
    return Lengths(length, length if model.has_encoder else 0)


def stacks_at(model: LanguageModel, length: int | Lengths) -> list[InStack]:
    """The stacks of a model, for sequences of a given length."""
    lengths = lengths_of(model, length)
    dims, tokens = model.dims._replace(memory_length=lengths.encoder), sum(lengths)
    return [
        InStack(name, stack, dims, lengths.of(name), lengths.of(name) / tokens)
        for name, stack in model.stacks.items()
    ]


def different_layers(model: LanguageModel, length: int | Lengths) -> list[Placed]:
    """The layers of all stacks, those of a repeated unit listed once."""
    return [
        Placed(layer, within.stack.repeats if segment == "unit" else 1, within)
        for within in stacks_at(model, length)
        for segment, layers in within.stack.segments()
        for layer in layers
    ]


def different_parts(model: LanguageModel, length: int | Lengths) -> list[Placed]:
    """`different_layers`, and the parts that run once before them."""
    shared = [
        Placed(part, 1, within)
        for within in stacks_at(model, length)
        for _, part in within.stack.shared
    ]
    return different_layers(model, length) + shared


def model_costs(model: LanguageModel, length: int | Lengths) -> Iterator[tuple[Cost, float]]:
    """Every stage of training, and how often a token passes it, as the mean over the stacks."""
    for placed in different_parts(model, length) + module_layers(model, length):
        for cost in placed.costs(model):
            yield cost, placed.times * placed.within.share
    if model.modules is not None:
        yield joining_cost(model), model.modules.depth


def module_layers(model: LanguageModel, length: int | Lengths) -> list[Placed]:
    """The layers of the multi-token modules, which only training runs."""
    modules, own = model.modules, lengths_of(model, length).decoder
    if modules is None:
        return []
    within = InStack(NAME, modules.stack, model.dims, own, 1.0)
    return [Placed(layer, modules.depth, within) for layer in modules.stack.unit]


def joining_cost(model: LanguageModel) -> Cost:
    """A multi-token module's cost outside its layer: the projection of embedding and hidden state.

    Saved are both inputs, normed and not, and the input of the last norm.
    """
    dim, itemsize = model.model_dim, jnp.dtype(model.compute_dtype).itemsize
    return Cost(
        "other",
        flops=2 * 2 * dim * dim,
        saved=Bytes(5 * dim * itemsize),
        saved_dots=Bytes(5 * dim * itemsize),
        largest=Bytes(2 * dim * itemsize),
        traffic=Bytes(3 * dim * itemsize),
    )


def num_heads(model: LanguageModel) -> int:
    """How often training runs the head: for the next token, and for each multi-token module."""
    return 1 if model.modules is None else 1 + model.modules.depth


def head_flops(model: LanguageModel, length: int | Lengths) -> float:
    """Forward FLOPs of the head per token; tokens of the encoder have none."""
    lengths = lengths_of(model, length)
    flops = 2 * model.model_dim * model.vocab_size * num_heads(model)
    return flops * lengths.decoder / sum(lengths)


def total(
    model: LanguageModel,
    length: int | Lengths,
    of: Callable[[Cost], float],
    kind: str | None = None,
) -> float:
    """A cost, summed over the stages that a token passes: those of one kind, or all."""
    costs = model_costs(model, length)
    return sum(count * of(cost) for cost, count in costs if kind in (None, cost.kind))


def count_flops(model: LanguageModel, sequence_length: int | Lengths) -> FlopCount:
    """Counts the forward FLOPs of a token, with the experts, slots and modules of training.

    Args:
      model: the model.
      sequence_length: L, or L and T of a model with an encoder.
    """
    names = {"routing": "router"}
    by_kind = {
        names.get(kind, kind): total(model, sequence_length, lambda cost: cost.flops, kind)
        for kind in KINDS
    }
    return FlopCount(
        **by_kind | {"head": head_flops(model, sequence_length)},
        padding=total(model, sequence_length, lambda cost: cost.padding),
        dispatch=total(model, sequence_length, lambda cost: cost.dispatch),
    )


def forward_flops(model: LanguageModel, sequence_length: int | Lengths) -> dict[str, float]:
    """Computed forward FLOPs per token by `KINDS`; padding counts as experts."""
    by_kind = {
        kind: total(model, sequence_length, lambda cost: cost.computed, kind) for kind in KINDS
    }
    return by_kind | {"head": head_flops(model, sequence_length)}


def training_flops(
    model: LanguageModel,
    sequence_length: int | Lengths,
    num_microbatches: int = 1,
    logits_chunks: int = 1,
) -> dict[str, float]:
    """Computed FLOPs per token of a training step by `KINDS`.

    The forward pass counts once. The backward pass counts twice that: one product for the input's
    gradient, one for the weight's. The dispatch tensor has no gradient, so its contraction has only
    the first. `model.remat` adds what it computes again: "full" every layer's forward pass, "dots"
    the products with a batch dim (attention scores and values, experts, dispatch). Several
    microbatches with a loss of the whole batch run the layers forward once more, for its sums.
    Logits in chunks are computed again in the backward pass.
    """
    forward = forward_flops(model, sequence_length)
    in_layers = forward | {"head": 0.0}
    again = dict.fromkeys(KINDS, 0.0)
    if model.remat == "full":
        again = dict(in_layers)
    elif model.remat == "dots":
        again = {
            kind: total(model, sequence_length, lambda cost: cost.batched * cost.computed, kind)
            for kind in KINDS
        }
    if measures_first(model, num_microbatches):
        again = {kind: again[kind] + in_layers[kind] for kind in KINDS}
    if logits_chunks > 1:
        again["head"] = forward["head"]
    dispatch = total(model, sequence_length, lambda cost: cost.dispatch)
    again["routing"] -= dispatch / 2  # the other half is the combine
    return {kind: 3 * forward[kind] + again[kind] for kind in KINDS}


def measures_first(model: LanguageModel, num_microbatches: int) -> bool:
    """Whether a step runs the layers forward before it differentiates (see `training.step`)."""
    return num_microbatches > 1 and model.needs_batch_sums
