"""All meshes of a machine by arithmetic, best first."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from moe_jax.config import ExperimentConfig, MeshConfig
from moe_jax.planning.memory import Memory, estimate_memory
from moe_jax.planning.parameters import plain_parameter_specs
from moe_jax.planning.remedies import largest
from moe_jax.planning.roofline import Roofline, estimate, model_flops
from moe_jax.planning.text import COMPILE, NEAR, table
from moe_jax.planning.topology import Topology
from moe_jax.planning.workload import Workload, resolve, use_mesh
from moe_jax.training.placement import resolved_model

MAX_ROWS = 12  # of each table
MAX_TENSOR = 64


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh that splits everything evenly.

    Attributes:
      work: the config on this mesh.
      memory: by arithmetic.
      times: the roofline of a step, by arithmetic.
      mfu: model FLOP utilisation if everything overlaps.
      fits: whether a device has enough memory: by arithmetic, unless the compiler ran.
      compiled_bytes: bytes per device by the compiler, if it ran; infinite if it refused.
    """

    work: Workload
    memory: Memory
    times: Roofline
    mfu: float
    fits: bool
    compiled_bytes: float | None = None

    def is_near(self, limit: float) -> bool:
        """Whether arithmetic alone says that it fits, and gives more bytes per device than this."""
        return self.compiled_bytes is None and self.memory.total > limit


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The meshes of a machine.

    Each list starts with the fastest. In `too_large`, meshes that do not fit as compiled precede
    the others.

    Attributes:
      topology: the machine.
      fitting: meshes with enough memory.
      too_large: meshes without enough memory.
      uneven: number of refused meshes by the rule that they break, such as an even split of arrays
        or batch.
      own: the config's own mesh; None if it is not among those that split everything evenly.
    """

    topology: Topology
    fitting: list[Candidate]
    too_large: list[Candidate]
    uneven: dict[str, int]
    own: MeshConfig | None = None


def meshes(num_devices: int, slices: int) -> Iterator[MeshConfig]:
    """Every way to share the devices of a slice among data, fsdp, expert and tensor."""
    inner = num_devices // slices
    for tensor in _divisors(inner):
        if tensor > MAX_TENSOR:
            continue
        for expert in _divisors(inner // tensor):
            for fsdp in _divisors(inner // tensor // expert):
                data = inner // tensor // expert // fsdp
                yield MeshConfig(slices, data, fsdp, expert, tensor)


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def sweep(config: ExperimentConfig, topology: Topology, compile_best: int = 0) -> Sweep:
    """Estimates a step on every mesh of a machine.

    Args:
      config: of its mesh, `experts_span_slices` holds for all; the rest is one of the meshes.
      topology: the machine.
      compile_best: compile the step on this many of the fastest meshes that should fit.

    Raises:
      ValueError: a setting is impossible on this machine, whatever the mesh.
    """
    chip = topology.chip
    available = chip.usable_hbm_bytes / chip.devices
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    uneven: dict[str, int] = {}
    configs = [config, *config.training.loss.teachers(config)]
    copies = MeshConfig(topology.slices, topology.num_devices // topology.slices)
    with use_mesh(copies, chip.platform):  # an error here holds for every mesh
        models = [resolved_model(one) for one in configs]
    specs = itertools.chain.from_iterable(map(plain_parameter_specs, models))
    has_experts = any("expert" in spec.axes for spec in specs)
    for mesh in meshes(topology.num_devices, topology.slices):
        mesh = dataclasses.replace(mesh, experts_span_slices=config.mesh.experts_span_slices)
        if mesh.expert > 1 and not has_experts:
            continue
        try:
            changed = dataclasses.replace(config, mesh=mesh)
            work = resolve(changed, topology.num_devices, chip.platform)
        except ValueError as error:
            reason = rule_of(str(error))
            uneven[reason] = uneven.get(reason, 0) + 1
            continue
        memory, times = estimate_memory(work), estimate(work, topology)
        mfu = times.mfu(model_flops(work), chip.flops / chip.devices)
        one = Candidate(work, memory, times, mfu, memory.total <= available)
        (fitting if one.fits else too_large).append(one)
    for found in (fitting, too_large):
        found.sort(key=lambda one: (one.times.seconds, one.times.seconds_in_turn))
    asked = [compile_candidate(one, topology) for one in fitting[:compile_best]]
    rest = fitting[compile_best:]
    return Sweep(
        topology,
        [one for one in asked if one.fits] + rest,
        [one for one in asked if not one.fits] + too_large,
        uneven,
        own_mesh(config, topology),
    )


def own_mesh(config: ExperimentConfig, topology: Topology) -> MeshConfig | None:
    """The config's mesh on a machine; None if it does not fit the machine or the model."""
    try:
        return resolve(config, topology.num_devices, topology.chip.platform).mesh
    except ValueError:
        return None


def rule_of(error: str) -> str:
    """The rule that a mesh breaks, without the values and the fix.

    >>> rule_of("part 'moe': experts are split evenly: 8 over 3. Use 4.")
    "part 'moe': experts are split evenly"
    """
    part, colon, rest = error.partition(": ") if error.startswith("part '") else ("", "", error)
    return part + colon + rest.split(": ", 1)[0]


def compile_candidate(candidate: Candidate, topology: Topology) -> Candidate:
    """Compiles the step to learn how much memory it needs."""
    from moe_jax.planning.aot import compile_training_step

    compiled = compile_training_step(candidate.work, topology)
    needed = compiled.memory.total if compiled.memory else math.inf
    available = topology.chip.usable_hbm_bytes / topology.chip.devices
    return dataclasses.replace(candidate, compiled_bytes=needed, fits=needed <= available)


def sweep_text(found: Sweep) -> str:
    """The meshes as tables."""
    tried = (*found.fitting, *found.too_large)
    num_compiled = sum(one.compiled_bytes is not None for one in tried)
    how = f"by arithmetic, {num_compiled} of them compiled" if num_compiled else "by arithmetic"
    lines = [
        f"{found.topology.name}: {len(found.fitting)} meshes fit, {len(found.too_large)} do not, "
        f"{sum(found.uneven.values())} are refused ({how})"
    ]
    near = NEAR * found.topology.chip.usable_hbm_bytes / found.topology.chip.devices
    if shown := found.fitting[:MAX_ROWS]:
        lines += ["", "fit, fastest first", *_rows(shown, near)]
        if any(one.is_near(near) for one in shown):
            lines.append(f"*: above {NEAR:.0%} of the memory. {COMPILE}")
    for place, one in enumerate(found.fitting[MAX_ROWS:], MAX_ROWS + 1):
        if one.work.mesh == found.own:
            lines += ["", f"the config's own mesh, number {place} of these", *_rows([one], near)]
    if found.too_large:
        lines += ["", "do not fit, fastest first", *_rows(found.too_large[:MAX_ROWS], math.inf)]
    if found.uneven:
        worst = sorted(found.uneven.items(), key=lambda item: -item[1])[:5]
        lines += ["", "refused", *table([(f"{n:,}", rule) for rule, n in worst], left=(1,))]
    return "\n".join(lines)


def _rows(candidates: list[Candidate], near: float) -> list[str]:
    """A table with a mark at each candidate that `is_near`."""
    head = ("data", "fsdp", "expert", "tensor", "ms", "ms in turn", "bound", "MFU", "GiB")
    rows: list[tuple[str, ...]] = [(*head, "GiB compiled", "most memory")]
    for one in candidates:
        name, size = largest(one.memory)[0]
        compiled = "" if one.compiled_bytes is None else f"{one.compiled_bytes / 1024**3:.1f}"
        compiled = "refused" if one.compiled_bytes == math.inf else compiled
        rows.append(
            (
                *(str(size) for size in one.work.mesh.sizes),
                f"{1e3 * one.times.seconds:,.1f}",
                f"{1e3 * one.times.seconds_in_turn:,.1f}",
                one.times.bound,
                f"{one.mfu:.1%}",
                f"{one.memory.total / 1024**3:.1f}" + "*" * one.is_near(near),
                compiled,
                f"{name.replace('_', ' ')} {size / 1024**3:.1f}",
            )
        )
    return table(rows)


def describe_sweep(found: Sweep) -> dict[str, Any]:
    """The sweep as one JSON object."""
    return {
        "topology": found.topology.name,
        "fitting": [_describe(one) for one in found.fitting],
        "too_large": [_describe(one) for one in found.too_large],
        "uneven": found.uneven,
    }


def _describe(one: Candidate) -> dict[str, Any]:
    infinite = one.compiled_bytes == math.inf
    return {
        "mesh": dataclasses.asdict(one.work.mesh),
        "seconds": one.times.seconds,
        "seconds_in_turn": one.times.seconds_in_turn,
        "bound": one.times.bound,
        "mfu": one.mfu,
        "memory_estimate": dataclasses.asdict(one.memory) | {"total": one.memory.total},
        "compiled_bytes": None if infinite else one.compiled_bytes,
        "compiler_refused": infinite,
        "fits": one.fits,
    }
