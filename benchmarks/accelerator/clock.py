"""Times compiled programs, alternating with a dense matmul, and measures their memory.

The matmul is the reference: a throttled clock slows both.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SAMPLES = 7
SAMPLE_SECONDS = 0.02  # a sample repeats shorter programs, which hides the cost of starting them
MOST_REPEATS = 50
MATMUL = 8192  # rows, columns and inner dim of the reference matmul


class Timed(NamedTuple):
    """Something to time.

    Attributes:
      call: starts it; may return before it ends.
      wait: waits for what `call` returned.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]


class Program(NamedTuple):
    """A compiled program with its operands.

    Attributes:
      timed: the program, for timing.
      facts: `compile_s`; `temporary_mb`, its temporaries; `program_mb`, these with operands and
        results.
      text: text of the compiled program.
    """

    timed: Timed
    facts: dict[str, Any]
    text: str


def compiled(function: Callable[..., Any], *operands: Any) -> Program:
    """Compiles a function for the given arrays."""
    import jax

    begin = time.perf_counter()
    program = jax.jit(function).lower(*operands).compile()
    seconds = time.perf_counter() - begin
    facts = {"compile_s": round(seconds, 1), **memory_of(program)}
    timed = Timed(lambda: program(*operands), jax.block_until_ready)
    return Program(timed, facts, program.as_text() or "")


def memory_of(program: Any) -> dict[str, float]:
    """Temporaries and total memory of a compiled program, in MB; {} if not available."""
    memory = program.memory_analysis()
    if memory is None:
        return {}
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
    whole += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
        "program_mb": round(whole / 1e6, 1),
    }


def sample(timed: Timed, repeats: int) -> float:
    """Mean seconds of a run over `repeats` runs."""
    begin = time.perf_counter()
    out = None
    for _ in range(repeats):
        out = None  # frees its memory for the next
        out = timed.call()
    timed.wait(out)
    return (time.perf_counter() - begin) / repeats


def in_turn(candidates: Mapping[str, Timed], dry: bool = False) -> dict[str, list[float]]:
    """Samples of each candidate, in seconds; candidates take turns after a warm-up."""
    repeats = {}
    for name, timed in candidates.items():
        sample(timed, 1)
        seconds = sample(timed, 1 if dry else 2)
        enough = math.ceil(SAMPLE_SECONDS / max(seconds, 1e-6))
        repeats[name] = 1 if dry else min(max(enough, 1), MOST_REPEATS)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(2 if dry else SAMPLES):
        for name, timed in candidates.items():
            found[name].append(sample(timed, repeats[name]))
    return found


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median and range in milliseconds."""
    low, high = min(seconds), max(seconds)
    return {
        "ms": round(statistics.median(seconds) * 1e3, 4),
        "ms_low": round(low * 1e3, 4),
        "ms_high": round(high * 1e3, 4),
        "samples": len(seconds),
    }


def rate_against(timed: Timed, flops: float, bar: Timed, bar_flops: float, dry: bool) -> Any:
    """Times a program, alternating with the reference matmul.

    Args:
      timed: the program.
      flops: FLOPs of the program.
      bar: the matmul.
      bar_flops: FLOPs of the matmul.
      dry: whether to take few samples.

    Returns:
      Milliseconds, TFLOP/s, and `share`: the median fraction of the matmul's rate in the same
      rounds.
    """
    found = in_turn({"bar": bar, "own": timed}, dry)
    own, bars = found["own"], found["bar"]
    shares = [flops / a / (bar_flops / b) for a, b in zip(own, bars, strict=True)]
    return spread(own) | {
        "tflops": flops / statistics.median(own) / 1e12,
        "matmul_tflops": bar_flops / statistics.median(bars) / 1e12,
        "share": statistics.median(shares),
        "share_low": min(shares),
        "share_high": max(shares),
    }


def matmul_program(size: int, dtype: Any, precision: Any = None) -> tuple[Program, float]:
    """The product of two random square matrices, and its FLOPs; zeros would run faster."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    program = compiled(lambda a, b: jnp.matmul(a, b, precision=precision), a, b)
    return program, 2.0 * size**3


@functools.cache
def bar(dry: bool) -> tuple[Timed, float]:
    """The bfloat16 reference matmul, and its FLOPs."""
    import jax.numpy as jnp

    program, flops = matmul_program(128 if dry else MATMUL, jnp.bfloat16)
    return program.timed, flops
