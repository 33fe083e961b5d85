"""Held-out loss, overall and by domain, in each of the `ways` (legend: `moe_jax.moe`)."""

import functools
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
from moe_jax.training.loss import Batch, call_of, replayed_choices, target_nats
from moe_jax.training.placement import inference_rows
from moe_jax.training.ways import CAPACITIES, ways_of


class SequenceSums(NamedTuple):
    """Sums over the targets of each sequence.

    Attributes:
      nats_B: float32, cross-entropy.
      targets_B: float32, loss weights.
      bytes_B: float32, bytes of text that the targets stand for.
      assigned_XBE: int32, choices of each expert, by part that routes and by layer of it.
    """

    nats_B: jax.Array
    targets_B: jax.Array
    bytes_B: jax.Array
    assigned_XBE: dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def evaluate_batch(
    params: Any,
    model_state: Any,
    batch: Batch,
    token_bytes_V: jax.Array,
    step: jax.Array | None = None,
    *,
    model: LanguageModel,
    capacity: float | None,
) -> SequenceSums:
    """Scores the sequences of a batch; `capacity` 0 asks for none, None for each part's own."""
    call = call_of(batch, step=step, capacity=capacity)
    output = model.run(params, call, state=model_state, replay=replayed_choices(batch))
    weight_BL = batch["loss_weights"]
    nats_BL = target_nats(output.logits_BLV, batch["targets"]) * weight_BL
    sums = SequenceSums(
        nats_B=jnp.sum(nats_BL, axis=1),
        targets_B=jnp.sum(weight_BL, axis=1),
        bytes_B=jnp.sum(token_bytes_V[batch["targets"]] * weight_BL, axis=1),
        assigned_XBE={part: output.aux[part].sequences["assigned_BE"] for part in model.moe_layers},
    )
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), sums)  # every process reads all


class DomainSums:
    """Adds up what sequences say, domain by domain, in float64."""

    def __init__(self, domains: tuple[str, ...]):
        self.domains = domains
        self.sums = np.zeros((len(domains), 3))
        self.assigned_DXE: dict[str, np.ndarray] = {}

    def add(self, sums: SequenceSums, domain_B: np.ndarray) -> None:
        """Adds the sequences of a batch; `domain_B` indexes the domains."""
        values_B3 = np.stack([sums.nats_B, sums.targets_B, sums.bytes_B], axis=1)
        np.add.at(self.sums, domain_B, values_B3.astype(np.float64))
        for part, assigned_XBE in sums.assigned_XBE.items():
            assigned_BXE = np.asarray(assigned_XBE, np.int64).swapaxes(0, 1)
            empty_DXE = np.zeros((len(self.domains), *assigned_BXE.shape[1:]), np.int64)
            np.add.at(self.assigned_DXE.setdefault(part, empty_DXE), domain_B, assigned_BXE)

    def losses(self) -> dict[str, Any]:
        """Nats a token and bits a byte, overall and under `domains`."""
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
        """For each MoE layer and domain, the share of its choices that each expert got.

        Args:
          moe_layers: the layers of each part that routes.
        """
        names = [f"layer_{layer:02d}" for layers in moe_layers.values() for layer in layers]
        shares: dict[str, dict[str, list[float]]] = {}
        for part, layers in moe_layers.items():
            by_layer = self.assigned_DXE[part].swapaxes(0, 1)
            for layer, assigned_DE in zip(layers, by_layer, strict=True):
                name = f"layer_{layer:02d}"
                name = name if names.count(name) == 1 else f"{name}_{part}"
                shares[name] = {
                    domain: (row / row.sum()).tolist()
                    for domain, row in zip(self.domains, assigned_DE, strict=True)
                    if row.sum() > 0
                }
        return shares


def _loss(sums: np.ndarray) -> dict[str, float]:
    nats, targets, num_bytes = sums.tolist()
    return {
        "nats_per_token": nats / targets if targets else float("nan"),
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
      config: of the run.
      data: of the run, opened once.
      mesh: that the parameters lie on; None: one device.
      max_batches: held-out batches to use; None: all.
      batch_size: sequences at once; None: as many as a microbatch of training. See
        `placement.inference_rows`.
      step: finished steps, for settings of the router that are annealed; None: at their ends.

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
      config: of the run.
      batches: of one shape, as `data.heldout_batches` yields them, of `placement.inference_rows`.
      domains: that their `domain` is an index into.
      token_bytes_V: bytes of text that each token stands for; all 0: bits per byte are nan.
      mesh: that the parameters lie on.
      step: finished steps, for settings of the router that are annealed; None: at their ends.

    Returns:
      `dropless` and, for a model with experts of limited capacity, `capacity_limited`, each with
      `nats_per_token`, `bits_per_byte`, `tokens` and the same by domain under `domains`, and with
      its `label` and `mark` (see `ways`); and `domain_expert_share`, by layer and domain, of the
      first.
    """
    ways = ways_of(config.model)
    totals = {name: DomainSums(domains) for name in CAPACITIES if name in ways}
    for index, batch in enumerate(batches):
        batch = dict(batch)
        domain_B = batch.pop("domain")
        arrays = from_whole(batch, mesh, ("batch", None))
        for name, total in totals.items():
            inputs = (params, model_state, arrays, token_bytes_V, step)
            static = {"model": config.model, "capacity": CAPACITIES[name]}
            with jax.set_mesh(mesh):
                if index == 0:
                    compile_in_all(evaluate_batch, *inputs, **static)
                sums = evaluate_batch(*inputs, **static)
            total.add(sums, domain_B)
    shares = totals["dropless"].expert_share(config.model.moe_layers)
    said = {name: ways[name]._asdict() | total.losses() for name, total in totals.items()}
    return said | {"domain_expert_share": shares}
