"""The loss of a batch, and the share of a microbatch in it (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

from moe_jax.config.settings import Settings, setting
from moe_jax.models import multi_token
from moe_jax.models.model import LanguageModel
from moe_jax.moe.routing import Choices
from moe_jax.part import NOTHING, Aux, Call, EncoderInputs
from moe_jax.training.logits_chunks import sum_over_chunks

Batch = Mapping[str, jax.Array]
ENCODER_INPUTS = ("encoder_inputs", "encoder_positions", "encoder_segment_ids")
REPLAY = "replay/"  # fields of a batch: replay/PART/expert_index and replay/PART/chosen


class Totals(NamedTuple):
    """The denominators of a whole batch's losses, known before the model runs.

    Attributes:
      loss_weight: float32 scalar, sum of the loss weights of its targets.
      tokens: float32 scalar, number of its valid tokens.
      sums: sums of the whole batch, by part of the model; None: no loss needs them, or the
        microbatch is the whole batch.
      encoder_tokens: float32 scalar, number of valid encoder tokens; None without an encoder.
      later_D: float32, sum of loss weights per multi-token module; None without modules.
      later_tokens_D: float32, valid tokens per module: for module k, tokens with another k later in
        their document; None without modules.
    """

    loss_weight: jax.Array
    tokens: jax.Array
    sums: dict[str, Any] | None = None
    encoder_tokens: jax.Array | None = None
    later_D: jax.Array | None = None
    later_tokens_D: jax.Array | None = None


class LossParts(NamedTuple):
    """The loss of a microbatch: its additive share in the loss of the batch.

    Attributes:
      cross_entropy: float32 scalar, nats per target.
      aux: `Aux` by part of the model.
      of_loss: float32 scalars, metrics of the training loss by name; also shares.
    """

    cross_entropy: jax.Array
    aux: dict[str, Aux]
    of_loss: dict[str, jax.Array] = NOTHING


class Scored(NamedTuple):
    """The output of a model on a microbatch, for a training loss.

    Attributes:
      logits_BLV: float32.
      nats_BL: float32, unweighted cross-entropy of every target.
      cross_entropy: float32 scalar, its share: the weighted sum over `totals.loss_weight`.
    """

    logits_BLV: jax.Array
    nats_BL: jax.Array
    cross_entropy: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainingLoss(Settings):
    """The loss that a step differentiates, in addition to the losses of the model's parts.

    A loss may read arrays that are not the model's, such as the parameters of a teacher. They are
    arguments of the step, are placed on its mesh, have no gradient and are in no checkpoint. Name
    your own loss by its import path: `training.loss="my_losses:Mine"`.
    """

    family: ClassVar[str] = "loss"
    # Whether `share` may get some positions of each sequence at a time (`training.logits_chunks`).
    takes_chunks: ClassVar[bool] = False

    def content(self, config: Any, content: Mapping[str, str]) -> dict[str, str]:
        """Sha256 of what it reads from disk, by name; a resumed run requires the same.

        Args:
          config: the `ExperimentConfig` of the run.
          content: sha256 of its corpus and its tokenizer.

        Raises:
          ValueError: a file to read is missing, or does not fit the run.
        """
        del config, content
        return {}

    def with_whole_paths(self) -> Self:
        """The loss with absolute paths, as a run records them."""
        return self

    def teachers(self, config: Any) -> tuple[Any, ...]:
        """The `ExperimentConfig`s of models that every step runs forward, without a gradient."""
        del config
        return ()

    def abstract_arrays(self, config: Any, mesh: Any) -> tuple[Any, ...]:
        """The arrays that it reads, as trees of `jax.ShapeDtypeStruct` with shardings."""
        del config, mesh
        return ()

    def arrays(self, config: Any, mesh: Any) -> tuple[Any, ...]:
        """The arrays, each with its sharding; read once, before the first step."""
        return self.abstract_arrays(config, mesh)

    def share(
        self, scored: Scored, microbatch: Batch, totals: Totals, arrays: tuple[Any, ...]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The share of a microbatch in the loss, and in metrics by name.

        Shares add up over the microbatches of a batch, so divide a sum over tokens by a total of
        the whole batch.

        Args:
          scored: the model's output; differentiate through `logits_BLV`.
          microbatch: the sequences, see `partial_loss`.
          totals: totals of the whole batch.
          arrays: as `arrays` returns them.

        Returns:
          Float32 scalars. Metrics are written as train/NAME.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class CrossEntropy(TrainingLoss):
    """The weighted mean cross-entropy of the targets, nats per target."""

    takes_chunks: ClassVar[bool] = True

    def share(
        self, scored: Scored, microbatch: Batch, totals: Totals, arrays: tuple[Any, ...]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `TrainingLoss`."""
        del microbatch, totals, arrays
        return scored.cross_entropy, {}


@dataclasses.dataclass(frozen=True)
class CrossEntropyZ(TrainingLoss):
    """`CrossEntropy` and the weighted mean of logsumexp(logits)^2 over the targets.

    It keeps the normaliser of the softmax near 1. The metric train/z_loss is unweighted. Source:
    Mesh TensorFlow's `z_loss`, with which T5 and its successors trained; PaLM, Chowdhery et al.
    2022, arXiv:2204.02311, sec. 5.
    """

    takes_chunks: ClassVar[bool] = True

    z_loss: float = setting(1e-4, at_least=0)  # the weight of that mean

    def share(
        self, scored: Scored, microbatch: Batch, totals: Totals, arrays: tuple[Any, ...]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `TrainingLoss`."""
        del arrays
        z_BL = jax.nn.logsumexp(scored.logits_BLV, axis=-1) ** 2
        z_loss = jnp.sum(z_BL * microbatch["loss_weights"]) / totals.loss_weight
        return scored.cross_entropy + self.z_loss * z_loss, {"z_loss": z_loss}


def batch_totals(batch: Batch, model: LanguageModel | None = None) -> Totals:
    """The denominators of a batch of any shape; `model` may have multi-token modules."""
    weights = batch["loss_weights"].astype(jnp.float32)
    tokens, encoder_tokens = (
        jnp.maximum(jnp.sum(batch[name] > 0).astype(jnp.float32), 1) if name in batch else None
        for name in ("segment_ids", "encoder_segment_ids")
    )
    assert tokens is not None
    weight = jnp.maximum(jnp.sum(weights), 1e-9)
    totals = Totals(weight, tokens, encoder_tokens=encoder_tokens)
    if model is None or model.modules is None:
        return totals
    depths = range(1, model.modules.depth + 1)
    segments = batch["segment_ids"]
    sums = [jnp.sum(multi_token.later_weights(weights, segments, k)) for k in depths]
    counts = [jnp.sum(multi_token.same_document(segments, k)) for k in depths]
    return totals._replace(
        later_D=jnp.maximum(jnp.stack(sums), 1e-9),
        later_tokens_D=jnp.maximum(jnp.stack(counts).astype(jnp.float32), 1),
    )


def replayed_choices(batch: Batch) -> dict[str, Choices]:
    """The choices in a batch that routers must take, by part, [X, B, L, K].

    The batch holds `replay/PART/expert_index` (int32) and, if not all choices count,
    `replay/PART/chosen` (bool). They are [B, L, X, K], since all arrays of a batch can be cut by
    sequences.
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


def call_of_batch(batch: Batch, **settings: Any) -> Call:
    """The `Call` of a model on a batch, with encoder inputs if the batch has `encoder_inputs`."""
    encoder = None
    if "encoder_inputs" in batch:
        encoder = EncoderInputs(*(batch[name] for name in ENCODER_INPUTS))
    return Call(
        tokens_BL=batch["inputs"],
        positions_BL=batch["positions"],
        segments_BL=batch["segment_ids"],
        encoder=encoder,
        contiguous=True,
        in_prefix_BL=batch["in_prefix"] > 0 if "in_prefix" in batch else None,
        **settings,
    )


@jax.named_scope("loss")
def target_nats(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Cross-entropy of every target, float32 [B, L], nats."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV.astype(jnp.float32), targets_BL
    )


def partial_loss(
    params: Any,
    microbatch: Batch,
    totals: Totals,
    model: LanguageModel,
    *,
    model_state: Mapping[str, Any],
    rng: jax.Array,
    step: jax.Array | None = None,
    training_loss: TrainingLoss | None = None,
    arrays: tuple[Any, ...] = (),
    logits_chunks: int = 1,
) -> tuple[jax.Array, LossParts]:
    """The share of a microbatch in the training loss of its batch.

    Shares add up to the loss of the batch, and so do their gradients. Terms are sums over tokens,
    divided by totals of the whole batch. The number of microbatches therefore changes nothing
    beyond rounding, except as `make_train_step` describes.

    Args:
      params: parameters of the model.
      microbatch: `inputs`, `targets`, `segment_ids`, `positions` int32 and `loss_weights` float32
        [B, L]; for an encoder `encoder_inputs`, `encoder_segment_ids` and `encoder_positions`,
        int32 [B, T]; and optionally what `replayed_choices` reads.
      totals: totals of the whole batch.
      model: the model.
      model_state: state by part.
      rng: key for dropout, jitter and noise.
      step: int32 scalar, for annealed settings; None: their final values.
      training_loss: the run's training loss; None: cross-entropy.
      arrays: the arrays that it reads.
      logits_chunks: see `training.logits_chunks`.

    Returns:
      The share of the total loss (differentiate this), and its parts.
    """
    training_loss = training_loss or CrossEntropy()
    call = call_of_batch(microbatch, rng=rng, step=step)
    trees: dict[str, Any] = {"state": model_state, "replay": replayed_choices(microbatch)}
    output = model.run(params, call, multi_token=model.modules is not None, **trees)
    head = model.head_params(params)
    assert output.hidden_BLM is not None

    def score(head: Any, hidden_BLM: jax.Array, fields: Batch, others: Any) -> Any:
        totals, arrays = others
        logits_BLV = model.logits(head, hidden_BLM)
        nats_BL = target_nats(logits_BLV, fields["targets"])
        cross_entropy = jnp.sum(nats_BL * fields["loss_weights"]) / totals.loss_weight
        scored = Scored(logits_BLV, nats_BL, cross_entropy)
        return cross_entropy, *training_loss.share(scored, fields, totals, arrays)

    fields = microbatch
    if logits_chunks > 1:  # those of the positions that the head scores
        shape = microbatch["targets"].shape
        by_position = (name for name in microbatch if name not in ENCODER_INPUTS)
        fields = {n: microbatch[n] for n in by_position if microbatch[n].shape[:2] == shape}
    # The output's own logits are not used, so the compiler leaves them out.
    cross_entropy, share, of_loss = sum_over_chunks(
        score, head, output.hidden_BLM, fields, (totals, arrays), logits_chunks
    )
    aux = output.aux
    if output.later_BLM:
        later = later_losses(model, head, output.later_BLM, microbatch, totals, logits_chunks)
        aux = aux | {multi_token.NAME: later}
    tokens = (totals.encoder_tokens, totals.later_tokens_D)
    loss = share + model.loss(aux, totals.tokens, totals.sums, *tokens)
    return loss, LossParts(cross_entropy, aux, of_loss)


def later_losses(
    model: LanguageModel,
    head: Any,
    later_BLM: Sequence[jax.Array],
    microbatch: Batch,
    totals: Totals,
    logits_chunks: int = 1,
) -> Aux:
    """The cross-entropy of each multi-token module: its share in the mean over the batch.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 24, except that the mean is over existing targets:
    the last k tokens of a document have none in module k.
    """
    assert totals.later_D is not None, "batch_totals was told the model"

    def score(head: Any, hidden_BLM: jax.Array, fields: Batch, _: Any) -> jax.Array:
        nats_BL = target_nats(model.logits(head, hidden_BLM), fields["targets"])
        return jnp.sum(nats_BL * fields["weights"])

    shares = []
    weights_BL, segments_BL = microbatch["loss_weights"], microbatch["segment_ids"]
    for k, hidden_BLM in enumerate(later_BLM, 1):
        fields = {
            "targets": multi_token.shift(microbatch["targets"], k),
            "weights": multi_token.later_weights(weights_BL, segments_BL, k),
        }
        shares.append(sum_over_chunks(score, head, hidden_BLM, fields, (), logits_chunks))
    return Aux(sums={"loss_D": jnp.stack(shares) / totals.later_D})
