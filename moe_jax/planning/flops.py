"""FLOPs of a model, from the costs of its parts (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Callable, Iterator

from moe_jax.costs import Cost
from moe_jax.models.layer import Layer
from moe_jax.models.model import LanguageModel
from moe_jax.part import Part

KINDS = ("attention", "dense_ffn", "experts", "routing", "other", "head")


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs per token, two per multiply-add; a training step costs three times as much.

    Attributes:
      attention: projections, scores and weighted values; the whole L x L square is counted, as it
        is computed.
      dense_ffn: FFNs of dense layers, and shared experts.
      experts: the experts that compute a token.
      padding: expert FLOPs on slots that no token fills; below 0 where there are fewer slots than
        choices, so that some are sure to be dropped.
      dispatch: contractions with dispatch and combine tensors (0 for index dispatch).
      router: router logits, and what else a router computes by matrices; of Soft MoE also its
        contractions, which are no dispatch but the model itself.
      other: parts of components that the library does not know.
      head: output logits.
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
        """FLOPs that are computed, with padded slots and dispatch contractions."""
        return self.model + self.padding + self.dispatch


def different_layers(model: LanguageModel) -> Iterator[tuple[Layer, int]]:
    """The layers of the stack that are written once, and how often each runs."""
    for segment, layers in model.decoder.segments():
        for layer in layers:
            yield layer, model.decoder.repeats if segment == "unit" else 1


def model_costs(model: LanguageModel, length: int) -> Iterator[tuple[Cost, int]]:
    """Every stage of the layers, and of parts that run once, and how often it is there."""
    runs: list[tuple[Part, int]] = [*different_layers(model)]
    runs += [(part, 1) for _, part in model.decoder.shared]
    for part, count in runs:
        for cost in part.costs(model.dims, length, model.compute_dtype):
            yield cost, count


def total(
    model: LanguageModel, length: int, of: Callable[[Cost], float], kind: str | None = None
) -> float:
    """A number of every stage, of one kind or of all, summed over the model."""
    costs = model_costs(model, length)
    return sum(count * of(cost) for cost, count in costs if kind in (None, cost.kind))


def count_flops(model: LanguageModel, sequence_length: int) -> FlopCount:
    """Counts the forward FLOPs of a token, with the experts and slots of training.

    Args:
      model: the model.
      sequence_length: L.
    """
    names = {"routing": "router"}
    by_kind = {
        names.get(kind, kind): total(model, sequence_length, lambda cost: cost.flops, kind)
        for kind in KINDS
    }
    return FlopCount(
        **by_kind | {"head": 2 * model.model_dim * model.vocab_size},
        padding=total(model, sequence_length, lambda cost: cost.padding),
        dispatch=total(model, sequence_length, lambda cost: cost.dispatch),
    )


def forward_flops(model: LanguageModel, sequence_length: int) -> dict[str, float]:
    """Computed forward FLOPs per token by `KINDS`; padding counts as experts."""
    by_kind = {
        kind: total(model, sequence_length, lambda cost: cost.computed, kind) for kind in KINDS
    }
    return by_kind | {"head": 2 * model.model_dim * model.vocab_size}


def training_flops(
    model: LanguageModel, sequence_length: int, num_microbatches: int = 1
) -> dict[str, float]:
    """Computed FLOPs per token of a training step by `KINDS`.

    Forward once; backward twice that (one product for the input's gradient, one for the weight's;
    only the first for the contraction with the dispatch tensor, which has no gradient); and what
    `model.remat` computes again: "full" every layer's forward pass, "dots" the products with a
    batch dim (attention scores and values, experts, dispatch). Several microbatches with a loss of
    the whole batch run the layers forward once more, for its sums.
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
    dispatch = total(model, sequence_length, lambda cost: cost.dispatch)
    again["routing"] -= dispatch / 2  # half of it is combined
    return {kind: 3 * forward[kind] + again[kind] for kind in KINDS}


def measures_first(model: LanguageModel, num_microbatches: int) -> bool:
    """Whether a step runs the layers forward before it differentiates; `training.step` says why."""
    return num_microbatches > 1 and model.needs_batch_sums
