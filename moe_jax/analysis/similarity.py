"""How alike the weights of experts are (legend: `moe_jax.moe`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.analysis.routed import routed_layers
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import Stack
from moe_jax.parameters import dense


class BlockWeights(NamedTuple):
    """The weights of one MoE block.

    Attributes:
      num_experts: E, including zero-computation experts, which come last and have no matrices.
      experts: weights of the experts that compute, by name, each with a leading dim of experts.
      router_IE: a column for each expert; None for a router without such weights.
    """

    num_experts: int
    experts: Mapping[str, np.ndarray]
    router_IE: np.ndarray | None


def cosine_similarity(rows_EI: np.ndarray) -> np.ndarray:
    """The cosine of every pair of rows.

    Args:
      rows_EI: any real numbers.

    Returns:
      float64 [E, E], symmetric, 1 on the diagonal; nan if a row is all 0. Rows of I independent
      numbers of mean 0 have a cosine of mean 0 and standard deviation 1 / sqrt(I).
    """
    rows_EI = np.asarray(rows_EI, np.float64)
    with np.errstate(invalid="ignore"):
        unit_EI = rows_EI / np.linalg.norm(rows_EI, axis=1, keepdims=True)
    return unit_EI @ unit_EI.T


def expert_similarity(experts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine of the experts' matrices, flattened into one row per expert.

    Hidden units of an expert can change places without changing what it computes. So experts that
    were initialised apart are near 0, whatever they have in common. Only experts that come from one
    matrix (upcycled, or initialised alike) are near 1, until they move apart.

    Args:
      experts: weights of a block; its matrices [E, M, H] and [E, H, M] are read.

    Returns:
      float64 [E, E].
    """
    rows = [weight.reshape(len(weight), -1) for weight in experts.values() if weight.ndim == 3]
    return cosine_similarity(np.concatenate(rows, axis=1))


def router_similarity(router_IE: np.ndarray | None) -> np.ndarray | None:
    """Cosine of the router's columns, float64 [E, E]; None for a router without weights."""
    return None if router_IE is None else cosine_similarity(router_IE.T)


def moe_weights(
    params: Mapping[str, Any], model: LanguageModel, name: str = "stack"
) -> dict[str, BlockWeights]:
    """The weights of each MoE block of a stack, by layer, in the order of the model.

    Args:
      params: of the model; its repeated layers are unstacked.
      model: the model.
      name: of the stack.
    """
    stack, moes = model.stacks[name], model.moe_parts
    layers = {part: of for part, of in model.moe_layers.items() if part in stack.parts()}
    blocks = {part: blocks_of(params[name], stack, part) for part in layers}
    return {
        layer.name: block_weights(blocks[layer.part][layer.row], moes[layer.part])
        for layer in routed_layers(layers)
    }


def blocks_of(params: Mapping[str, Any], stack: Stack, part: str) -> list[Any]:
    """The parameters of each layer of a part, in order, from those of the stack."""
    tied = params.get("tied", {})
    blocks = []
    for segment in ("first", "unit", "last"):
        places = [p for p in stack.places()[part] if p.segment == segment]
        for repeat in range(stack.repeats if segment == "unit" else 1):
            for place in places:
                own = params[segment][place.layer].get(place.branch)
                if own is None:
                    own = tied[place.branch]
                elif segment == "unit":
                    own = jax.tree.map(lambda a, i=repeat: a[i], own)
                blocks.append(own)
    return blocks


def block_weights(params: Mapping[str, Any], moe: Any) -> BlockWeights:
    """The weights of a block with these parameters."""
    weight = params.get("router", {}).get("weight")
    router_IE = None if weight is None else np.asarray(dense(weight))
    if router_IE is not None and router_IE.shape[-1] != moe.num_options:
        router_IE = None
    experts = {name: np.asarray(dense(weight)) for name, weight in params["experts"].items()}
    return BlockWeights(moe.num_options, experts, router_IE)
