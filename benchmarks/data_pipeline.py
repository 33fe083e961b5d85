"""Tokens per second of the training pipeline on one core.

    python benchmarks/data_pipeline.py [--corpus=jsonl:DIR] [--sequence_length=512]

The process is bound to one core, the least that a host process has to spare.
"""

import os
import statistics
import time
from collections.abc import Sequence

from absl import app, flags

from moe_jax.config import DataConfig
from moe_jax.data import open_data, train_batches

REPETITIONS = 5
SECONDS = 2.0  # of each repetition


def measure(config: DataConfig, batch_size: int) -> list[float]:
    """Tokens per second of each repetition, after a first batch that is not timed."""
    batches = train_batches(open_data(config), global_batch_size=batch_size)
    next(batches)
    figures = []
    for _ in range(REPETITIONS):
        num_tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            num_tokens += next(batches)["inputs"].size
        figures.append(num_tokens / (time.perf_counter() - start))
    return figures


def main(argv: Sequence[str]) -> None:
    """Binds the process to one core, measures, and prints the median and the range."""
    if len(argv) > 1:
        raise app.UsageError("There are no positional arguments.")
    options = flags.FLAGS
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    config = DataConfig(
        corpus=options.corpus, tokenizer=options.tokenizer, sequence_length=options.sequence_length
    )
    figures = sorted(measure(config, options.batch_size))
    print(
        f"{statistics.median(figures) / 1e6:.1f} million tokens/s "
        f"(of {REPETITIONS}: {figures[0] / 1e6:.1f} to {figures[-1] / 1e6:.1f}), one core, "
        f"{options.corpus}, batches of {options.batch_size} x {options.sequence_length}"
    )


if __name__ == "__main__":
    flags.DEFINE_string("corpus", "embedded", "As config.data.corpus.")
    flags.DEFINE_string("tokenizer", "byte", "As config.data.tokenizer.")
    flags.DEFINE_integer("sequence_length", 512, "Tokens a row.")
    flags.DEFINE_integer("batch_size", 32, "Rows a batch.")
    app.run(main)
