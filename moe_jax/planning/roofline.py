"""The least time that work can take at the published rates of a chip."""

import dataclasses

from moe_jax.planning.communication import collectives
from moe_jax.planning.flops import KINDS, count_flops, forward_flops, training_flops
from moe_jax.planning.sorted_rows import flops_in_vain
from moe_jax.planning.topology import Topology
from moe_jax.planning.traffic import hbm_traffic
from moe_jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a device needs for each kind of work on its own.

    Attributes:
      compute: FLOPs at the bfloat16 matmul rate.
      memory: bytes at the memory's rate.
      interconnect: bytes sent within the slice or node, all links busy.
      network: bytes that leave the slice or node.
    """

    compute: float
    memory: float
    interconnect: float
    network: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds if everything overlaps: the time of the slowest resource.

        A step that trains all parameters is never faster.
        """
        return max(dataclasses.astuple(self))

    @property
    def seconds_in_turn(self) -> float:
        """Seconds if nothing overlaps: the sum."""
        return sum(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """The resource that takes longest: "compute", "memory", "interconnect" or "network"."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])

    def mfu(self, model_flops: float, rate: float) -> float:
        """Model FLOP utilisation: model FLOPs / (rate x seconds)."""
        return model_flops / (rate * self.seconds)


def roofline(
    topology: Topology, flops: float, hbm_bytes: float, wire_bytes: float, crossing_bytes: float
) -> Roofline:
    """The work of one device, divided by its share of the chip's rates.

    Args:
      topology: the machine.
      flops: computed.
      hbm_bytes: to and from memory.
      wire_bytes: sent, inside and out of the slice or node.
      crossing_bytes: those of them that leave it, by the network card alone.
    """
    chip = topology.chip
    n = chip.devices
    return Roofline(
        compute=flops * n / chip.flops,
        memory=hbm_bytes * n / chip.hbm_bandwidth,
        interconnect=(wire_bytes - crossing_bytes) * n / chip.interconnect,
        network=crossing_bytes * n / chip.network,
    )


def model_flops(work: Workload) -> float:
    """FLOPs per step and device that training needs, which MFU counts.

    Three times the forward pass, without padding, dispatch and remat.
    """
    tokens = work.config.training.batch_size * work.length / work.mesh.num_devices
    return 3 * count_flops(work.model, work.lengths).model * tokens


def computed_flops(work: Workload) -> dict[str, float]:
    """Computed FLOPs per step and device, by kind of layer, with the unfilled rows of tiles.

    "teacher" is the forward pass of all teachers, not split by kind.
    """
    tokens = work.config.training.batch_size * work.length / work.mesh.num_devices
    if work.learns:
        training = work.config.training
        by_kind = training_flops(
            work.model, work.lengths, training.num_microbatches, training.logits_chunks
        )
    else:
        by_kind = forward_flops(work.model, work.lengths)
    flops = {kind: tokens * by_kind[kind] for kind in KINDS}
    flops["experts"] += flops_in_vain(work)
    return flops | {"teacher": sum(sum(computed_flops(one).values()) for one in work.teachers)}


def estimate_by_kind(work: Workload, topology: Topology) -> dict[str, Roofline]:
    """The roofline of each kind of layer, from arithmetic; also "teacher" and "optimizer"."""
    flops, traffic = computed_flops(work), hbm_traffic(work)
    messages = collectives(work)
    island = topology.devices_per_island
    result = {}
    for kind in (*KINDS, "teacher", "optimizer"):
        own = [message for message in messages if message.layer_kind == kind]
        result[kind] = roofline(
            topology,
            flops.get(kind, 0.0),
            traffic[kind],
            sum(message.wire_bytes for message in own),
            sum(message.crossing_bytes(work.mesh, island) for message in own),
        )
    return result


def estimate(work: Workload, topology: Topology) -> Roofline:
    """The roofline of a training step, from arithmetic."""
    parts = estimate_by_kind(work, topology).values()
    return Roofline(*(sum(times) for times in zip(*map(dataclasses.astuple, parts), strict=True)))
