"""Bytes that one HLO instruction reads from and writes to a device's main memory."""

from collections.abc import Sequence

from moe_jax.planning.hlo_collectives import continued
from moe_jax.planning.hlo_kernels import BOOKKEEPING
from moe_jax.planning.hlo_text import (
    Array,
    Computation,
    Instruction,
    Module,
    parse_arrays,
    tuple_parts,
)

# These only name memory, or are counted in the computations that they call.
_FREE = frozenset(
    {
        "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all",
        "add-dependency", "optimization-barrier", "partition-id", "replica-id", "domain",
        "while", "call", "conditional", "async-start",
    }
)  # fmt: skip
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_UPDATES = frozenset({"dynamic-update-slice", "scatter"})
# An output element of these needs more than the operands' elements at its own position.
_MIXING = frozenset(
    {
        "dot", "scaled-dot", "ragged-dot", "convolution", "reduce", "reduce-window", "sort", "fft",
        "map", "select-and-scatter", "cholesky", "triangular-solve", "custom-call",
        "get-tuple-element", "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
        "collective-permute", "collective-broadcast", "rng-bit-generator",
    }
)  # fmt: skip


def bytes_moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that a top-level instruction reads and writes.

    Each operand and result counts once, at its size in main memory (0 if it is kept on chip). There
    are three exceptions, inside and outside fusions. From an operand that is only sliced or
    gathered from, only the slices are read. The target of a dynamic-update-slice or a scatter is
    touched only where it is written. The second half of an asynchronous pair is free.

    Args:
      module: the program.
      computation: the computation that contains the instruction.
      instruction: an instruction that is not inside a fusion.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if instruction.target in BOOKKEEPING:
        return 0
    operands = computation.operands(instruction)
    if opcode in ("fusion", "fusion-start"):
        body = module.computations[instruction.called("calls")[0]]
        if body.root.target == "AsyncCollectiveDone":
            return 0
        aliased = "output_to_operand_aliasing=" in instruction.attributes
        by_parameter = _fusion_reads(module, body, aliased)
        reads = [by_parameter[number] for number in range(len(operands))]
        written = _fusion_writes(body, results(instruction), aliased)
    else:
        arrays = results(instruction)
        size = sum(array.elements for array in arrays)
        reads = [
            _elements_read(instruction, operands, position, size, in_place=True)
            for position in range(len(operands))
        ]
        written = sum(
            _share(array, elements)
            for array, elements in zip(
                arrays, _elements_written(instruction, operands, arrays), strict=True
            )
        )
    wanted: dict[str, int] = {}
    for operand, elements in zip(operands, reads, strict=True):
        wanted[operand.name] = min(operand.elements, wanted.get(operand.name, 0) + elements)
    return written + sum(_read_bytes(computation.instructions[n], e) for n, e in wanted.items())


def results(instruction: Instruction) -> tuple[Array, ...]:
    """What an instruction computes; for the first half of an asynchronous pair only the payload.

    The first half returns a tuple: (operands, results, state), or for a copy (result, operand,
    state).
    """
    root_of_start = instruction.opcode.endswith("-start")
    if not root_of_start or instruction.opcode == "all-reduce-start":
        return instruction.arrays
    parts = tuple_parts(instruction.shape)
    return parse_arrays(parts[0 if instruction.opcode == "copy-start" or len(parts) == 1 else 1])


def _share(array: Array, elements: int) -> int:
    """Bytes in main memory of some of an array's elements."""
    return array.hbm_bytes * elements // max(array.elements, 1)


def _read_bytes(operand: Instruction, elements: int) -> int:
    if len(operand.arrays) == 1:
        return _share(operand.arrays[0], elements)
    return sum(array.hbm_bytes for array in operand.arrays) if elements else 0


def _elements_read(
    user: Instruction,
    operands: Sequence[Instruction],
    position: int,
    needed: int,
    *,
    in_place: bool,
) -> int:
    """Elements of an operand that an instruction reads.

    Args:
      user: the instruction.
      operands: what it reads.
      position: the operand's index among them.
      needed: how many elements of its result are used.
      in_place: whether an update writes into the operand's own memory.
    """
    opcode = user.opcode.removesuffix("-start")
    size = operands[position].elements
    if opcode in _SLICES and position == 0:
        return min(size, needed)
    if opcode == "dynamic-update-slice" and position == 0:
        return 0 if in_place else min(size, needed)
    if opcode == "scatter" and position < len(operands) // 2:
        # The old values are combined with the update.
        update = operands[len(operands) // 2 + 1 + position]
        return min(size, update.elements if in_place else needed)
    if opcode == "ragged-all-to-all" and position == 1:
        return 0  # the buffer that the received rows are written into
    if opcode in _MIXING or opcode in _UPDATES:
        return size
    return min(size, needed)


def _elements_written(
    instruction: Instruction, operands: Sequence[Instruction], arrays: Sequence[Array]
) -> list[int]:
    """Elements that an instruction writes into each of its results, the given arrays."""
    if instruction.opcode == "dynamic-update-slice":
        return [operands[1].elements]
    if instruction.opcode == "scatter":
        return [update.elements for update in operands[len(operands) // 2 + 1 :]]
    return [array.elements for array in arrays]


def _leaves(body: Computation) -> list[Instruction]:
    """The instructions whose values a fusion returns."""
    root = body.root
    return body.operands(root) if root.opcode == "tuple" else [root]


def _updates(body: Computation, leaf: Instruction) -> list[Instruction] | None:
    """The in-place updates that turn a parameter into a returned value; None if there is none."""
    updates = []
    while leaf.opcode in ("bitcast", *_UPDATES) or _is_alias(leaf):
        if leaf.opcode in _UPDATES:
            updates.append(leaf)
        leaf = body.instructions[leaf.operands[0]]
    return updates if leaf.opcode == "parameter" else None


def _is_alias(instruction: Instruction) -> bool:
    """Whether a fusion inside a fusion only gives its first operand another layout, in place."""
    alias = ", output_to_operand_aliasing={{}: (0, {})}"
    return instruction.opcode == "fusion" and alias in instruction.attributes


def _fusion_writes(body: Computation, arrays: Sequence[Array], aliased: bool) -> int:
    """Bytes that a fusion writes; if `aliased`, parameters returned unchanged stay in place."""
    leaves, passing = _leaves(body), continued(body)
    if len(leaves) != len(arrays):  # a collective's start: operands, results, state
        return sum(a.hbm_bytes for a in parse_arrays(tuple_parts(leaves[0].shape)[1]))
    total = 0
    for leaf, array in zip(leaves, arrays, strict=True):
        updates = _updates(body, leaf)
        if leaf.name in passing or (updates == [] and aliased):
            continue
        elements = [sum(_elements_written(u, body.operands(u), [])) for u in updates or ()]
        total += _share(array, min(sum(elements), array.elements) if elements else array.elements)
    return total


def _fusion_reads(
    module: Module, body: Computation, aliased: bool, needed: int | None = None
) -> dict[int, int]:
    """Elements that a fusion reads of each operand, by parameter number.

    Args:
      module: the program.
      body: the fused computation.
      aliased: whether parameters that it returns unchanged stay in place.
      needed: how many elements of its result are used; None: all.
    """
    passing = continued(body)
    wanted: dict[str, int] = {}
    in_place: set[str] = set()
    for leaf in _leaves(body):
        updates = _updates(body, leaf)
        if leaf.name in passing or (updates == [] and aliased):
            continue
        wanted[leaf.name] = leaf.elements if needed is None else min(needed, leaf.elements)
        for update in updates or ():
            in_place.add(update.name)
            wanted[update.name] = update.elements
    for user in reversed(body.instructions.values()):
        if not wanted.get(user.name) or user.opcode == "tuple":
            continue
        operands = body.operands(user)
        if user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            by_parameter = _fusion_reads(module, inner, False, wanted[user.name])
            reads = [by_parameter[number] for number in range(len(operands))]
        else:
            reads = [
                _elements_read(
                    user, operands, position, wanted[user.name], in_place=user.name in in_place
                )
                for position in range(len(operands))
            ]
        for operand, elements in zip(operands, reads, strict=True):
            wanted[operand.name] = min(operand.elements, wanted.get(operand.name, 0) + elements)
    return {
        int(instruction.arguments): wanted.get(instruction.name, 0)
        for instruction in body.instructions.values()
        if instruction.opcode == "parameter"
    }
