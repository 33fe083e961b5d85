"""Changes to a config that does not fit, each with the memory needed after the change."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.config import ExperimentConfig
from moe_jax.planning.memory import Memory, estimate_memory
from moe_jax.planning.workload import Workload, resolve

WORTH = 0.98  # a change that leaves more than this share of the bytes is not worth a line
MOST_DEVICES = 2**16


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of settings.

    Attributes:
      change: as flags of the command.
      total_bytes: bytes per device with the change, by arithmetic.
      saved_bytes: bytes that the change saves.
      costs: what it costs in speed or in the result.
      keeps_result: whether training gives the same result except for rounding.
    """

    change: str
    total_bytes: float
    saved_bytes: float
    costs: str
    keeps_result: bool


def remedies(work: Workload) -> list[Remedy]:
    """Single changes that lower the memory of a step, the most effective first."""
    return sorted((remedy for remedy, _ in _tried(work)), key=lambda remedy: remedy.total_bytes)


def together(work: Workload, available: float, most: int = 4) -> list[Remedy]:
    """Successive changes, each the most effective at that point, until the step fits.

    Args:
      work: a step that does not fit.
      available: bytes on a device.
      most: give up after this many changes.

    Returns:
      The changes, with all of which the step fits; empty if `most` changes are not enough.
    """
    taken: list[Remedy] = []
    while len(taken) < most:
        tried = [(one, changed) for one, changed in _tried(work) if one.keeps_result]
        if not tried:
            break
        best, work = min(tried, key=lambda pair: pair[0].total_bytes)
        taken.append(best)
        if best.total_bytes <= available:
            return taken
    return []


def more_devices(work: Workload, available: float) -> Workload | None:
    """The config on the fewest devices that are enough, if fsdp and expert grow by powers of two.

    Args:
      work: a step that does not fit.
      available: bytes on a device.

    Returns:
      The config on the mesh with the fewest devices that fits by arithmetic; of several, the one
      that needs least memory. None if no mesh of up to `MOST_DEVICES` fits and splits batch,
      experts and arrays evenly.
    """
    mesh, times = work.mesh, 2
    while times * mesh.num_devices <= MOST_DEVICES:
        fitting = []
        for more_experts in (2**i for i in range(times.bit_length())):
            grown = {
                "mesh.fsdp": mesh.fsdp * times // more_experts,
                "mesh.expert": mesh.expert * more_experts,
            }
            try:
                changed = resolve(
                    _with(work.config, grown), times * mesh.num_devices, work.platform
                )
            except ValueError:
                continue
            needed = estimate_memory(changed).total
            if needed <= available:
                fitting.append((needed, changed))
        if fitting:
            return min(fitting, key=lambda pair: pair[0])[1]
        times *= 2
    return None


def _tried(work: Workload) -> Iterator[tuple[Remedy, Workload]]:
    """Every change that is worth a line, and the config after it."""
    before = estimate_memory(work).total
    for changes, costs, keeps_result in _candidates(work.config):
        try:
            changed = resolve(_with(work.config, changes), work.mesh.num_devices, work.platform)
        except ValueError:  # the mesh does not split this one evenly
            continue
        after = estimate_memory(changed).total
        if after < WORTH * before:
            flags = " ".join(f"--config.{name}={value}" for name, value in changes.items())
            yield Remedy(flags, after, before - after, costs, keeps_result), changed


def largest(memory: Memory) -> list[tuple[str, float]]:
    """Memory by component, largest first."""
    sizes = dataclasses.asdict(memory)
    return sorted(sizes.items(), key=lambda item: -item[1])


def _candidates(config: ExperimentConfig) -> Iterator[tuple[Mapping[str, object], str, bool]]:
    """Changes, what they cost, and whether they keep the result."""
    model, mesh = config.model, config.mesh
    for policy in ("dots", "full"):
        if model.remat in ("none", "dots") and policy != model.remat:
            yield {"model.remat": policy}, "computes forward passes again", True
    for factor in (2, 4, 8):
        more = {"training.num_microbatches": factor * config.training.num_microbatches}
        yield (
            more,
            "gathers weights and reduces gradients once for each microbatch; draws other noise, if "
            "there is any",
            not model.depends_on_microbatches,
        )
    if config.training.loss.takes_chunks:
        for factor in (4, 16):
            chunks = {"training.logits_chunks": factor * config.training.logits_chunks}
            yield chunks, "computes logits twice", True
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "expert": mesh.expert, "tensor": mesh.tensor}
    for source, target in itertools.permutations(sizes, 2):
        for part in {2, sizes[source]}:
            if source == "tensor" or sizes[source] == 1 or sizes[source] % part:
                continue
            moved = {
                f"mesh.{source}": sizes[source] // part,
                f"mesh.{target}": sizes[target] * part,
            }
            yield moved, f"splits more over {target}", True
    for name, part in model.parts:
        for changes, costs, keeps_result in part.savings():
            changed = {f"model.parts.{name}.{path}": value for path, value in changes.items()}
            yield changed, costs, keeps_result
    if config.optimizer.name != "adafactor":
        yield {"optimizer.name": "adafactor"}, "another optimizer: other results", False


def _with(config: ExperimentConfig, changes: Mapping[str, object]) -> ExperimentConfig:
    """The config with settings changed, section by section, since each section checks itself."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        sections.setdefault(section, {})[name] = value
    for section, values in sections.items():
        config = _replace(config, section.split("."), values)
    return config


def _replace(node: Any, path: list[str], values: Mapping[str, object]) -> Any:
    if not path:
        return dataclasses.replace(node, **values)
    name, *rest = path
    if isinstance(node, tuple):  # named parts
        return tuple((n, _replace(part, rest, values) if n == name else part) for n, part in node)
    return dataclasses.replace(node, **{name: _replace(getattr(node, name), rest, values)})
