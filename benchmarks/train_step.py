"""The training step of the quickstart model: speed, share of the matmul rate, cost of its parts.

    python -m benchmarks.train_step [--config=configs/quickstart.py] [--rounds=7] [--against=DIR]

The float32 matmul rate of the machine is measured in the same run, in turn with the steps. The
share uses model FLOPs: three times forward, with whole attention squares, without padding and
one-hot contractions. "Without" leaves one part of the model out of the step; the difference is the
cost of the part and of all that waits for it, and parts need not add up. `--against` also prints
the time of a step over that of another checkout of this repository, timed in turn.
"""

import argparse
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.timing import Checkout, cell, ratios
from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.data import open_data, train_batches
from moe_jax.layers import attention
from moe_jax.layers.rotary import Rotary
from moe_jax.planning.arithmetic import count_flops, count_parameters
from moe_jax.planning.hardware import measured_matmul_rate
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step


def load(path: str, presets: str, run_experts: str = "auto") -> ExperimentConfig:
    """The experiment of a config file, with a way to run experts."""
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config(presets)
    if run_experts != "auto":
        settings.model.parts.moe.run_experts = run_experts
    return from_config_dict(settings)


@contextmanager
def without(part: str) -> Iterator[None]:
    """Traces the model without a part."""
    no_attention = mock.patch.object(
        attention, "attend_by_rules", lambda q, k, v, *rules, **options: q + 0 * (k + v)
    )
    no_rotary = mock.patch.object(Rotary, "rotate", lambda self, x, *where: x)
    parts: dict[str, AbstractContextManager[object]] = {
        "attention scores": no_attention,
        "rotary positions": no_rotary,
    }
    with parts[part]:
        yield


OTHER_PROGRAMS = """
from benchmarks.train_step import Step, load
programs = {{"moe": Step(load({path!r}, "")).take, "dense": Step(load({path!r}, "dense")).take}}
"""


class Step:
    """A compiled training step that can be taken repeatedly."""

    def __init__(self, config: ExperimentConfig):
        data = open_data(config.data)
        batch = next(train_batches(data, global_batch_size=config.training.batch_size))
        self.batch = {name: jnp.asarray(v)[None] for name, v in batch.items() if name != "domain"}
        self.state = jax.jit(init_state, static_argnums=0)(config)
        step = jax.jit(make_train_step(config), donate_argnums=0)
        begin = time.perf_counter()
        self.compiled = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.seconds: list[float] = []

    def take(self) -> None:
        """Takes one step and records its time."""
        begin = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - begin)


def main() -> None:
    """Times the steps in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", help="directory of another checkout, timed in the same run")
    arguments = parser.parse_args()
    path = str(pathlib.Path(arguments.config))
    config = load(path, "")
    makers: dict[str, Callable[[], Step]] = {
        "moe": lambda: Step(config),
        "dense": lambda: Step(load(path, "dense")),
        "moe, einsum": lambda: Step(load(path, "", "einsum")),
        "moe, gather": lambda: Step(load(path, "", "gather")),
    }
    steps = {name: make() for name, make in makers.items()}
    for part in ("attention scores", "rotary positions"):
        with without(part):
            steps[f"moe without {part}"] = Step(config)

    rates = []
    for step in steps.values():
        step.take()
    for _ in range(arguments.rounds):
        rates.append(measured_matmul_rate(seconds=0.3))
        for step in steps.values():
            step.take()
    rate = statistics.median(rates)

    tokens = config.training.batch_size * config.data.sequence_length
    flops = 3 * count_flops(config.model, config.data.sequence_length).model
    parameters = count_parameters(config.model, config.data.sequence_length)
    print(f"{parameters.total:,} parameters, {parameters.active:,} active; {tokens} tokens a step")
    print(f"float32 matmul rate: {rate / 1e9:.0f} GFLOP/s, of {min(rates) / 1e9:.0f} to "
          f"{max(rates) / 1e9:.0f}")  # fmt: skip
    print(f"{'step':<32}{'ms':>8}{'tokens/s':>10}{'share':>8}{'compile s':>11}{'of moe':>8}")
    moe = statistics.median(steps["moe"].seconds[1:])
    for name, step in steps.items():
        seconds = statistics.median(step.seconds[1:])
        share = f"{flops * tokens / seconds / rate:.0%}" if "without" not in name else ""
        print(f"{name:<32}{seconds * 1e3:>8.0f}{tokens / seconds:>10,.0f}{share:>8}"
              f"{step.compile_seconds:>11.1f}{seconds / moe:>8.2f}")  # fmt: skip
    if arguments.against:
        other = Checkout(arguments.against, OTHER_PROGRAMS.format(path=path))
        pairs = {
            name: (steps[name].take, lambda name=name: other.run(name)) for name in ("moe", "dense")
        }
        print(f"over {arguments.against}")
        for name, found in ratios(pairs, arguments.rounds).items():
            print(f"{name:<32}{cell(found):>22}")
        other.close()


if __name__ == "__main__":
    main()
