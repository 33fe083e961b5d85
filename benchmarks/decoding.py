"""Tokens/s of prefill and decode: cached, uncached, dense, and transformers on the same weights.

    python -m benchmarks.decoding [--batches=1,8,64] [--models=moe,dense] [--prompt=128]
        [--rounds=5] [--gguf=FILE]

The models are a Mixtral and a Mistral of equal active parameters, 8 layers of 512 dims in float32,
and, with --gguf, the model of a GGUF file such as SmolLM2's. A round takes a turn of each; numbers
are medians. transformers runs eagerly on PyTorch, with one thread per core of this process:
`taskset -c 0` compares on one core, which other work on the machine disturbs least.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax
from benchmarks.timing import seconds
from configs import mixtral
from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.inference.anew import in_groups_of, next_token
from moe_jax.inference.decoding import (
    Prompts,
    Rows,
    Serving,
    decode,
    for_inference,
    layers_apart,
    prefill,
)
from moe_jax.inference.sampling import Sampling
from moe_jax.interchange.gguf_files import from_gguf
from moe_jax.parameters import init_parameters

TOKENS = 16  # tokens per turn
GREEDY = Sampling()
NO_TOKENS = jnp.zeros(0, jnp.int32)
Turns = dict[str, Callable[[], float]]  # tokens/s of one turn, by name


def sparse_and_dense() -> dict[str, ExperimentConfig]:
    """A Mixtral, and a Mistral whose FFN has the hidden units that a token uses."""
    config = mixtral.get_config()
    model, parts = config.model, config.model.parts
    model.model_dim, model.vocab_size, model.stack.repeats = 512, 8192, 8
    model.compute_dtype, model.remat = "float32", "none"
    parts.attention.num_heads, parts.attention.num_kv_heads, parts.attention.head_dim = 8, 2, 64
    parts.moe.expert_dim = 1024
    sparse = from_config_dict(config)
    with parts.unlocked():
        parts.mlp = {"kind": "mlp", "dim": 2048, "activation": parts.moe.activation}
        del parts["moe"]
    model.stack.unit, config.name = (("attention", "mlp"),), "mistral"
    return {"moe": sparse, "dense": from_config_dict(config)}


class Ours:
    """A batch of prompts for one model, in our programs."""

    def __init__(self, config: ExperimentConfig, params: Any, tokens_BL: np.ndarray, rounds: int):
        batch, length = tokens_BL.shape
        model, self.serving = layers_apart(for_inference(config.model), Serving(params))
        self.tokens_BL = tokens_BL
        num_slots = length + (rounds + 1) * TOKENS
        how = {"model": model, "num_slots": num_slots, "sampling": GREEDY}
        numbers_B, lengths_B = np.arange(batch), np.full(batch, num_slots)
        prompts = Prompts(tokens_BL, np.ones_like(tokens_BL), numbers_B, lengths_B)
        self.prefill = lambda: prefill(self.serving, prompts, **how)[0]
        self.more = lambda rows: decode(self.serving, rows, NO_TOKENS, num_tokens=TOKENS, **how)
        self.rows: Rows = self.prefill()
        window = in_groups_of(length, config.model)
        places, whole = (np.int32(length), np.int32(0), np.int32(0)), Serving(params)
        self.anew = lambda: next_token(whole, tokens_BL[0], *places, model=window, sampling=GREEDY)

    def turns(self) -> Turns:
        """Turns of prefill, decode, and one token without a cache."""
        batch, length = self.tokens_BL.shape

        def decoded() -> float:
            def run() -> None:
                self.rows, tokens_BN, _ = self.more(self.rows)
                jax.block_until_ready(tokens_BN)

            return batch * TOKENS / seconds(run)

        return {
            "prefill": lambda: (
                batch * length / seconds(lambda: jax.block_until_ready(self.prefill()))
            ),
            "decode": decoded,
            "anew": lambda: 1 / seconds(lambda: jax.block_until_ready(self.anew())),
        }


class Theirs:
    """The same batch in transformers."""

    def __init__(self, directory: pathlib.Path, tokens_BL: np.ndarray):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokens_BL = torch.tensor(tokens_BL, dtype=torch.long)
        self.read()

    def read(self) -> None:
        """Prefill."""
        with self.torch.no_grad():
            out = self.model(self.tokens_BL, use_cache=True, logits_to_keep=1)
        self.cache, self.next = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    def write(self) -> None:
        """Decode."""
        with self.torch.no_grad():
            for _ in range(TOKENS):
                out = self.model(self.next, past_key_values=self.cache, use_cache=True)
                self.cache = out.past_key_values
                self.next = out.logits[:, -1].argmax(-1, keepdim=True)

    def turns(self) -> Turns:
        """Turns of prefill and decode."""
        batch, length = self.tokens_BL.shape
        return {
            "prefill": lambda: batch * length / seconds(self.read),
            "decode": lambda: batch * TOKENS / seconds(self.write),
        }


def compared(
    models: dict[str, tuple[ExperimentConfig, Any]], batch: int, length: int, rounds: int
) -> dict[str, list[float]]:
    """Tokens/s of every turn, by "MODEL PROGRAM TURN"."""
    turns: Turns = {}
    random = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as directory:
        for name, (config, params) in models.items():
            tokens_BL = random.randint(3, config.model.vocab_size, (batch, length), np.int32)
            ours = Ours(config, params, tokens_BL, rounds)
            turns |= {f"{name} ours {turn}": run for turn, run in ours.turns().items()}
            path = pathlib.Path(directory) / name
            moe_jax.to_hf(config, params, path)
            try:
                theirs = Theirs(path, tokens_BL)
            except ImportError as error:
                print(f"transformers: not installed ({error})")
                continue
            turns |= {f"{name} transformers {turn}": run for turn, run in theirs.turns().items()}
        found: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(rounds + 1):
            for name, run in turns.items():
                rate = run()
                if turn:  # the first one compiles, or warms up
                    found[name].append(rate)
    return found


def main() -> None:
    """Prints a table for every batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gguf", help="a GGUF file, as a third model")
    parser.add_argument("--models", default="moe,dense", help="of these two")
    arguments = parser.parse_args()
    models: dict[str, tuple[ExperimentConfig, Any]] = {}
    for name, config in sparse_and_dense().items():
        if name not in arguments.models.split(","):
            continue
        models[name] = config, init_parameters(jax.random.key(0), config.model.specs())
    if arguments.gguf:
        models["gguf"] = from_gguf(arguments.gguf)
    print(f"{'model':<8}{'turn':<9}{'batch':>6}{'tokens/s':>12}{'transformers':>14}{'ratio':>11}")
    for batch in map(int, arguments.batches.split(",")):
        found = compared(models, batch, arguments.prompt, arguments.rounds)
        for name in models:
            for turn in ("prefill", "decode", "anew"):
                own, other = (found.get(f"{name} {by} {turn}") for by in ("ours", "transformers"))
                assert own is not None
                rate = statistics.median(own)
                line = f"{name:<8}{turn:<9}{batch:>6}{rate:>12,.0f}"
                if other:
                    ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
                    line += f"{statistics.median(other):>14,.0f}{ratio:>11.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
