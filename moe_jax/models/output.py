"""What a model returns: logits, and reports of its parts and layers (legend: `moe_jax.moe`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.part import Aux


class Encoded(NamedTuple):
    """What an encoder reports in addition to its output.

    Attributes:
      aux: the `Aux` of its parts, by part, each with a leading dim of layers.
      residual_XBTM: the residual stream after every layer, if `Call.record`; else None.
    """

    aux: Mapping[str, Aux] = {}
    residual_XBTM: jax.Array | None = None


class ModelOutput(NamedTuple):
    """The output of a model.

    Attributes:
      logits_BLV: float32, unnormalised log-probabilities of the next token.
      aux: the `Aux` of its parts, by part, each with a leading dim of layers.
      cache: the new caches by position; empty without a cache.
      residual_XBLM: the residual stream after every layer, if `Call.record`; else None.
      later_BLV: logits of the multi-token modules, on request: module k predicts the token k + 1
        ahead, float32 [B, L, V].
      later_BLM: the normed residuals of these modules, which the head reads.
      encoder_residual_XBTM: the encoder's residual stream, if it ran and `Call.record`; else None.
      hidden_BLM: the normed residual that the head reads, at every place.
    """

    logits_BLV: jax.Array
    aux: dict[str, Aux]
    cache: Any = None
    residual_XBLM: jax.Array | None = None
    later_BLV: tuple[jax.Array, ...] = ()
    later_BLM: tuple[jax.Array, ...] = ()
    encoder_residual_XBTM: jax.Array | None = None
    hidden_BLM: jax.Array | None = None


def of_both(encoder: Mapping[str, Aux], decoder: Mapping[str, Aux]) -> dict[str, Aux]:
    """The aux of both stacks by part; a part in both has the encoder's layers first."""
    both = {
        name: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), encoder[name], decoder[name])
        for name in encoder
        if name in decoder
    }
    return {**encoder, **decoder, **both}
