"""The plan of a config: everything known before it runs, as a record and as JSON."""

import dataclasses
import math
from typing import Any

import numpy as np

from moe_jax.config import MeshConfig
from moe_jax.planning.communication import collectives, crossing_share
from moe_jax.planning.compiled import Compiled
from moe_jax.planning.flops import count_flops
from moe_jax.planning.hlo import Collective as HloCollective
from moe_jax.planning.memory import Memory, estimate_memory, kv_cache_bytes
from moe_jax.planning.parameters import abstract_mesh, count_parameters
from moe_jax.planning.remedies import more_devices, remedies
from moe_jax.planning.roofline import (
    Roofline,
    computed_flops,
    estimate,
    estimate_by_kind,
    model_flops,
    roofline,
)
from moe_jax.planning.sorted_rows import executed_flops, share_in_kernels, sorted_rows
from moe_jax.planning.topology import Topology
from moe_jax.planning.traffic import hbm_traffic, traffic_by_scope
from moe_jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a mesh, and on a machine if one is named.

    Attributes:
      work: the config on its mesh.
      topology: the machine, or None.
      step: the training step compiled for the machine, or None.
      forward: the compiled forward pass of a microbatch, or None.
    """

    work: Workload
    topology: Topology | None = None
    step: Compiled | None = None
    forward: Compiled | None = None

    @property
    def memory(self) -> Memory:
        """Bytes by component, by arithmetic."""
        return estimate_memory(self.work)

    @property
    def available(self) -> float:
        """Bytes of memory that a program may use on a device; infinite without a machine."""
        chip = self.topology.chip if self.topology else None
        return chip.usable_hbm_bytes / chip.devices if chip else math.inf

    @property
    def needed(self) -> float:
        """Bytes on a device, by the compiler, or by arithmetic if nothing was compiled."""
        if self.step is None:
            return self.memory.total
        if self.step.memory is None:
            return self.step.refused[0] if self.step.refused else math.nan
        return self.step.memory.total

    @property
    def room(self) -> float:
        """The largest estimate that should fit: less than available if the compiler needs more."""
        return self.available * min(1.0, self.memory.total / self.needed)

    @property
    def fits(self) -> bool:
        """Whether the step fits: by the compiler if it was asked, else by arithmetic."""
        if self.step is not None and self.step.memory is None:
            return False
        return self.needed <= self.available


@dataclasses.dataclass(frozen=True)
class Row:
    """The collectives of a compiled program with the same operation over the same axes.

    Attributes:
      operation: the HLO opcode.
      axes: mesh axes that the groups span.
      group_size: devices of a group.
      count: executions.
      array_bytes: bytes of the arrays of all executions, on one device.
      wire_bytes: bytes that one device sends.
      crossing_bytes: sent bytes that leave the slice or node.
    """

    operation: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    array_bytes: float
    wire_bytes: float
    crossing_bytes: float


def axes_of_group(group: tuple[int, ...], mesh: MeshConfig) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    sizes = dict(abstract_mesh(mesh).shape)
    coordinates = np.unravel_index(np.asarray(group), tuple(sizes.values()))
    return tuple(
        axis for axis, along in zip(sizes, coordinates, strict=True) if len(set(along.tolist())) > 1
    )


def collective_rows(
    found: tuple[HloCollective, ...], mesh: MeshConfig, devices_per_island: int
) -> list[Row]:
    """Collectives of a program by operation and axes, most bytes sent first."""
    rows: dict[tuple[str, tuple[str, ...], int], Row] = {}
    for one in found:
        if one.group_size < 2:
            continue
        axes = axes_of_group(one.group, mesh)
        islands = len({member // devices_per_island for member in one.group})
        crossing = one.count * crossing_share(one.operation, islands, one.group_size) * one.bytes
        key = (one.operation, axes, one.group_size)
        old = rows.get(key, Row(*key, 0, 0.0, 0.0, 0.0))
        rows[key] = Row(
            *key,
            old.count + one.count,
            old.array_bytes + one.count * one.bytes,
            old.wire_bytes + one.count * one.wire_bytes,
            old.crossing_bytes + crossing,
        )
    return sorted(rows.values(), key=lambda row: -row.wire_bytes)


def compiled_roofline(compiled: Compiled, work: Workload, topology: Topology) -> Roofline:
    """The roofline of a compiled program, on one device."""
    assert compiled.program is not None
    rows = collective_rows(compiled.program.collectives, work.mesh, topology.devices_per_island)
    return roofline(
        topology,
        executed_flops(compiled.program, work),
        compiled.program.hbm_bytes,
        sum(row.wire_bytes for row in rows),
        sum(row.crossing_bytes for row in rows),
    )


def describe_roofline(times: Roofline, plan: Plan) -> dict[str, Any]:
    """Seconds by resource, the bounding resource, and the resulting model FLOP utilisation."""
    assert plan.topology is not None
    chip = plan.topology.chip
    return {
        "seconds": dataclasses.asdict(times),
        "bound": times.bound,
        "step_seconds_overlapped": times.seconds,
        "step_seconds_in_turn": times.seconds_in_turn,
        "mfu_overlapped": times.mfu(model_flops(plan.work), chip.flops / chip.devices),
    }


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object; bytes, FLOPs and seconds are per device and step."""
    described = describe_arithmetic(plan)
    if plan.topology is not None:
        described["topology"] = _describe_topology(plan.topology)
        described["estimate"] = describe_roofline(estimate(plan.work, plan.topology), plan) | {
            "seconds_by_kind": {
                kind: dataclasses.asdict(times)
                for kind, times in estimate_by_kind(plan.work, plan.topology).items()
            }
        }
    for name, compiled in (("compiled_step", plan.step), ("compiled_forward", plan.forward)):
        if compiled is not None:
            described[name] = describe_compiled(compiled, plan, is_step=name == "compiled_step")
    described["needed_bytes"] = plan.needed
    described["available_bytes"] = plan.available if plan.topology else None
    described["fits"] = plan.fits if plan.topology else None
    if not plan.fits:
        described["remedies"] = [
            dataclasses.asdict(one) | {"fits": one.total_bytes <= plan.room}
            for one in remedies(plan.work)
        ]
        enough = more_devices(plan.work, plan.room)
        described["more_devices"] = enough and {
            "num_devices": enough.mesh.num_devices,
            "mesh": dataclasses.asdict(enough.mesh),
            "total_bytes": estimate_memory(enough).total,
        }
    return described


def describe_arithmetic(plan: Plan) -> dict[str, Any]:
    """What follows from the config and its mesh only."""
    work = plan.work
    config, training = work.config, work.config.training
    parameters = count_parameters(work.model, work.lengths)
    flops = count_flops(work.model, work.lengths)
    return {
        "config": config.name,
        "mesh": dataclasses.asdict(work.mesh),
        "num_devices": work.mesh.num_devices,
        "run_experts": work.run_experts,
        "tokens_per_step": training.batch_size * work.length,
        "tokens_per_device_and_microbatch": work.tokens,
        "num_microbatches": training.num_microbatches,
        "parameters": dataclasses.asdict(parameters),
        "parameters_by_convention": {
            name: {"total": total, "active": active}
            for name, (total, active) in parameters.by_convention().items()
        },
        "forward_flops_per_token": dataclasses.asdict(flops)
        | {"model": flops.model, "computed": flops.computed},
        "model_flops": model_flops(work),
        "computed_flops": computed_flops(work),
        "memory_estimate": dataclasses.asdict(plan.memory) | {"total": plan.memory.total},
        "kv_cache_bytes": kv_cache_bytes(work, training.batch_size, work.lengths.decoder),
        "hbm_traffic_estimate": hbm_traffic(work),
        "sorted_rows": [
            dataclasses.asdict(rows) | {"computed": rows.computed} for rows in sorted_rows(work)
        ],
        "collectives_estimate": [
            dataclasses.asdict(one) | {"wire_bytes": one.wire_bytes} for one in collectives(work)
        ],
    }


def describe_compiled(compiled: Compiled, plan: Plan, *, is_step: bool) -> dict[str, Any]:
    """A compiled program, checked against arithmetic if it is the training step."""
    work, topology = plan.work, plan.topology
    assert topology is not None
    described: dict[str, Any] = {
        "compile_seconds": compiled.seconds,
        "compile_cpu_seconds": compiled.cpu_seconds,
    }
    if compiled.memory is None or compiled.program is None:
        needed, available = compiled.refused or (math.nan, math.nan)
        return described | {"refused": {"needed_bytes": needed, "available_bytes": available}}
    program = compiled.program
    rows = collective_rows(program.collectives, work.mesh, topology.devices_per_island)
    described |= {
        "memory": dataclasses.asdict(compiled.memory) | {"total": compiled.memory.total},
        "flops": program.flops,
        "grouped_flops": program.grouped_flops,
        "row_tiles": list(program.row_tiles),
        "hbm_bytes": program.hbm_bytes,
        "hbm_bytes_by_scope": traffic_by_scope(program, work.model),
        "collectives": [dataclasses.asdict(row) for row in rows],
        "uncounted": program.uncounted,
        "unknown_loops": list(program.unknown_loops),
        "cost_analysis_flops": compiled.cost_analysis_flops,
    }
    if is_step:
        executed = executed_flops(program, work)
        described["flops_of_filled_tiles"] = executed
        described["flops_over_arithmetic"] = executed / sum(computed_flops(work).values())
        described["share_of_rows_in_kernels"] = share_in_kernels(program, work)
        described["roofline"] = describe_roofline(compiled_roofline(compiled, work, topology), plan)
    return described


def _describe_topology(topology: Topology) -> dict[str, Any]:
    return {
        "name": topology.name,
        "num_chips": topology.num_chips,
        "num_devices": topology.num_devices,
        "devices_per_island": topology.devices_per_island,
        "chip": dataclasses.asdict(topology.chip),
    }
