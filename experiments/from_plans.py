"""Results by arithmetic only: `python -m experiments.from_plans` writes `plans.json`.

Two claims about MoE concern machines that we do not have: that it trades memory for compute, and
that exchanging tokens between devices takes most of a step at scale. `moe_jax.planning` computes
both from a config, a mesh and the rates of a named pod.
"""

import dataclasses
import importlib
import pathlib
from typing import Any

from experiments.study import HERE
from moe_jax.config import ExperimentConfig, MeshConfig, from_config_dict
from moe_jax.config.json_text import json_text
from moe_jax.files import write_atomically
from moe_jax.moe.capacity import Capacity
from moe_jax.planning.communication import collectives
from moe_jax.planning.parameters import CONVENTIONS, count_parameters
from moe_jax.planning.roofline import estimate, roofline
from moe_jax.planning.topology import parse_topology
from moe_jax.planning.workload import resolve
from moe_jax.training.files import read_json

PLANS = HERE / "plans.json"
MEMORY = ("mixtral", "deepseek_v3", "olmoe")
# Slots of every expert on the pods below, so that the number of exchanged rows is known.
SLOTS = Capacity(train_factor=1.25, eval_factor=0.0)
# A config on a pod, at bfloat16 rates: config, pod, platform, number of devices, mesh.
PODS: tuple[tuple[str, str, str, int, dict[str, int]], ...] = (
    ("deepseek_v3", "v5p:8x16x16", "tpu", 2048, {"fsdp": 64, "expert": 32}),
    ("deepseek_v3", "h100:256x8", "gpu", 2048, {"fsdp": 64, "expert": 32}),
    ("deepseek_v3", "h100:256x8", "gpu", 2048, {"fsdp": 256, "expert": 8}),
    ("mixtral", "v5p:4x4x4", "tpu", 64, {"fsdp": 8, "expert": 8}),
    ("mixtral", "h100:8x8", "gpu", 64, {"fsdp": 8, "expert": 8}),
)


def config_of(name: str) -> ExperimentConfig:
    """An experiment of `configs/`."""
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config(""))


def memory_of(name: str) -> dict[str, Any]:
    """Total and active parameters of a model, without its multi-token modules."""
    config = config_of(name)
    counts = count_parameters(config.model, config.data.sequence_length)
    total, active = counts.by_convention()[CONVENTIONS[0]]
    return {"config": name, "total": total, "active": active}


def exchange_of(
    name: str, pod: str, platform: str, num_devices: int, mesh: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of a training step on a pod: all computing, and all-to-all separately."""
    config = config_of(name)
    moe = dataclasses.replace(config.model.part["moe"], capacity=SLOTS)
    model = dataclasses.replace(config.model, parts=config.model.part | {"moe": moe})
    config = dataclasses.replace(config, model=model, mesh=MeshConfig(**mesh))
    work, topology = resolve(config, num_devices, platform), parse_topology(pod)
    messages = [message for message in collectives(work) if message.operation == "all-to-all"]
    crossing = sum(m.crossing_bytes(work.mesh, topology.devices_per_island) for m in messages)
    exchange = roofline(topology, 0.0, 0.0, sum(m.wire_bytes for m in messages), crossing)
    return {
        "config": name,
        "pod": pod,
        "mesh": mesh,
        "compute_seconds": estimate(work, topology).compute,
        "exchange_seconds": exchange.seconds,
    }


def memory_text(plans: dict[str, Any]) -> str:
    """The text about memory against compute."""
    parts = [
        f"{one['config']} {one['total'] / 1e9:.1f} B parameters for {one['active'] / 1e9:.1f} B of "
        "a token"
        for one in plans["memory"]
    ]
    return "**by arithmetic, yes**: " + ", ".join(parts)


def exchange_text(plans: dict[str, Any]) -> str:
    """The text about all-to-all at scale."""
    parts = [
        f"{one['exchange_seconds'] / one['compute_seconds']:.2f} ({one['config']}, {one['pod']}, "
        f"experts over {one['mesh']['expert']})"
        for one in plans["exchange"]
    ]
    yes = "**by arithmetic, where experts span nodes of GPUs**"
    return f"{yes}. Exchange over computing: {', '.join(parts)}"


def read_plans() -> dict[str, Any]:
    """The contents of `plans.json`."""
    return dict(read_json(pathlib.Path(PLANS)))


def main() -> None:
    """Computes and writes `plans.json`."""
    plans = {
        "memory": [memory_of(name) for name in MEMORY],
        "exchange": [exchange_of(*pod) for pod in PODS],
    }
    write_atomically(PLANS, json_text(plans, indent=1) + "\n")
    print(memory_text(plans), exchange_text(plans), sep="\n")


if __name__ == "__main__":
    main()
