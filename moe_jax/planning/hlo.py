"""What one execution of a compiled program does on one device, read from the program's text.

`cost_analysis()` of a compiled program counts the body of a loop once, ignores custom calls and
omits the interconnect. `read_program` multiplies loops out, and reports what it cannot count.

The difference in `cost_analysis()` between programs of one and of two layers is not a layer's
share. The compiler unrolls the loop of one layer, and the loop of two counts as one layer. Programs
without the loop can have other collectives and fewer FLOPs than the program that runs.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

from moe_jax.planning.hlo_collectives import (
    OPERATIONS,
    Collective,
    by_operation,
    continued,
    make_collective,
)
from moe_jax.planning.hlo_flops import matmul_flops
from moe_jax.planning.hlo_kernels import (
    custom_call_flops,
    is_grouped_matmul,
    kernel_name,
    row_tile,
)
from moe_jax.planning.hlo_loops import trip_count
from moe_jax.planning.hlo_memory import bytes_moved, results
from moe_jax.planning.hlo_text import Computation, Instruction, Module, parse_module

KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu")
__all__ = ["Collective", "Program", "by_operation", "read_program"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One execution of a program on one device.

    Attributes:
      flops: of matmuls, kernels included, and convolutions; a multiply-add counts as two.
      traffic: bytes that instructions outside fusions read from and write to main memory, with the
        padding of the layout, by their origin in the traced program; on-chip memory is free.
      collectives: with their counts; equal ones are one entry.
      uncounted: custom calls whose FLOPs are not in `flops`, and how often they run; `traffic`
        includes the arrays that they read and write.
      unknown_loops: loops of unknown length, counted as if they ran once.
      grouped_flops: the part of `flops` in kernels of grouped matmuls, for all rows of their
        buffers.
      row_tiles: rows per tile of these kernels, if the compiler states them, ascending.
    """

    flops: int
    traffic: Mapping[str, int]
    collectives: tuple[Collective, ...]
    uncounted: dict[str, int]
    unknown_loops: tuple[str, ...]
    grouped_flops: int = 0
    row_tiles: tuple[int, ...] = ()

    @property
    def hbm_bytes(self) -> int:
        """All bytes of `traffic`."""
        return sum(self.traffic.values())


def read_program(text: str) -> Program:
    """Counts what a program does.

    A loop counts as often as it runs, a conditional as its most expensive branch.

    Args:
      text: the optimised, partitioned module, as `jax.stages.Compiled.as_text()` returns it.

    Raises:
      ValueError: the text is not an HLO module.
    """
    module = parse_module(text)
    total = _Counter(module).count(module.computations[module.entry])
    return Program(
        flops=total.flops,
        traffic=dict(total.traffic),
        collectives=tuple(
            dataclasses.replace(one, count=count) for one, count in total.collectives.items()
        ),
        uncounted=dict(total.uncounted),
        unknown_loops=tuple(total.unknown_loops),
        grouped_flops=total.grouped_flops,
        row_tiles=tuple(sorted(total.row_tiles)),
    )


@dataclasses.dataclass
class _Total:
    """Sums over instructions; the keys of `collectives` have count 1."""

    flops: int = 0
    traffic: Counter[str] = dataclasses.field(default_factory=Counter)
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    uncounted: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: dict[str, None] = dataclasses.field(default_factory=dict)
    grouped_flops: int = 0
    row_tiles: set[int] = dataclasses.field(default_factory=set)

    def add(self, other: "_Total", times: int = 1) -> None:
        """Adds another total, multiplied by `times`."""
        if times == 0:
            return
        self.flops += times * other.flops
        for origin, size in other.traffic.items():
            self.traffic[origin] += times * size
        for one, count in other.collectives.items():
            self.collectives[one] += times * count
        for target, count in other.uncounted.items():
            self.uncounted[target] += times * count
        self.unknown_loops |= other.unknown_loops
        self.grouped_flops += times * other.grouped_flops
        self.row_tiles |= other.row_tiles

    @property
    def expense(self) -> tuple[int, int, float]:
        """The key by which branches of a conditional are compared."""
        wire = sum(one.wire_bytes * count for one, count in self.collectives.items())
        return self.flops, self.traffic.total(), wire


class _Counter:
    """Counts the computations of a module, each one once."""

    def __init__(self, module: Module):
        self.module = module
        self.known: dict[tuple[str, str], _Total] = {}

    def count(self, computation: Computation, caller: str = "", fused: bool = False) -> _Total:
        """What one execution of a computation does.

        Args:
          computation: the computation.
          caller: origin of the instruction that calls it; a collective in a fusion often has no
            name of its own.
          fused: inside a fusion, whose memory traffic is its caller's.
        """
        key = (computation.name, caller)
        if key not in self.known:
            total = _Total()
            passing = continued(computation) if fused else ()
            for instruction in computation.instructions.values():
                if instruction.name not in passing:
                    self._count_instruction(total, computation, instruction, caller)
                if not fused and (size := bytes_moved(self.module, computation, instruction)):
                    total.traffic[instruction.op_name or caller] += size
            self.known[key] = total
        return self.known[key]

    def _called(self, name: str) -> _Total:
        return self.count(self.module.computations[name])

    def _count_instruction(
        self, total: _Total, computation: Computation, instruction: Instruction, caller: str
    ) -> None:
        """Adds what an instruction does, except the memory that it moves."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "while":
            self._count_loop(total, computation, instruction)
        elif opcode == "conditional":
            branches = instruction.called(
                "branch_computations", "true_computation", "false_computation"
            )
            total.add(max(map(self._called, branches), key=lambda branch: branch.expense))
        elif opcode in ("call", "async"):
            total.add(self._called(instruction.called("to_apply", "calls")[0]))
        elif opcode == "fusion":
            body = self.module.computations[instruction.called("calls")[0]]
            total.add(self.count(body, instruction.op_name or caller, fused=True))
        elif opcode in OPERATIONS:
            total.collectives[self._collective(computation, instruction, opcode, caller)] += 1
        elif opcode == "custom-call":
            _count_custom_call(total, instruction, computation.operands(instruction))
        else:
            total.flops += matmul_flops(instruction, computation.operands(instruction))

    def _count_loop(
        self, total: _Total, computation: Computation, instruction: Instruction
    ) -> None:
        """Adds a loop, whose condition runs once more than its body."""
        times = trip_count(self.module, computation, instruction)
        (body,), (condition,) = instruction.called("body"), instruction.called("condition")
        if times is None:
            total.unknown_loops[instruction.op_name or instruction.name] = None
            times = 1
        total.add(self._called(body), times)
        total.add(self._called(condition), times + 1)

    def _collective(
        self, computation: Computation, instruction: Instruction, kind: str, caller: str
    ) -> Collective:
        inputs = computation.operands(instruction)
        if kind == "ragged-all-to-all":
            inputs = inputs[:1]  # the others are the output buffer, offsets and sizes
        if kind == "all-reduce" and _only_sliced(computation, instruction):
            kind = "reduce-scatter"
        return make_collective(
            kind,
            instruction,
            [array for operand in inputs for array in operand.arrays],
            results(instruction),
            self.module.num_devices,
            instruction.op_name or caller,
        )


def _count_custom_call(
    total: _Total, instruction: Instruction, operands: list[Instruction]
) -> None:
    """Adds the FLOPs of a custom call, or lists it as uncounted."""
    flops = custom_call_flops(instruction, operands)
    if flops is None:
        total.uncounted[_label(instruction)] += 1
        return
    total.flops += flops
    if flops and is_grouped_matmul(instruction):
        total.grouped_flops += flops
        tile = row_tile(instruction)
        total.row_tiles |= {tile} if tile else set()


def _only_sliced(body: Computation, reduction: Instruction) -> bool:
    """Whether a computation returns a slice of an all-reduce: a TPU's form of a reduce-scatter."""
    root = body.root
    while root.opcode == "bitcast":
        root = body.instructions[root.operands[0]]
    return root.opcode == "dynamic-slice" and root.operands[0] == reduction.name


def _label(custom_call: Instruction) -> str:
    """The target; for hand-written kernels, which share one, also the kernel's name."""
    if not custom_call.target.startswith(KERNEL_TARGETS):
        return custom_call.target
    kernel = re.sub(r"\.\d+$", "", kernel_name(custom_call))
    return f"{custom_call.target} {kernel}"
