"""What to change in a config that does not fit, each change with what it would need then."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax.config import ExperimentConfig
from moe_jax.planning.memory import Memory, estimate_memory
from moe_jax.planning.workload import Workload, resolve

WORTH = 0.98  # a change that leaves more than this share of the bytes is not worth a line


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of settings.

    Attributes:
      change: as flags of the command.
      total_bytes: on a device, by arithmetic, with it.
      saved_bytes: by it.
      costs: what it costs in speed or in the result.
    """

    change: str
    total_bytes: float
    saved_bytes: float
    costs: str


def remedies(work: Workload) -> list[Remedy]:
    """Single changes that lower the memory of a step, the most effective first."""
    before = estimate_memory(work).total
    found = []
    for changes, costs in _candidates(work.config):
        try:
            changed = resolve(_with(work.config, changes), work.mesh.num_devices)
        except ValueError:  # the mesh does not split this one evenly
            continue
        after = estimate_memory(changed).total
        if after < WORTH * before:
            flags = " ".join(f"--config.{name}={value}" for name, value in changes.items())
            found.append(Remedy(flags, after, before - after, costs))
    return sorted(found, key=lambda one: one.total_bytes)


def largest(memory: Memory) -> list[tuple[str, float]]:
    """What takes the memory, by component, the most first."""
    parts = dataclasses.asdict(memory)
    return sorted(parts.items(), key=lambda part: -part[1])


def _candidates(config: ExperimentConfig) -> Iterator[tuple[dict[str, object], str]]:
    model, mesh, parts = config.model, config.mesh, config.training.num_microbatches
    for policy in ("dots", "full"):
        if model.remat in ("none", "dots") and policy != model.remat:
            yield {"model.remat": policy}, "computes forward passes again"
    for factor in (2, 4, 8):
        yield (
            {"training.num_microbatches": factor * parts},
            "gathers weights and reduces gradients as often",
        )
    for source in ("data", "expert", "fsdp"):
        for target in ("fsdp", "expert", "tensor"):
            size = getattr(mesh, source)
            if source != target and size > 1:
                for part in {2, size}:
                    if size % part == 0:
                        moved = {
                            f"mesh.{source}": size // part,
                            f"mesh.{target}": getattr(mesh, target) * part,
                        }
                        yield moved, f"splits more over {target}"
    capacity = model.moe.capacity
    if model.moe_layers and capacity.train_factor > 1:
        yield {"model.moe.capacity.train_factor": 1.0}, "drops more tokens"
    if model.moe_layers and model.moe.dispatch == "einsum":
        yield {"model.moe.dispatch": "gather"}, "reads and writes rows by index"
    if config.optimizer.name == "adamw":
        yield {"optimizer.name": "adafactor"}, "another optimizer: other results"


def _with(config: ExperimentConfig, changes: dict[str, object]) -> ExperimentConfig:
    for path, value in changes.items():
        config = _replace(config, path.split("."), value)
    return config


def _replace(node: Any, path: list[str], value: object) -> Any:
    name, *rest = path
    inner = _replace(getattr(node, name), rest, value) if rest else value
    return dataclasses.replace(node, **{name: inner})
