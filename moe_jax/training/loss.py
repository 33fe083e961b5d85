"""The loss of a batch, and of a part of it (legend: `moe_jax.moe`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.models.model import LanguageModel
from moe_jax.moe.routing import Choices
from moe_jax.part import Aux, Call, EncoderInputs

Batch = Mapping[str, jax.Array]
ENCODER_INPUTS = ("encoder_inputs", "encoder_positions", "encoder_segment_ids")
REPLAY = "replay/"  # fields of a batch: replay/PART/expert_index and replay/PART/chosen


class Totals(NamedTuple):
    """What the losses of a whole batch are divided by; known before the model runs.

    Attributes:
      loss_weight: float32 scalar, sum of the loss weights of its targets.
      tokens: float32 scalar, its valid tokens.
      sums: of the whole batch, by part, where a loss needs them; None: the part is all of it.
      encoder_tokens: float32 scalar, valid tokens that an encoder reads; None without one.
    """

    loss_weight: jax.Array
    tokens: jax.Array
    sums: dict[str, Any] | None = None
    encoder_tokens: jax.Array | None = None


class LossParts(NamedTuple):
    """The loss of a part of a batch: its additive share in the loss of the batch.

    Attributes:
      cross_entropy: float32 scalar, nats a target.
      aux: what the model's parts said, by part.
    """

    cross_entropy: jax.Array
    aux: dict[str, Aux]


def batch_totals(batch: Batch) -> Totals:
    """The denominators of a batch of any shape."""
    weight = jnp.sum(batch["loss_weights"].astype(jnp.float32))
    tokens, encoder_tokens = (
        jnp.maximum(jnp.sum(batch[name] > 0).astype(jnp.float32), 1) if name in batch else None
        for name in ("segment_ids", "encoder_segment_ids")
    )
    assert tokens is not None
    return Totals(jnp.maximum(weight, 1e-9), tokens, encoder_tokens=encoder_tokens)


def replayed_choices(batch: Batch) -> dict[str, Choices]:
    """The choices that a batch tells routers to take, by part, [X, B, L, K].

    Its `replay/PART/expert_index` (int32) and, where not all choices count, `replay/PART/chosen`
    (bool) are [B, L, X, K]: like everything in a batch they can be cut by sequences.
    """
    replay = {}
    for name in batch:
        part, _, field = name.removeprefix(REPLAY).rpartition("/")
        known = part and field in ("expert_index", "chosen")
        if name.startswith(REPLAY) and (not known or f"{REPLAY}{part}/expert_index" not in batch):
            raise ValueError(
                f"Choices to replay are {REPLAY}PART/expert_index and, beside it, "
                f"{REPLAY}PART/chosen: {name!r}. Correct the name of the field."
            )
        if name.startswith(REPLAY) and field == "expert_index":
            index = jnp.moveaxis(batch[name], 2, 0)
            chosen = batch.get(f"{REPLAY}{part}/chosen")
            counts = jnp.ones(index.shape, jnp.bool_)
            if chosen is not None:
                counts = jnp.moveaxis(chosen, 2, 0)
            replay[part] = Choices(index, counts)
    return replay


def call_of(batch: Batch, **settings: Any) -> Call:
    """What a model is told of a batch; of one with `encoder_inputs`, what its encoder reads too."""
    encoder = None
    if "encoder_inputs" in batch:
        encoder = EncoderInputs(*(batch[name] for name in ENCODER_INPUTS))
    return Call(
        tokens_BL=batch["inputs"],
        positions_BL=batch["positions"],
        segments_BL=batch["segment_ids"],
        encoder=encoder,
        **settings,
    )


def target_nats(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Cross-entropy of every target, float32 [B, L], nats."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV.astype(jnp.float32), targets_BL
    )


def partial_loss(
    params: Any,
    part: Batch,
    totals: Totals,
    model: LanguageModel,
    *,
    model_state: Mapping[str, Any],
    rng: jax.Array,
    step: jax.Array | None = None,
) -> tuple[jax.Array, LossParts]:
    """The share of some sequences in the training loss of their batch.

    Shares add up to the loss of the batch, and so do their gradients, however it is cut: every
    term is a sum over tokens, divided by a total of the whole batch.

    Args:
      params: parameters of the model.
      part: `inputs`, `targets`, `segment_ids`, `positions` int32 and `loss_weights` float32 [B, L];
        for an encoder `encoder_inputs`, `encoder_segment_ids` and `encoder_positions`, int32
        [B, T]; and perhaps what `replayed_choices` reads.
      totals: of the whole batch.
      model: the model.
      model_state: state by part.
      rng: key of dropout, jitter and noise.
      step: int32 scalar, for settings that are annealed; None: at their ends.

    Returns:
      The share of the total loss (differentiate this), and its parts.
    """
    call = call_of(part, rng=rng, step=step)
    output = model.run(params, call, state=model_state, replay=replayed_choices(part))
    nats_BL = target_nats(output.logits_BLV, part["targets"])
    cross_entropy = jnp.sum(nats_BL * part["loss_weights"]) / totals.loss_weight
    loss = cross_entropy + model.loss(output.aux, totals.tokens, totals.sums, totals.encoder_tokens)
    return loss, LossParts(cross_entropy, output.aux)
