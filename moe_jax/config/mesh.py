"""Settings of the device mesh."""

import dataclasses
import math

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting

AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    """The sizes of the device mesh; their product is the number of devices used.

    Results do not depend on it, except with dropout in experts, so that a run may resume on another
    mesh. One size may be -1: it uses the devices that the others leave.
    """

    slices: int = setting(1, at_least=1)  # TPU slices on a data-centre network; copies of the model
    data: int = setting(-1, at_least=-1)  # copies of the model, each on its share of the batch
    fsdp: int = setting(
        1, at_least=-1
    )  # shards of parameters and optimizer state, gathered layer by layer
    expert: int = setting(1, at_least=-1)  # shards of the experts; divides moe.num_experts
    tensor: int = setting(1, at_least=-1)  # shards of heads and hidden dims
    experts_span_slices: bool = False  # split the experts over slices x expert, not over expert

    def check(self) -> None:
        """See `Settings`."""
        sizes = self.sizes
        require(
            all(size == -1 or size >= 1 for size in sizes),
            "the sizes of the mesh must be at least 1, or -1 for the devices that are left",
            ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True)),
            "Correct them",
        )
        require(
            sizes.count(-1) <= 1,
            "only one size of the mesh may be -1",
            ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True)),
            "Set the others",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of data, fsdp, expert and tensor as written, -1 included."""
        return (self.data, self.fsdp, self.expert, self.tensor)

    def fill(self, num_devices: int) -> "MeshConfig":
        """This mesh with its -1 replaced, for `num_devices` devices.

        Raises:
          ValueError: the sizes do not divide the number of devices, or need more than there are.
        """
        known = self.slices * math.prod(size for size in self.sizes if size != -1)
        written = f"slices={self.slices}, " + ", ".join(
            f"{name}={size}" for name, size in zip(AXES, self.sizes, strict=True)
        )
        if -1 not in self.sizes:
            require(
                known <= num_devices,
                "the mesh must not have more devices than there are",
                f"{written} need {known}, there are {num_devices}",
                "Lower a size of the mesh, or set one to -1",
            )
            return self
        require(
            num_devices % known == 0,
            "the sizes of the mesh must divide the number of devices",
            f"{written}: {known} does not divide {num_devices}",
            "Change a size of the mesh"
            + f"; JAX_NUM_CPU_DEVICES={known} makes as many of one CPU" * (num_devices == 1),
        )
        left = num_devices // known
        data, fsdp, expert, tensor = (left if size == -1 else size for size in self.sizes)
        return dataclasses.replace(self, data=data, fsdp=fsdp, expert=expert, tensor=tensor)

    @property
    def num_devices(self) -> int:
        """The devices of a mesh without -1."""
        assert -1 not in self.sizes, "fill the mesh first"
        return self.slices * math.prod(self.sizes)

    @property
    def expert_shards(self) -> int:
        """The number of devices over which the experts of a layer are split."""
        return self.expert * (self.slices if self.experts_span_slices else 1)

    @property
    def batch_shards(self) -> int:
        """The number of devices over which a batch is split: all axes except tensor."""
        return self.slices * self.data * self.fsdp * self.expert
