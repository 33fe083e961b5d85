"""What one device has of a training step: its tokens, slots and shares (legend: `moe_jax.moe`)."""

import dataclasses
import functools
import math

import jax.numpy as jnp

from moe_jax.config import ExperimentConfig, MeshConfig
from moe_jax.moe.routing.replay import most_choices
from moe_jax.planning.flops import counts_loads_first
from moe_jax.planning.routing import expert_rows, slots_of_an_expert


@dataclasses.dataclass(frozen=True)
class Workload:
    """A config on a mesh; sizes are of one device and one microbatch unless they say otherwise.

    Attributes:
      config: with `moe.dispatch` resolved (but for Soft MoE, which has none) and its mesh filled.
    """

    config: ExperimentConfig

    @property
    def mesh(self) -> MeshConfig:
        """Without -1."""
        return self.config.mesh

    @property
    def length(self) -> int:
        """L, tokens."""
        return self.config.data.sequence_length

    @property
    def sequences(self) -> float:
        """Sequences of a microbatch on one device."""
        training = self.config.training
        return training.batch_size / training.num_microbatches / self.mesh.batch_shards

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on one device."""
        return self.sequences * self.length

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.config.model.compute_dtype).itemsize

    @property
    def num_moe_layers(self) -> int:
        """X."""
        return len(self.config.model.moe_layers)

    @property
    def extra_forward_passes(self) -> int:
        """Forward passes over the layers that a step makes before it differentiates."""
        parts = self.config.training.num_microbatches
        return int(counts_loads_first(self.config.model, parts))

    @functools.cached_property
    def slots(self) -> int:
        """C: slots of an expert in a group."""
        return slots_of_an_expert(self.config.model.moe, self.length)

    @property
    def slots_per_token(self) -> float:
        """Rows that experts compute for a token: with padding, but for sorted rows."""
        return expert_rows(self.config.model.moe, self.length)

    @property
    def rows_per_token(self) -> float:
        """Rows that have a place in memory for a token: of sorted rows, one for every choice."""
        moe = self.config.model.moe
        return most_choices(moe) if moe.dispatch == "ragged" else self.slots_per_token


def resolve(
    config: ExperimentConfig, num_devices: int | None = None, platform: str = "cpu"
) -> Workload:
    """A config on its own mesh.

    Args:
      config: its mesh may have a -1, which takes the devices that are left.
      num_devices: how many there are; None: as many as the mesh needs with 1 for -1.
      platform: "cpu", "tpu" or "gpu", for dispatch "auto".

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
                f"the mesh uses all devices of a topology: {mesh.num_devices} of {num_devices}. "
                "Set one size of config.mesh to -1, or name a smaller topology."
            )
    moe = config.model.moe
    if moe.dispatch == "auto" and not moe.has_soft_slots:
        alone = mesh.num_devices == 1 and platform == "cpu"
        moe = dataclasses.replace(moe, dispatch="ragged" if alone else "gather")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    return Workload(dataclasses.replace(config, mesh=mesh))
