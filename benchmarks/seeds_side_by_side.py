"""Seeds of an arm side by side in one program (`vmap`), against one seed after another.

    python -m benchmarks.seeds_side_by_side [--study=NAME] [--size=small] [--arms=dense,switch_8]

The time of a step of all seeds at once is divided by that of one step per seed. Both are timed in
turn, so that other work on the machine affects both. Below 1, seeds are faster side by side. Tokens
are random; ways of running experts that `vmap` does not support are reported.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import cell, ratios
from experiments.study import load_study
from moe_jax.config import ExperimentConfig
from moe_jax.training.state import TrainState, init_state
from moe_jax.training.step import make_train_step


def batches(config: ExperimentConfig, num_seeds: int) -> dict[str, jax.Array]:
    """A batch of random tokens for every seed, [seeds, 1, B, L]."""
    rows, length = config.training.batch_size, config.data.sequence_length
    arrays = config.data.objective.arrays(length)
    rng = np.random.default_rng(0)
    ids = min(config.model.vocab_size, 256)
    found = {}
    for name, (shape, dtype) in arrays.items():
        full = (num_seeds, 1, rows, *shape)
        if name == "positions":
            values = np.broadcast_to(np.arange(length), full)
        elif name in ("inputs", "targets"):
            values = rng.integers(3, ids, full)
        else:  # one document per sequence; every target counts
            values = np.ones(full)
        found[name] = jnp.asarray(values, dtype)
    return found


class Steps:
    """The steps of the seeds of an arm, compiled in both ways."""

    def __init__(self, config: ExperimentConfig, num_seeds: int):
        step = make_train_step(config)
        self.batches = batches(config, num_seeds)
        self.each = [{k: v[s] for k, v in self.batches.items()} for s in range(num_seeds)]
        first: TrainState = jax.jit(init_state, static_argnums=0)(config)
        self.states = [jax.tree.map(jnp.copy, first) for _ in range(num_seeds)]
        self.state = jax.tree.map(lambda *x: jnp.stack(x), *self.states)
        begin = time.perf_counter()
        self.one = jax.jit(step, donate_argnums=0).lower(first, self.each[0]).compile()
        middle = time.perf_counter()
        all_seeds = jax.jit(jax.vmap(step), donate_argnums=0)
        self.all = all_seeds.lower(self.state, self.batches).compile()
        self.compiling = middle - begin, time.perf_counter() - middle

    def side_by_side(self) -> Any:
        """A step of all seeds at once."""
        self.state, metrics = self.all(self.state, self.batches)
        return jax.block_until_ready(metrics)

    def in_turn(self) -> Any:
        """A step of every seed, one after another."""
        for seed, batch in enumerate(self.each):
            self.states[seed], metrics = self.one(self.states[seed], batch)
        return jax.block_until_ready((metrics, self.states))


def main() -> None:
    """Times the arms and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="switch_against_dense")
    parser.add_argument("--size", default="small")
    parser.add_argument("--arms", default="dense,switch_8")
    parser.add_argument("--run_experts", default="ragged,gather")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    study, device = load_study(arguments.study), jax.devices()[0]
    print(f"{arguments.study} ({arguments.size}), {arguments.seeds} seeds, {device.device_kind}")
    print(f"{'arm':<26}{'side by side / in turn':>26}{'compiling, s':>16}")
    for arm in arguments.arms.split(","):
        config = study.experiment(arguments.size, arm, 0)
        ways = arguments.run_experts.split(",") if "moe" in config.model.part else [""]
        for way in ways:
            name = f"{arm} {way}".strip()
            try:
                steps = Steps(with_way(config, way), arguments.seeds)
            except NotImplementedError as error:
                print(f"{name:<26}{'no vmap':>26}  {str(error).splitlines()[0]}")
                continue
            found = ratios({name: (steps.side_by_side, steps.in_turn)}, arguments.rounds)[name]
            one, all_ = steps.compiling
            print(f"{name:<26}{cell(found):>26}{one:>8.1f}{all_:>8.1f}", flush=True)


def with_way(config: ExperimentConfig, way: str) -> ExperimentConfig:
    """The experiment with its experts run in one way; "" leaves it."""
    if not way:
        return config
    model = config.model.map_parts(
        lambda part: dataclasses.replace(part, run_experts=way) if part.routes else part
    )
    return dataclasses.replace(config, model=model)


if __name__ == "__main__":
    main()
