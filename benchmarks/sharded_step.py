"""The training step on meshes of 8 fake CPU devices, against one device with the same work.

    python -m benchmarks.sharded_step [--rounds=9]

The devices share the cores of this machine, so the best possible ratio is 1. The excess is the cost
of the split: smaller matrix products, copies and waiting. It does not predict devices that work in
parallel. Steps take turns; each is divided by the one-device step of the same way to run experts in
the same round. The table has the median and range over rounds, and the collectives of the compiled
step on one device: executions and MB of their arrays.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from moe_jax.config import DataConfig, ExperimentConfig, MeshConfig, TrainingConfig
from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.parallel.batches import from_whole
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.hlo import Collective, by_operation, read_program
from moe_jax.training.placement import BATCH_AXES, compile_train_step, new_state

NUM_DEVICES = 8
SEQUENCES, LENGTH = 16, 128
EXPERTS = MoE(num_experts=8, num_selected_experts=2, expert_dim=256)
MODEL = LanguageModel(
    model_dim=128,
    parts={"attention": Attention(num_heads=4, head_dim=32), "moe": EXPERTS},
    stack=StackLayout(repeats=2),
)
MESHES = {
    "data=8": MeshConfig(data=8),
    "expert=8": MeshConfig(data=1, expert=8),
    "data=2 expert=4": MeshConfig(data=2, expert=4),
    "fsdp=2 expert=2 tensor=2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
ONE_DEVICE = MeshConfig(data=1)
WAYS = (
    ("einsum", "compiler"),
    ("einsum", "explicit"),
    ("gather", "compiler"),
    ("gather", "explicit"),
    ("ragged", "explicit"),
)


def batch() -> dict[str, np.ndarray]:
    """One microbatch of random bytes, with every position valid."""
    tokens = np.random.default_rng(0).integers(3, 259, (1, SEQUENCES, LENGTH + 1), np.int32)
    shape = (1, SEQUENCES, LENGTH)
    return {
        "inputs": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        "loss_weights": np.ones(shape, np.float32),
    }


class Step:
    """A compiled training step that can be taken repeatedly."""

    def __init__(self, mesh_config: MeshConfig, run_experts: str, exchange: str):
        moe = dataclasses.replace(EXPERTS, run_experts=run_experts, exchange=exchange)
        config = ExperimentConfig(
            model=dataclasses.replace(MODEL, parts=MODEL.part | {"moe": moe}),
            data=DataConfig(sequence_length=LENGTH),
            training=TrainingConfig(batch_size=SEQUENCES),
            mesh=mesh_config,
        )
        mesh = make_mesh(mesh_config)
        with jax.set_mesh(mesh):
            self.state = new_state(config, mesh)
            self.batch = from_whole(batch(), mesh, BATCH_AXES)
            self.compiled = compile_train_step(config, mesh).lower(self.state, self.batch).compile()

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives of one step, on one device."""
        found = read_program(self.compiled.as_text()).collectives
        return tuple(one for one in found if one.group_size > 1)

    def take(self) -> float:
        """Takes one step and returns its seconds."""
        begin = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin


def ratios(
    one_device: dict[str, Step], sharded: dict[tuple[str, str, str], Step], rounds: int
) -> dict[tuple[str, str, str], list[float]]:
    """Ratios of every sharded step to the one-device step of its way, by round.

    The steps of a way run consecutively, with its one-device step before and after.
    """
    result: dict[tuple[str, str, str], list[float]] = {key: [] for key in sharded}
    for step in (*one_device.values(), *sharded.values()):
        step.take()
    for _ in range(rounds):
        for run_experts, alone in one_device.items():
            own = [key for key in sharded if key[1] == run_experts]
            before = alone.take()
            taken = [sharded[key].take() for key in own]
            floor = (before + alone.take()) / 2
            for key, seconds in zip(own, taken, strict=True):
                result[key].append(seconds / floor)
    return result


def describe(collectives: tuple[Collective, ...]) -> str:
    """Executions and megabytes by operation."""
    return ", ".join(
        f"{count} {operation} {size / 1e6:.2f}"
        for operation, (count, size) in by_operation(collectives).items()
    )


def main() -> None:
    """Compiles all steps, takes them in turn, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    alone = {name: Step(ONE_DEVICE, name, "auto") for name in ("einsum", "gather", "ragged")}
    sharded = {(mesh, *way): Step(config, *way) for mesh, config in MESHES.items() for way in WAYS}
    moe, num_layers = EXPERTS, MODEL.stack.num_layers
    print(f"{SEQUENCES} sequences of {LENGTH} tokens, {num_layers} layers, model dim "
          f"{MODEL.model_dim}, {moe.num_experts} experts of {moe.expert_dim}, top "
          f"{moe.num_selected_experts}; {NUM_DEVICES} devices on one CPU")  # fmt: skip
    print(f"{'mesh':<26}{'rows':<10}{'exchange':<10}{'of one device':>20}  collectives, MB")
    for (mesh, run_experts, exchange), found in ratios(alone, sharded, arguments.rounds).items():
        spread = f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"
        sent = describe(sharded[mesh, run_experts, exchange].collectives)
        print(f"{mesh:<26}{run_experts:<10}{exchange:<10}{spread:>20}  {sent}", flush=True)


if __name__ == "__main__":
    main()
