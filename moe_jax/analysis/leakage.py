"""Whether a model's predictions depend on later tokens, and what the model gains by that."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.data import heldout_batches, open_data
from moe_jax.models.model import LanguageModel
from moe_jax.training.loss import Batch, call_of_batch, target_nats

BATCH = 16  # sequences whose three sets of logits are kept at a time


class Futures(NamedTuple):
    """Scores of the same predictions with different tokens after them.

    The first three are in bits per byte, for the same targets of the same held-out sequences.

    Attributes:
      teacher_forced: with the text's own continuation in place, as in training.
      prefix_by_prefix: with nothing after the predicting token except padding, which is not routed.
      other_future: with the continuation of another text. Loads and queues are as usual, so the
        increase over `teacher_forced` is what the right continuation gave away.
      moved: the largest change of a logit, up to a place, when all tokens after it are exchanged.
      num_targets: predictions that were scored.
    """

    teacher_forced: float
    prefix_by_prefix: float
    other_future: float
    moved: float
    num_targets: int


def compare_futures(
    params: Any,
    state: Mapping[str, Any] | None,
    config: ExperimentConfig,
    *,
    capacity: float,
    cuts: Sequence[int],
    num_sequences: int,
    step: jax.Array | None = None,
) -> Futures:
    """Scores held-out tokens with three different continuations after them.

    All three have the slots of a whole sequence, so that only what fills them differs.

    Args:
      params: parameters of the model.
      state: state of its parts, such as selection biases; or None.
      config: of the run. Each routing group must be one sequence, or tokens would also compete with
        those of other sequences.
      capacity: slots divided by the mean load, at which MoE layers are evaluated; 0 is dropless.
      cuts: places t in [0, L - 2]: the target at each is scored, and the tokens after it are
        exchanged.
      num_sequences: held-out sequences to use at most, 2 or more, in batches of `BATCH`.
      step: number of finished steps, for annealed router settings; None: their final values.

    Returns:
      The `Futures`.

    Raises:
      ValueError: a cut is no such place, there are fewer than two sequences, a routing group has
        several, or the objective shows a prefix from both sides.
    """
    length = config.data.sequence_length
    if not cuts or min(cuts) < 0 or max(cuts) > length - 2:
        raise ValueError(
            f"cuts must be places with a token after them, from 0 to {length - 2}: got "
            f"{list(cuts)}. Leave the others out."
        )
    require(
        not config.data.objective.sees_prompt,
        "futures are tested only in a model that is not meant to see them",
        f"data.objective={config.data.objective} shows a prefix from both sides",
        "Use causal_lm",
    )
    require(
        num_sequences >= 2,
        "futures must be exchanged between at least two sequences",
        f"num_sequences={num_sequences}",
        "Use 2 or more",
    )
    for name, moe in config.model.moe_parts.items():
        if moe.group_size > length:
            raise ValueError(
                "Futures must be exchanged between sequences that are routing groups of their own: "
                f"{name}.group_size={moe.group_size}, data.sequence_length={length}. Use "
                f"{name}.group_size=0."
            )
    data = open_data(config.data)
    token_bytes_V = data.tokenizer.token_bytes_V
    nats, num_bytes, num_targets, moved = np.zeros(3), 0.0, 0.0, 0.0
    rows = min(num_sequences, BATCH)
    batches = heldout_batches(data, batch_size=rows, max_batches=num_sequences // rows)
    for batch in batches:
        arrays = {name: jnp.asarray(value) for name, value in batch.items() if name != "domain"}
        for cut in cuts:
            scored = score_cut(
                params, state, arrays, cut, model=config.model, capacity=capacity, step=step
            )
            weight_B = np.asarray(arrays["loss_weights"][:, cut], np.float64)
            nats += np.asarray(scored.nats_3B, np.float64) @ weight_B
            num_bytes += float(token_bytes_V[np.asarray(batch["targets"])[:, cut]] @ weight_B)
            num_targets += weight_B.sum()
            moved = max(moved, float(scored.moved))
    own, nothing, other = (nats / np.log(2) / num_bytes).tolist()
    return Futures(own, nothing, other, moved, int(num_targets))


class CutScores(NamedTuple):
    """Nats of the targets at a place under the three futures, and the largest change of a logit."""

    nats_3B: jax.Array
    moved: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def score_cut(
    params: Any,
    state: Mapping[str, Any] | None,
    batch: Batch,
    cut: jax.Array | int,
    *,
    model: LanguageModel,
    capacity: float,
    step: jax.Array | None = None,
) -> CutScores:
    """Scores the targets at `cut` with their own future, with none and with another sequence's."""
    inputs_BL, segments_BL = batch["inputs"], batch["segment_ids"]
    is_later_L = jnp.arange(inputs_BL.shape[1]) > cut

    def logits(tokens_BL: jax.Array, segments_BL: jax.Array) -> jax.Array:
        changed = {**batch, "inputs": tokens_BL, "segment_ids": segments_BL}
        call = call_of_batch(changed, capacity=capacity, step=step)
        return model.run(params, call, state=state).logits_BLV

    own_BLV = logits(inputs_BL, segments_BL)
    none_BLV = logits(inputs_BL, jnp.where(is_later_L, 0, segments_BL))
    other_BL = jnp.where(is_later_L, jnp.roll(inputs_BL, 1, axis=0), inputs_BL)
    other_BLV = logits(other_BL, segments_BL)
    moved_BL = jnp.max(jnp.abs(other_BLV - own_BLV), axis=-1)
    nats_3B = [
        target_nats(logits_BLV[:, cut], batch["targets"][:, cut])
        for logits_BLV in (own_BLV, none_BLV, other_BLV)
    ]
    return CutScores(jnp.stack(nats_3B), jnp.max(jnp.where(is_later_L, 0, moved_BL)))
