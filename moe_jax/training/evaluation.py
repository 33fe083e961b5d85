"""Held-out loss, overall and per domain, at each of the `CAPACITIES` (legend: `moe_jax.moe`).

C counts chunks of positions, D domains.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig, MeshConfig
from moe_jax.data import Data, heldout_batches
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.batches import from_whole
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.processes import compile_in_all
from moe_jax.parallel.rules import constrain
from moe_jax.part import NOTHING
from moe_jax.training.logits_chunks import over_chunks
from moe_jax.training.loss import Batch, call_of_batch, replayed_choices, target_nats
from moe_jax.training.loss_labels import CAPACITIES, loss_labels
from moe_jax.training.placement import inference_rows


class SequenceSums(NamedTuple):
    """Sums over the targets of each sequence.

    Attributes:
      nats_B: float32, cross-entropy.
      targets_B: float32, loss weights.
      bytes_B: float32, bytes of text in the targets.
      assigned_XBE: int32, choices per expert; one array per routing part, X indexes its layers.
      overflow_X: int32, choices of the whole batch that a bounded buffer had no room for; one array
        per part with such a buffer, X indexes its layers.
    """

    nats_B: jax.Array
    targets_B: jax.Array
    bytes_B: jax.Array
    assigned_XBE: dict[str, jax.Array]
    overflow_X: Mapping[str, jax.Array] = NOTHING


@functools.partial(jax.jit, static_argnames=("model", "capacity", "logits_chunks"))
def evaluate_batch(
    params: Any,
    model_state: Any,
    batch: Batch,
    token_bytes_V: jax.Array,
    step: jax.Array | None = None,
    *,
    model: LanguageModel,
    capacity: float | None,
    logits_chunks: int = 1,
) -> SequenceSums:
    """Scores the sequences of a batch; `capacity` 0 means dropless, None each part's own."""
    call = call_of_batch(batch, step=step, capacity=capacity)
    output = model.run(params, call, state=model_state, replay=replayed_choices(batch))
    weight_BL = batch["loss_weights"]

    def score(hidden_BLM: jax.Array, fields: Batch) -> jax.Array:
        nats_BL = target_nats(model.logits(params, hidden_BLM), fields["targets"])
        return jnp.sum(nats_BL * fields["loss_weights"], axis=1)

    assert output.hidden_BLM is not None
    fields = {name: batch[name] for name in ("targets", "loss_weights")}
    nats_CB = over_chunks(score, output.hidden_BLM, fields, logits_chunks)
    aux = {part: output.aux[part] for part in model.moe_layers}
    sums = SequenceSums(
        nats_B=jnp.sum(nats_CB, axis=0),
        targets_B=jnp.sum(weight_BL, axis=1),
        bytes_B=jnp.sum(token_bytes_V[batch["targets"]] * weight_BL, axis=1),
        assigned_XBE={part: own.sequences["assigned_BE"] for part, own in aux.items()},
        overflow_X={
            part: own.sums["buffer_overflow"]
            for part, own in aux.items()
            if "buffer_overflow" in own.sums
        },
    )
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), sums)  # every process reads all


class DomainSums:
    """Accumulates the sums of sequences per domain; losses in float64."""

    def __init__(self, domains: tuple[str, ...]):
        self.domains = domains
        self.sums = np.zeros((len(domains), 3))
        self.assigned_DXE: dict[str, np.ndarray] = {}
        self.overflow_X: dict[str, np.ndarray] = {}

    def add(self, sums: SequenceSums, domain_B: np.ndarray) -> None:
        """Adds the sequences of a batch; `domain_B` indexes the domains."""
        values_B3 = np.stack([sums.nats_B, sums.targets_B, sums.bytes_B], axis=1)
        np.add.at(self.sums, domain_B, values_B3.astype(np.float64))
        for part, assigned_XBE in sums.assigned_XBE.items():
            assigned_BXE = np.asarray(assigned_XBE, np.int64).swapaxes(0, 1)
            empty_DXE = np.zeros((len(self.domains), *assigned_BXE.shape[1:]), np.int64)
            np.add.at(self.assigned_DXE.setdefault(part, empty_DXE), domain_B, assigned_BXE)
        for part, overflow_X in sums.overflow_X.items():
            before_X = self.overflow_X.get(part, 0)
            self.overflow_X[part] = before_X + np.asarray(overflow_X, np.int64)

    def losses(self) -> dict[str, Any]:
        """Losses per token and per byte, overall and per domain under `domains`."""
        return _loss(self.sums.sum(axis=0)) | {
            "domains": {
                name: _loss(sums)
                for name, sums in zip(self.domains, self.sums, strict=True)
                if sums[1] > 0
            }
        }

    def expert_share(
        self, moe_layers: Mapping[str, tuple[int, ...]]
    ) -> dict[str, dict[str, list[float]]]:
        """Each expert's share of the choices, by MoE layer and domain.

        Args:
          moe_layers: the layers of each routing part.
        """
        shares: dict[str, dict[str, list[float]]] = {}
        for part, names in layer_names(moe_layers).items():
            by_layer = self.assigned_DXE[part].swapaxes(0, 1)
            for name, assigned_DE in zip(names, by_layer, strict=True):
                shares[name] = {
                    domain: (row / row.sum()).tolist()
                    for domain, row in zip(self.domains, assigned_DE, strict=True)
                    if row.sum() > 0
                }
        return shares

    def overflow(self, moe_layers: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
        """Lost choices by layer, under `buffer_overflow`; {} without a bounded buffer."""
        names = layer_names(moe_layers)
        lost = {
            name: int(count)
            for part, overflow_X in self.overflow_X.items()
            for name, count in zip(names[part], overflow_X, strict=True)
        }
        return {"buffer_overflow": lost} if lost else {}


def layer_names(moe_layers: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Layer names of each routing part: `layer_03`, or `layer_03_PART` if several share a layer."""
    numbers = [layer for layers in moe_layers.values() for layer in layers]
    return {
        part: [
            f"layer_{layer:02d}" if numbers.count(layer) == 1 else f"layer_{layer:02d}_{part}"
            for layer in layers
        ]
        for part, layers in moe_layers.items()
    }


def perplexity(nats_per_token: float) -> float:
    """Perplexity per token, exp(nats_per_token); inf above 700 nats."""
    return math.exp(nats_per_token) if not nats_per_token > 700 else math.inf


def _loss(sums: np.ndarray) -> dict[str, float]:
    nats, targets, num_bytes = sums.tolist()
    per_token = nats / targets if targets else float("nan")
    return {
        "nats_per_token": per_token,
        "perplexity": perplexity(per_token),
        "bits_per_byte": nats / num_bytes / float(np.log(2)) if num_bytes else float("nan"),
        "tokens": targets,
    }


def evaluate(
    params: Any,
    model_state: Any,
    config: ExperimentConfig,
    data: Data,
    *,
    mesh: Mesh | None = None,
    max_batches: int | None = None,
    batch_size: int | None = None,
    step: jax.Array | None = None,
) -> dict[str, Any]:
    """Scores the held-out split.

    Args:
      params: parameters of the model.
      model_state: state by part, such as selection biases.
      config: the run's config.
      data: the run's data, opened once.
      mesh: mesh of the parameters; None: one device.
      max_batches: held-out batches to use; None: all.
      batch_size: sequences per batch; None: as in a training microbatch. See
        `placement.inference_rows`.
      step: number of finished steps, for annealed router settings; None: their final values.

    Returns:
      See `score`.
    """
    mesh = mesh or make_mesh(MeshConfig(data=1))
    rows = inference_rows(config, mesh, batch_size)
    batches = heldout_batches(data, batch_size=rows, max_batches=max_batches)
    length = config.data.sequence_length
    token_bytes_V = config.data.objective.token_bytes(data.tokenizer, length)
    return score(params, model_state, config, batches, data.domains, token_bytes_V, mesh, step)


def score(
    params: Any,
    model_state: Any,
    config: ExperimentConfig,
    batches: Iterable[Mapping[str, Any]],
    domains: tuple[str, ...],
    token_bytes_V: np.ndarray,
    mesh: Mesh,
    step: jax.Array | None = None,
) -> dict[str, Any]:
    """Scores batches of text.

    Args:
      params: parameters of the model.
      model_state: state by part, such as selection biases.
      config: the run's config.
      batches: batches of one shape with `placement.inference_rows` sequences, as from
        `data.heldout_batches`.
      domains: names of the domains; `domain` of a batch indexes them.
      token_bytes_V: bytes of text per token; all 0: bits per byte are nan.
      mesh: mesh of the parameters.
      step: number of finished steps, for annealed router settings; None: their final values.

    Returns:
      `dropless` and, for a model with experts of limited capacity, `capacity_limited`. Each
      contains `nats_per_token`, `perplexity` (per token), `bits_per_byte` and `tokens`; the same
      per domain under `domains`; `label` and `mark` (see `LossLabel`); and, with a bounded buffer,
      `buffer_overflow`, the lost choices by layer. Also `domain_expert_share` of the `dropless`
      evaluation, by layer and domain.
    """
    labels = loss_labels(config.model)
    totals = {name: DomainSums(domains) for name in CAPACITIES if name in labels}
    for index, batch in enumerate(batches):
        batch = dict(batch)
        domain_B = batch.pop("domain")
        arrays = from_whole(batch, mesh, ("batch", None))
        for name, total in totals.items():
            inputs = (params, model_state, arrays, token_bytes_V, step)
            chunks = math.gcd(config.training.logits_chunks, config.lengths.decoder)
            static = {"model": config.model, "capacity": CAPACITIES[name], "logits_chunks": chunks}
            with jax.set_mesh(mesh):
                if index == 0:
                    compile_in_all(evaluate_batch, *inputs, **static)
                sums = evaluate_batch(*inputs, **static)
            total.add(sums, domain_B)
    shares = totals["dropless"].expert_share(config.model.moe_layers)
    losses = {
        name: labels[name]._asdict() | total.losses() | total.overflow(config.model.moe_layers)
        for name, total in totals.items()
    }
    return losses | {"domain_expert_share": shares}
