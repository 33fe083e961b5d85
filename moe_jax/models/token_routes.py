"""Experts by token, as inference engines return them: [length, layers, K], -1 for no expert.

vLLM returns such an array for each text of a rollout (`routed_experts`). A trainer makes a record
of them and replays it, so that the trained policy uses the experts that the rollout policy chose
(Ma 2025, arXiv:2510.11370). Legend: `moe_jax.moe`.
"""

import io
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.config.check import require
from moe_jax.models.model import LanguageModel
from moe_jax.models.routing_record import PartRecord, RoutingRecord, check_record
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Choices

ABSENT = -1


def routes_of(record: RoutingRecord) -> list[np.ndarray]:
    """The experts of every token of each sequence.

    Returns:
      For each sequence int32 [length, X, K]: tokens without padding, all routing layers in order,
      experts best first, then -1. K is the largest of all parts.
    """
    layers = {name: part.layers for name, part in record.parts.items()}
    index = {
        name: np.where(part.choices.chosen, part.choices.expert_index, ABSENT)
        for name, part in record.parts.items()
    }
    is_token_BL = record.segments_BL > 0
    routes = by_token(layers, index)
    return [own[is_token] for own, is_token in zip(routes, is_token_BL, strict=True)]


def by_token(layers: Mapping[str, Sequence[int]], index: Mapping[str, np.ndarray]) -> np.ndarray:
    """Converts experts by part to experts by token.

    Args:
      layers: the layers of each part.
      index: int32 [X, B, L, K] of each part, -1 for a choice that does not count.

    Returns:
      int32 [B, L, layers, K], of all routing layers in order.
    """
    places = places_of(layers)
    batch_shape = next(iter(index.values())).shape[1:3]
    most = max(own.shape[-1] for own in index.values())
    routes = np.full((*batch_shape, len(places), most), ABSENT, np.int32)
    for x, (_, name, i) in enumerate(places):
        routes[:, :, x, : index[name].shape[-1]] = index[name][i]
    return routes


def record_of_routes(
    model: LanguageModel, texts: Sequence[Sequence[int]], routes: Sequence[np.ndarray]
) -> RoutingRecord:
    """The record of texts, from the experts that an engine returned.

    Args:
      model: the model that replays them, without an encoder.
      texts: token ids.
      routes: for each text, integers [length, layers, K]. The layers are the routing layers, or all
        layers with -1 in the others. K is the largest of all parts; -1 follows the choices of parts
        with fewer, and replaces an expert that was not chosen. The last token of a text may have
        only -1, since an engine does not run it; it then uses no expert.

    Returns:
      The record, padded on the right; `batch_fields` turns it into batch fields. Gates are 0 and
      every choice is kept: neither is replayed.

    Raises:
      ValueError: the arrays do not fit the texts or the model, or a token lacks experts.
    """
    require(
        not model.has_encoder,
        "experts by token need a decoder-only model",
        "the model has an encoder",
        "Record it with record_routing",
    )
    require(
        len(texts) == len(routes) > 0,
        "every text needs an array of experts",
        f"{len(texts)} texts, {len(routes)} arrays",
        "Pass as many",
    )
    empty = [i for i, text in enumerate(texts) if not len(text)]
    require(
        not empty,
        "a text must have at least one token",
        f"texts {empty} have none",
        "Leave them out",
    )
    length = max(map(len, texts))
    tokens_BL, segments_BL = np.zeros((2, len(texts), length), np.int32)
    for i, text in enumerate(texts):
        tokens_BL[i, : len(text)], segments_BL[i, : len(text)] = text, 1
    positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BL.shape)
    parts = {}
    for name, layers in model.moe_layers.items():
        moe = model.moe_parts[name]
        options = moe.options(moe.group_size or length, training=False)
        num_choices = moe.router.num_choices(options)
        index: Any = np.zeros((len(layers), len(texts), length, num_choices), np.int32)
        chosen: Any = np.zeros(index.shape, np.bool_)
        gate: Any = np.zeros(index.shape, np.float32)
        for i, (text, route) in enumerate(zip(texts, routes, strict=True)):
            own = of_layers(np.asarray(route), len(text), layers, model, i)
            own = of_part(own, num_choices, name, i)
            check_choices(own, moe, i)
            index[:, i, : len(text)] = np.maximum(own, 0)
            chosen[:, i, : len(text)] = own != ABSENT
        choices = Choices(index, chosen, gate, chosen)
        parts[name] = PartRecord(layers, moe.num_options, choices)
    record = RoutingRecord(tokens_BL, positions_BL, segments_BL, parts)
    check_record(record)
    return record


def routes_bytes(tokens: Sequence[int], routes: np.ndarray) -> bytes:
    """An `.npz` of a text: `tokens` [length], `routed_experts` [length, layers, K]."""
    stream = io.BytesIO()
    np.savez_compressed(
        stream, tokens=np.asarray(tokens, np.int32), routed_experts=routes.astype(np.int32)
    )
    return stream.getvalue()


def load_routes(path: str | pathlib.Path) -> tuple[list[int], np.ndarray]:
    """Reads the tokens of a text and their experts, as `generate --routes` writes them.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["tokens"].tolist(), file["routed_experts"]
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"a file of experts by token must be an .npz with tokens and routed_experts: {path} is "
            f"not ({error}). Write it with generate --routes."
        ) from error


def of_layers(
    route: np.ndarray, length: int, layers: Sequence[int], model: LanguageModel, text: int
) -> np.ndarray:
    """The experts of one text in some layers: [layers, length, K]."""
    routing = [layer for layer, _, _ in places_of(model.moe_layers)]
    sizes = (len(routing), model.stack.num_layers)
    require(
        route.ndim == 3 and len(route) == length and route.shape[1] in sizes,
        f"the experts of a text must be [length, layers, K], of {sizes[0]} layers that route or "
        f"all {sizes[1]}",
        f"text {text} has {length} tokens and an array {route.shape}",
        "Pass the array of its own text",
    )
    rows = [routing.index(layer) if route.shape[1] == len(routing) else layer for layer in layers]
    return np.moveaxis(route[:, rows], 1, 0)


def of_part(own: np.ndarray, num_choices: int, name: str, text: int) -> np.ndarray:
    """The experts of one text in the layers of a part, without the columns of other parts."""
    rule = f"a token has {num_choices} experts of {name!r}, or -1 in place of one"
    require(
        own.shape[-1] >= num_choices,
        rule,
        f"the array of text {text} has {own.shape[-1]} for each token and layer",
        "Record with a model that chooses as many, or add columns of -1",
    )
    wrong = (own < ABSENT) | ((own != ABSENT) & (np.arange(own.shape[-1]) >= num_choices))
    place = tuple(np.argwhere(wrong)[0].tolist()) if wrong.any() else ()
    require(
        not place,
        f"{rule}, and -1 in any columns behind them",
        f"text {text} has {own[place] if place else own.shape} at [layer of the part, token, "
        f"choice] {list(place)}",
        "Record with a model that chooses as many",
    )
    return own[..., :num_choices]


def check_choices(own: np.ndarray, moe: MoE, text: int) -> None:
    """Checks that no token lacks experts that its router must have chosen, or that its gates need.

    Where experts choose tokens, a token may have any number of them.
    """
    absent = own == ABSENT
    none, some = absent.all(axis=-1), absent.any(axis=-1)
    missing = np.argwhere(none[:, :-1])
    require(
        not len(missing) or moe.fills_slots(training=True),
        "every token but the last needs experts in every layer that routes",
        f"text {text} has none for [layer, token] {missing[0].tolist() if len(missing) else []}",
        "Replay whole texts",
    )
    missing = np.argwhere(some & ~none)
    require(
        not len(missing) or not moe.router.gates_need_all_choices,
        "gates that are normalised over all choices of a token need all of them",
        f"text {text} has -1 among the experts of [layer, token] "
        f"{missing[0].tolist() if len(missing) else []}, router={moe.router}",
        "Replay a RoutingRecord, which keeps the experts of choices that do not count",
    )


def places_of(layers: Mapping[str, Sequence[int]]) -> list[tuple[int, str, int]]:
    """Routing layers in order: the layer, its part, and its index among the part's layers."""
    return sorted((layer, name, i) for name, own in layers.items() for i, layer in enumerate(own))
