"""What serving a model needs: weights by dtype, caches, time per decoded token, devices.

All numbers follow from the model's parts. Multi-token modules are left out, as in decoding.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Lengths
from moe_jax.costs import Bytes, kept_bytes
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import without_modules
from moe_jax.planning.flops import different_parts, lengths_of
from moe_jax.planning.hardware import CHIPS, Chip
from moe_jax.planning.parameters import count_parameters

# Bits per weight: of routed experts, and of everything else. Quantised weights share a float16
# scale per 32 weights, which adds half a bit to each (`weights.quantised`).
PRECISIONS = {
    "float32": (32.0, 32.0),
    "bfloat16": (16.0, 16.0),
    "int8": (8.5, 8.5),
    "int4 experts, rest bfloat16": (4.5, 16.0),
    "int4": (4.5, 4.5),
}
CONTEXTS = (1024, 8192, 32_768, 131_072)
BATCHES = tuple(2**i for i in range(15))
MOST_DEVICES = 4096


class ServingCosts(NamedTuple):
    """What a model costs to serve, on any device.

    Attributes:
      experts: weights of routed experts, all layers.
      rest: all other weights.
      sparse: for each routed part, the options N of its router (experts E, and those that compute
        nothing), the choices K of a token, and the weights of its experts.
      context: tokens that a decoded token sees.
      cache: bytes of the caches of one text of `context` tokens, in the compute dtype.
      flops: FLOPs per decoded token.
      unread: weights in `rest` that decoding does not read: those of an encoder, those that only a
        prefill reads, and an untied input embedding, of which it reads single rows.
    """

    experts: int
    rest: int
    sparse: tuple[tuple[int, int, int], ...]
    context: int
    cache: int
    flops: float
    unread: int = 0

    def weights(self, precision: str) -> float:
        """Bytes of all weights."""
        of_experts, of_rest = PRECISIONS[precision]
        return (self.experts * of_experts + self.rest * of_rest) / 8

    def read(self, precision: str, batch: int) -> float:
        """Bytes read to decode one token of each text; experts that no token uses are not read.

        Choices are taken as independent and even: of E experts, E (1 - (1 - K / N)^B) are used.
        """
        of_experts, of_rest = PRECISIONS[precision]
        used = sum(size * (1 - (1 - k / n) ** batch) for n, k, size in self.sparse)
        rest = self.rest - self.unread
        return (used * of_experts + rest * of_rest) / 8 + batch * self.cache


def serving_costs(model: LanguageModel, context: int) -> ServingCosts:
    """The costs of a model whose texts have `context` tokens."""
    model = without_modules(model)
    parameters = count_parameters(model, context)
    of_encoder = model.stacks["encoder"].layer_indices() if model.has_encoder else {}
    sparse = []
    for name, part in model.moe_parts.items():
        if name in of_encoder:
            continue
        size = sum(
            spec.size
            for spec in jax.tree.leaves(part.specs(model.dims).get("experts", {}))
        )  # fmt: skip
        layers = len(model.moe_layers[name])
        sparse.append((part.num_options, part.num_selected(training=False), size * layers))
    return ServingCosts(
        experts=parameters.experts,
        rest=parameters.total - parameters.experts,
        sparse=tuple(sparse),
        context=context,
        cache=cache_bytes(model, context),
        flops=decode_flops(model, context),
        unread=unread_weights(model),
    )


def decode_flops(model: LanguageModel, context: int) -> float:
    """FLOPs to decode one token from caches of `context` tokens; an encoder has already run."""
    in_layers = sum(
        placed.times * placed.part.decode_flops(placed.within.dims, context, model.compute_dtype)
        for placed in different_parts(model, context)
        if placed.within.name != "encoder"
    )
    return in_layers + 2 * model.model_dim * model.vocab_size


def unread_weights(model: LanguageModel) -> int:
    """See `ServingCosts.unread`."""
    specs, decoder = model.plain_specs(), model.decoder
    names = [name for name in specs if name.startswith("encoder")]  # also its embedding and norm
    names += [] if model.tie_embeddings else ["embedding"]
    unread = [spec for name in names for spec in jax.tree.leaves(specs[name])]
    total = sum(spec.size for spec in unread if spec.component != "experts")
    layers = decoder.layer_indices()
    for name, part in decoder.parts().items():
        copies = 1 if name in decoder.tied else len(layers[name])
        own = part.specs(model.dims)
        of_prefill = [own[key] for key in part.prefill_only if key in own]
        total += copies * sum(spec.size for spec in jax.tree.leaves(of_prefill))
    return total


def stored_bytes(model: LanguageModel) -> int:
    """Bytes of the parameters in their stored dtypes: float32, or integers if quantised."""
    specs = without_modules(model).specs()
    return sum(spec.size * jnp.dtype(spec.dtype).itemsize for spec in jax.tree.leaves(specs))


def cache_bytes(model: LanguageModel, context: int) -> int:
    """Bytes of the caches of one text of `context` tokens, as `inference` keeps them."""
    return int(caches_of_a_text(model, context).on(1))


def caches_of_a_text(model: LanguageModel, length: int | Lengths) -> Bytes:
    """`cache_bytes` of a text of `length` tokens, and what a mesh splits of them."""
    lengths = lengths_of(model, length)
    dims = model.dims._replace(memory_length=lengths.encoder)
    specs = model.decoder.cache_specs(dims, 1, lengths.decoder)
    return kept_bytes(specs, model.compute_dtype)


class Decoding(NamedTuple):
    """The time to decode one token of each text, on one chip with the whole model.

    Attributes:
      batch: texts.
      memory_ms: milliseconds to read weights and caches.
      compute_ms: milliseconds to compute the FLOPs.
    """

    batch: int
    memory_ms: float
    compute_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all texts together, at best."""
        return 1000 * self.batch / max(self.memory_ms, self.compute_ms)


def decoding(costs: ServingCosts, chip: Chip, precision: str, batch: int) -> Decoding:
    """The best that a chip's published rates allow, if its memory held the model."""
    return Decoding(
        batch,
        memory_ms=1000 * costs.read(precision, batch) / chip.hbm_bandwidth,
        compute_ms=1000 * batch * costs.flops / chip.flops,
    )


def first_compute_bound(costs: ServingCosts, chip: Chip, precision: str) -> int | None:
    """The smallest batch, a power of two, whose FLOPs take at least as long as its reads.

    None if no batch of `BATCHES` is large enough.
    """
    for batch in BATCHES:
        found = decoding(costs, chip, precision, batch)
        if found.compute_ms >= found.memory_ms:
            return batch
    return None


def never_compute_bound(costs: ServingCosts, chip: Chip) -> bool:
    """Whether reading a text's cache takes at least as long as its FLOPs, at any batch size."""
    return costs.cache / chip.hbm_bandwidth >= costs.flops / chip.flops


def devices_needed(
    costs: ServingCosts, chip: Chip, precision: str, batch: int, *, experts_alone: bool
) -> int | None:
    """The fewest devices, a power of two, whose memory holds the model and its caches; or None.

    Args:
      costs: of the model.
      chip: the chip of the devices.
      precision: one of `PRECISIONS`.
      batch: texts at once.
      experts_alone: split only experts and texts over the devices, and copy the rest to each; else
        split everything.
    """
    of_experts, of_rest = PRECISIONS[precision]
    usable = chip.usable_hbm_bytes / chip.devices
    rest, experts = costs.rest * of_rest / 8, costs.experts * of_experts / 8
    count = 1
    while count <= MOST_DEVICES:
        copied = rest if experts_alone else rest / count
        texts = math.ceil(batch / count) if experts_alone else batch / count
        if copied + experts / count + texts * costs.cache <= usable:
            return count
        count *= 2
    return None


def serving_text(model: LanguageModel, context: int, batch: int, chips: Mapping[str, Chip]) -> str:
    """The costs as tables: weights, caches, decoding, devices."""
    costs = serving_costs(model, context)
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            [*weights_lines(costs), *stored_lines(model)],
            cache_lines(model),
            decoding_lines(costs, chips),
            device_lines(costs, batch, chips),
        )
    )


def weights_lines(costs: ServingCosts) -> Iterator[str]:
    """Weights by precision."""
    yield f"weights: {costs.experts + costs.rest:,}, {costs.experts:,} of them in routed experts"
    for name in PRECISIONS:
        yield f"  {name:<28}{costs.weights(name) / 1e9:>12,.2f} GB"


def stored_lines(model: LanguageModel) -> Iterator[str]:
    """Bytes of a quantised model."""
    if model.quantisation is not None:
        yield f"  {'as model.quantisation says':<28}{stored_bytes(model) / 1e9:>12,.2f} GB"


def cache_lines(model: LanguageModel) -> Iterator[str]:
    """Cache sizes by length of the text."""
    yield f"cache of one text, {model.compute_dtype}"
    for context in CONTEXTS:
        size = cache_bytes(model, context)
        yield f"  {context:>8,} tokens{size / 1e6:>14,.2f} MB{size / context:>12,.0f} B a token"


def decoding_lines(costs: ServingCosts, chips: Mapping[str, Chip]) -> Iterator[str]:
    """Decoding time by chip, in bfloat16."""
    yield (
        f"decoding in bfloat16 at {costs.context:,} tokens: {costs.flops / 1e9:,.2f} GFLOP and, in "
        f"a batch of 1, {costs.read('bfloat16', 1) / 1e9:,.2f} GB a token"
    )
    yield "  at best, by published rates of one chip, as if its memory held the model"
    yield "  chip     ms a token, batch 1  tokens/s, batch 64  FLOPs bind from"
    for name, chip in chips.items():
        one, many = (decoding(costs, chip, "bfloat16", batch) for batch in (1, 64))
        first = first_compute_bound(costs, chip, "bfloat16")
        bound = f"over {BATCHES[-1]:,}" if first is None else f"batch {first:,}"
        if first is None and never_compute_bound(costs, chip):
            bound = "never: caches"
        took = max(one.memory_ms, one.compute_ms)
        yield f"  {name:<8}{took:>20,.2f}{many.tokens_per_second:>20,.0f}{bound:>17}"


def device_lines(costs: ServingCosts, batch: int, chips: Mapping[str, Chip]) -> Iterator[str]:
    """Devices by chip and precision."""
    yield f"devices whose memory holds the model and {batch} texts of {costs.context:,} tokens:"
    yield "  all split / experts and texts split, the rest on each"
    for name, chip in chips.items():
        yield f"  {name}"
        for precision in PRECISIONS:
            counts = (
                devices_needed(costs, chip, precision, batch, experts_alone=alone)
                for alone in (False, True)
            )
            cell = " / ".join(f"over {MOST_DEVICES}" if n is None else str(n) for n in counts)
            yield f"    {precision:<28}{cell:>16}"


def describe_serving(
    model: LanguageModel, context: int, batch: int, chips: Mapping[str, Chip]
) -> dict[str, Any]:
    """The numbers of `serving_text` as a JSON object."""
    costs = serving_costs(model, context)
    return {
        "weights": {"experts": costs.experts, "rest": costs.rest},
        "weight_bytes": {name: costs.weights(name) for name in PRECISIONS},
        "stored_bytes": stored_bytes(model),
        "cache_bytes": {length: cache_bytes(model, length) for length in (context, *CONTEXTS)},
        "flops_per_token": costs.flops,
        "bytes_per_token": costs.read("bfloat16", 1),
        "chips": {
            name: {
                "decoding": [decoding(costs, chip, "bfloat16", b)._asdict() for b in (1, 64)],
                "compute_bound_from": first_compute_bound(costs, chip, "bfloat16"),
                "devices": {
                    precision: {
                        how: devices_needed(costs, chip, precision, batch, experts_alone=alone)
                        for how, alone in (("all_split", False), ("experts_split", True))
                    }
                    for precision in PRECISIONS
                },
            }
            for name, chip in chips.items()
        },
    }


def chips_of(name: str) -> dict[str, Chip]:
    """The chip of this name, or all for ""."""
    return {name: CHIPS[name]} if name else dict(CHIPS)
