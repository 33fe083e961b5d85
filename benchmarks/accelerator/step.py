"""Whole training steps: a 0.5 B model, and a Mixtral-shaped model with as many layers as fit.

A step is that of `moe_jax.train`: forward, backward, AdamW in float32, activations in bfloat16.
Tokens are random with Zipf frequencies, so that the loss falls from ln V. Model FLOPs are three
times forward, without padding and recomputation. Attention counts the whole L x L square
(`planning.flops`: `mfu`) or only its visible half (`mfu_causal`).
"""

import dataclasses
import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.child import message_of
from benchmarks.accelerator.clock import bar, memory_of, sample
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.kernels import ragged, usable_kernels, with_kernel
from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parallel.rules import platform
from moe_jax.planning.arithmetic import count_flops, count_parameters
from moe_jax.planning.hardware import peak_flops
from moe_jax.planning.memory import estimate_memory
from moe_jax.planning.workload import resolve
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step

STEPS = 12
BATCHES = 4  # batches used in turn
USED = 0.75  # largest fraction of memory by the estimate; compilers exceed it by up to a third
TRIES = 3  # configurations compiled before a row gives up
ENOUGH = 16_384  # tokens per step that hide the optimizer
REMAT = ("none", "dots", "full")
DEFAULT = "as it comes"


class Size(NamedTuple):
    """A model to train.

    Attributes:
      model_dim: M.
      expert_dim: H.
      heads: attention heads of 128 dims; `kv_heads` for keys and values.
      layers: minimum and maximum number of layers.
      vocab_size: V.
      length: L.
      batches: sequences per step, in order of preference.
    """

    model_dim: int
    expert_dim: int
    heads: int
    kv_heads: int
    layers: tuple[int, int]
    vocab_size: int
    length: int
    batches: tuple[int, ...]


SIZES = {
    "0.5 B": Size(1024, 1408, 8, 8, (12, 12), 32_000, 2048, (32, 16, 8, 4)),
    "Mixtral-shaped": Size(4096, 14_336, 32, 8, (1, 8), 32_000, 4096, (8, 4, 2, 1)),
}
TINY = {"tiny": Size(32, 48, 2, 1, (1, 2), 64, 32, (4, 2))}


def rows(dry: bool) -> list[Row]:
    """Each model with default settings; then dropless, with each kernel."""
    sizes = TINY if dry else SIZES
    kernels = usable_kernels(dense=False)[: 1 if dry else None]  # a CPU interprets the others
    ways = [DEFAULT, *map(ragged, kernels)]
    return [
        Row(f"{name}/{way}", 45, functools.partial(measure, size, way, dry), way == DEFAULT)
        for way in ways
        for name, size in sizes.items()
    ]


def measure(size: Size, way: str, dry: bool) -> dict[str, Any]:
    """Takes steps of the largest configuration that fits."""
    errors: list[str] = []
    for config in itertools.islice(fitting(size, way, memory_limit()), TRIES):
        try:
            return {**train(config, dry), "does_not_fit": errors}
        except jax.errors.JaxRuntimeError as error:
            # XLA reports the same if a kernel needs more shared memory than there is.
            if "RESOURCE_EXHAUSTED" not in str(error) or "hared memory" in str(error):
                raise
            errors.append(f"{describe(config)}: {message_of(error)}")
        gc.collect()  # the frames of the error held arrays
    raise RuntimeError(f"nothing fits {memory_limit() / 1e9:.0f} GB: {'; '.join(errors) or size}")


def memory_limit() -> float:
    """Bytes that a program may use on the first device."""
    return float((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 4e9))


def fitting(size: Size, way: str, limit: float) -> Iterator[ExperimentConfig]:
    """Configurations whose estimated memory fits, in order of preference.

    First are configurations with enough tokens to hide the optimizer, then those with the least
    recomputation, which is not useful work, then those with the most layers.
    """
    least, most = size.layers
    for enough in (True, False):
        for remat in REMAT:
            for layers, batch in itertools.product(range(most, least - 1, -1), size.batches):
                if (batch * size.length >= ENOUGH) != enough:
                    continue
                config = config_of(size, way, layers, batch, remat)
                if estimate_memory(resolve(config, 1, platform())).total <= USED * limit:
                    yield config


def config_of(size: Size, way: str, layers: int, batch: int, remat: str) -> ExperimentConfig:
    """The experiment of a configuration."""
    moe = MoE(
        num_experts=8,
        num_selected_experts=2,
        expert_dim=size.expert_dim,
        activation=SwiGLU(),
        router=TokenChoice(renormalize=True),
    )
    if way != DEFAULT:
        kernel = way.removeprefix("ragged").strip()
        moe = with_kernel(with_ragged(moe), kernel)
    attention = Attention(num_heads=size.heads, num_kv_heads=size.kv_heads,
                          head_dim=min(128, size.model_dim // size.heads))  # fmt: skip
    return ExperimentConfig(
        name="accelerator",
        model=LanguageModel(
            vocab_size=size.vocab_size,
            model_dim=size.model_dim,
            parts={"attention": attention, "moe": moe},
            stack=StackLayout(repeats=layers),
            compute_dtype="bfloat16",
            remat=remat,
        ),
        data=DataConfig(sequence_length=size.length),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        training=TrainingConfig(num_steps=1000, batch_size=batch),
        mesh=MeshConfig(data=1),
    )


def with_ragged(moe: MoE) -> MoE:
    """The block, dropless and with sorted rows."""
    capacity = Capacity(train_factor=0.0, eval_factor=0.0)
    return dataclasses.replace(moe, run_experts="ragged", capacity=capacity)


def describe(config: ExperimentConfig) -> str:
    """Layers, batch and recomputation as text."""
    model = config.model
    return (f"{model.stack.repeats} layers, {config.training.batch_size} x "
            f"{config.data.sequence_length} tokens, remat {model.remat}")  # fmt: skip


def batch_of(config: ExperimentConfig, seed: int) -> dict[str, jax.Array]:
    """A microbatch of random tokens, with frequencies proportional to 1 / rank."""
    vocab, length = config.model.vocab_size, config.data.sequence_length
    shape = (1, config.training.batch_size, length)
    weights = 1 / np.arange(1, vocab + 1)
    random = np.random.default_rng(seed)
    tokens = random.choice(vocab, (*shape[:2], length + 1), p=weights / weights.sum())
    return {
        "inputs": jnp.asarray(tokens[..., :-1], jnp.int32),
        "targets": jnp.asarray(tokens[..., 1:], jnp.int32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
        "loss_weights": jnp.ones(shape, jnp.float32),
    }


def train(config: ExperimentConfig, dry: bool) -> dict[str, Any]:
    """Compiles the step, takes `STEPS` steps, and returns their times and losses."""
    state = jax.jit(init_state, static_argnums=0)(config)
    batches = [batch_of(config, seed) for seed in range(BATCHES)]
    begin = time.perf_counter()
    step = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - begin
    losses, seconds, bars = [], [], []
    matmul, matmul_flops = bar(dry)
    sample(matmul, 1)
    for number in range(4 if dry else STEPS):
        if number % 5 == 0:
            bars.append(sample(matmul, 1 if dry else 5))
        begin = time.perf_counter()
        state, metrics = step(state, batches[number % BATCHES])
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
        losses.append(float(metrics.loss))
    return {
        **rates(config, seconds[1:], matmul_flops / statistics.median(bars)),
        "config": describe(config),
        "compile_s": round(compile_seconds, 1),
        **memory_of(step),
        "dropped": float(metrics.of_parts["moe/dropped_fraction"].mean()),
        "losses": [round(loss, 4) for loss in losses],
        "finite": all(map(math.isfinite, losses)),
        "falls": losses[-1] < losses[0],
    }


def rates(config: ExperimentConfig, seconds: list[float], matmul_rate: float) -> dict[str, Any]:
    """Tokens and FLOPs per second of the median step."""
    median = statistics.median(seconds)
    tokens = config.training.batch_size * config.data.sequence_length
    flops = 3 * count_flops(config.model, config.lengths).model * tokens
    parameters = count_parameters(config.model, config.lengths)
    causal = flops - unseen_flops(config) * tokens
    peak = None if jax.default_backend() == "cpu" else peak_flops()
    return {
        "tokens_per_s": tokens / median,
        "ms": median * 1e3,
        "ms_low": min(seconds) * 1e3,
        "ms_high": max(seconds) * 1e3,
        "parameters": parameters.total,
        "active": parameters.active,
        "tflops": flops / median / 1e12,
        "share": flops / median / matmul_rate,
        "matmul_tflops": matmul_rate / 1e12,
        "mfu": None if peak is None else flops / median / peak,
        "mfu_causal": None if peak is None else causal / median / peak,
    }


def unseen_flops(config: ExperimentConfig) -> float:
    """FLOPs per token and step of masked scores and values: half of the square."""
    attention = config.model.part["attention"]
    width = attention.num_heads * attention.head_dim
    return 3 * config.model.stack.repeats * 2.0 * config.data.sequence_length * width
