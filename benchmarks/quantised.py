"""Memory, bits per byte and tokens/s of runs before and after they are quantised.

    python -m benchmarks.quantised RUN [RUN ...] [--batches=16] [--prompt=64] [--rounds=5]

A RUN is the directory of a trained or imported model. Its weights are kept as they are, and
quantised in groups of 32: only experts, every matrix, and the embedding too. Bits per byte are on
--batches sequences of the held-out split. Speed is for one text, with a turn of 16 tokens; all ways
take turns, and numbers are medians. Memory is that of the weights, and of the compiled decode step
with its arguments.
"""

import argparse
import dataclasses
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decoding import GREEDY, NO_TOKENS, TOKENS
from benchmarks.timing import seconds
from moe_jax.config import ExperimentConfig
from moe_jax.evaluate import Options, evaluate_run
from moe_jax.inference.decoding import (
    Prompts,
    Serving,
    decode,
    for_inference,
    layers_apart,
    prefill,
)
from moe_jax.models.wrapping import quantised_params
from moe_jax.training.saved import load_run
from moe_jax.training.state import TrainState
from moe_jax.weights.quantised import Quantisation


def ways(config: ExperimentConfig) -> dict[str, Quantisation | None]:
    """The compared quantisations, by name."""
    found: dict[str, Quantisation | None] = {"float32": None}
    if config.model.moe_parts:
        found |= {f"int{bits} experts": Quantisation(("experts",), bits) for bits in (8, 4)}
    found |= {f"int{bits} all": Quantisation(("all",), bits) for bits in (8, 4)}
    return found | {"int4 embedding": Quantisation(("all", "embedding"), 4)}


class Way:
    """A run whose weights are stored in one way.

    Attributes:
      megabytes: MB of its weights, and of the decode step with its arguments.
    """

    def __init__(
        self, config: ExperimentConfig, state: TrainState, how: Quantisation | None, prompt: int
    ):
        params = jax.tree.map(jnp.copy, state.params)
        if how is not None:
            params = quantised_params(params, config.model.specs(), how)
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, quantisation=how)
            )
        self.config, self.state = config, state._replace(params=params)
        self.prompt = prompt
        model, self.serving = layers_apart(
            for_inference(config.model), Serving(params, state.model_state)
        )
        tokens_BL = np.random.RandomState(0).randint(3, 259, (1, prompt), np.int32)
        settings: dict[str, Any] = {
            "model": model, "num_slots": prompt + TOKENS, "sampling": GREEDY
        }  # fmt: skip
        prompts = Prompts(
            tokens_BL, np.ones_like(tokens_BL), np.arange(1), np.full(1, prompt + TOKENS)
        )
        self.read = lambda: prefill(self.serving, prompts, **settings)[0]
        rows = self.read()
        lowered = decode.lower(self.serving, rows, NO_TOKENS, num_tokens=TOKENS, **settings)
        self.program = lowered.compile()
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        memory = self.program.memory_analysis()
        assert memory is not None
        step = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.megabytes = weights / 1e6, step / 1e6

    def turn(self) -> tuple[float, float]:
        """Tokens/s of reading the prompt, and of a turn after it."""
        reading = seconds(lambda: jax.block_until_ready(self.read()))
        rows = jax.block_until_ready(self.read())
        writing = seconds(
            lambda: jax.block_until_ready(self.program(self.serving, rows, NO_TOKENS)[1])
        )
        return self.prompt / reading, TOKENS / writing

    def bits_per_byte(self, workdir: pathlib.Path, batches: int) -> float:
        """Bits per byte of `batches` held-out sequences, dropless."""
        options = Options(batches=batches, batch_size=1)
        found = evaluate_run(workdir, self.config, self.state, options)
        return float(found["dropless"]["bits_per_byte"])


def main() -> None:
    """Prints a table for every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--batches", type=int, default=16, help="held-out sequences to score")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for workdir in arguments.runs:
        config, state = load_run(workdir)
        print(f"{workdir.name}: {config.name}")
        print("weights         weights MB  decode step MB  bits/byte  prefill tok/s  decode tok/s")
        made = {
            name: Way(config, state, how, arguments.prompt) for name, how in ways(config).items()
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for turn in range(arguments.rounds + 1):
            for name, way in made.items():
                rate = way.turn()
                if turn:  # the first turn warms up
                    rates[name].append(rate)
        for name, way in made.items():
            bits = way.bits_per_byte(workdir, arguments.batches)
            reading, writing = (statistics.median(each) for each in zip(*rates[name], strict=True))
            stored, step = way.megabytes
            print(
                f"{name:<15}{stored:>11.1f}{step:>16.1f}{bits:>11.4f}{reading:>15,.0f}{writing:>14,.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
