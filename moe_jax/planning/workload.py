"""One device's share of a training step: its tokens and slots (legend: `moe_jax.moe`)."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import ExperimentConfig, Lengths, MeshConfig
from moe_jax.costs import Cost
from moe_jax.models.model import LanguageModel
from moe_jax.planning.flops import Placed, measures_first, model_costs
from moe_jax.planning.parameters import abstract_mesh
from moe_jax.training.placement import check_run, resolved_model


@dataclasses.dataclass(frozen=True)
class Workload:
    """A config on a mesh; sizes are per device and microbatch unless noted.

    Attributes:
      config: with its parts resolved (`Part.resolved`) and its mesh filled.
      platform: "cpu", "tpu" or "gpu".
      learns: whether the step differentiates the model and updates it; a teacher only runs forward.
    """

    config: ExperimentConfig
    platform: str = "cpu"
    learns: bool = True

    @property
    def mesh(self) -> MeshConfig:
        """The mesh, without -1."""
        return self.config.mesh

    @property
    def lengths(self) -> Lengths:
        """L and, with an encoder, T."""
        return self.config.lengths

    @property
    def length(self) -> int:
        """Tokens per sequence in all stacks."""
        return sum(self.lengths)

    @property
    def sequences(self) -> float:
        """Sequences of a microbatch on one device."""
        training = self.config.training
        return training.batch_size / training.num_microbatches / self.mesh.batch_shards

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on one device, in all stacks."""
        return self.sequences * self.length

    @property
    def decoder_tokens(self) -> float:
        """Tokens of a microbatch on one device that the head reads."""
        return self.sequences * self.lengths.decoder

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.config.model.compute_dtype).itemsize

    @property
    def model(self) -> LanguageModel:
        """The model, resolved."""
        model = self.config.model
        assert isinstance(model, LanguageModel)
        return model

    @property
    def run_experts(self) -> dict[str, str]:
        """How experts run, for each part that has any, including those of multi-token modules."""
        parts: dict[str, Any] = self.model.part
        return {name: part.run_experts for name, part in parts.items() if part.routes}

    @functools.cached_property
    def teachers(self) -> tuple["Workload", ...]:
        """The models that the loss of the step runs forward on the same tokens."""
        resolved = (
            resolve(config, self.mesh.num_devices, self.platform)
            for config in self.config.training.loss.teachers(self.config)
            if self.learns
        )
        return tuple(dataclasses.replace(work, learns=False) for work in resolved)

    @property
    def extra_forward_passes(self) -> int:
        """Forward passes over the layers that a step makes before it differentiates."""
        num_microbatches = self.config.training.num_microbatches
        return int(self.learns and measures_first(self.model, num_microbatches))

    @property
    def runs_of_layers(self) -> int:
        """How often a step runs a layer, forward or backward, including remat's repeats."""
        if not self.learns:
            return 1
        return 2 + (self.model.remat != "none") + self.extra_forward_passes

    def products(self, batched: bool) -> int:
        """How often a step computes a product of a layer: 1 forward, 2 backward, 1 in remat.

        Args:
          batched: whether the product has a batch dim, which remat "dots" computes again.
        """
        if not self.learns:
            return 1
        again = self.model.remat == "full" or (self.model.remat == "dots" and batched)
        return 3 + again + self.extra_forward_passes

    @functools.cached_property
    def costs(self) -> tuple[tuple[Cost, float], ...]:
        """Every stage of the model, and how often a token passes it."""
        with self.on_mesh():
            return tuple(model_costs(self.model, self.lengths))

    def costs_of(self, placed: Placed) -> tuple[Cost, ...]:
        """The costs of the stages of one part, per token of its stack."""
        with self.on_mesh():
            return placed.costs(self.model)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the mesh is in use, with devices of the platform."""
        return use_mesh(self.mesh, self.platform)

    def total(self, of: Callable[[Cost], float], kind: str | None = None) -> float:
        """A cost, summed over the stages that a token passes: those of one kind, or all."""
        return sum(count * of(cost) for cost, count in self.costs if kind in (None, cost.kind))


def resolve(
    config: ExperimentConfig, num_devices: int | None = None, platform: str = "cpu"
) -> Workload:
    """A config on its own mesh.

    Args:
      config: its mesh may have a -1, which takes the remaining devices.
      num_devices: how many there are; None: as many as the mesh needs with 1 for -1.
      platform: "cpu", "tpu" or "gpu", which decides "auto" settings.

    Raises:
      ValueError: the mesh does not fit the devices, or does not split the arrays evenly.
    """
    mesh = config.mesh
    if num_devices is None:
        known = (size for size in mesh.sizes if size != -1)
        mesh = mesh.fill(mesh.slices * math.prod(known))
    else:
        mesh = mesh.fill(num_devices)
        if mesh.num_devices != num_devices:
            raise ValueError(
                f"the mesh must use all devices of a topology: {mesh.num_devices} of "
                f"{num_devices}. Set one size of config.mesh to -1, or name a smaller topology."
            )
    with use_mesh(mesh, platform):
        model = resolved_model(config)
    config = dataclasses.replace(config, mesh=mesh, model=model)
    check_run(config, abstract_mesh(mesh))
    work = Workload(config, platform)
    _ = work.teachers  # the mesh must split them as well
    return work


def use_mesh(mesh: MeshConfig, platform: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which a mesh is in use; its devices need not be present."""
    device = jax.sharding.AbstractDevice("planned", None, platform)
    return jax.sharding.use_abstract_mesh(abstract_mesh(mesh, device))
