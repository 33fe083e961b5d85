"""A compiled program: its memory and its work, as the compiler reports them."""

import dataclasses
import re

from moe_jax.planning.hlo import Program

UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


@dataclasses.dataclass(frozen=True)
class CompilerMemory:
    """Bytes on one device, as the compiler reports them.

    Attributes:
      arguments: inputs of the program: state and batch.
      outputs: results.
      aliased: outputs that are written over arguments.
      temporaries: everything else.
      generated_code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    generated_code: int

    @property
    def total(self) -> int:
        """Bytes at the peak: outputs written over arguments need no extra memory."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.generated_code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for one device of a machine.

    Attributes:
      memory: the bytes it needs; None if the compiler refused it for lack of memory.
      program: the work it does; None if refused.
      seconds: wall-clock time to trace, lower, compile and read it.
      cpu_seconds: CPU time of the process for the same; other load on the machine changes it less.
      cost_analysis_flops: the compiler's own count, which counts the body of a loop once; None if
        it has none (GPU).
      refused: bytes needed and bytes available, from the compiler's message.
    """

    memory: CompilerMemory | None
    program: Program | None
    seconds: float
    cpu_seconds: float
    cost_analysis_flops: float | None = None
    refused: tuple[float, float] | None = None


def out_of_memory(message: str) -> tuple[float, float] | None:
    """Bytes needed and bytes available, from the compiler's message; None for other messages.

    >>> out_of_memory("RESOURCE_EXHAUSTED: ... temporaries (96.12G) exceeds available HBM (15.75G)")
    (103208064122.88, 16911433728.0)
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    used = re.search(r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) hbm", message)
    either = used or re.search(r"\(([\d.]+)([BKMGT]?)\) exceeds.*?\(([\d.]+)([BKMGT]?)\)", message)
    if either is None:
        return (float("nan"), float("nan"))
    needed, unit, available, other = either.groups()
    return float(needed) * UNITS[unit], float(available) * UNITS[other]
