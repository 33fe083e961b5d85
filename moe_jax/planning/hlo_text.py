"""The text of a compiled HLO module as data: computations, instructions, arrays; no counting.

jaxlib's own objects (`runtime_executable().hlo_modules()`) do not replace it. Their instructions
have a name, an opcode and operands, but no shape, attributes or called computations.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) ?\(")
_OPERAND = re.compile(r"%([^\s,(){}]+)")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_OP_NAME = re.compile(r'[{ ]op_name="([^"\\]*(?:\\.[^"\\]*)*)"')
_TILE = re.compile(r":T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_BRACKETS = re.compile(r"[()]")


class Array(NamedTuple):
    """One array: the element type, the sizes of the dimensions and the layout as written."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without padding; half a byte each for 4-bit types."""
        return _packed_bytes(self.dtype, self.elements)

    @property
    def hbm_bytes(self) -> int:
        """Bytes that the array takes in the device's main memory, 0 if it is kept elsewhere.

        A TPU pads the minor dimensions to whole tiles (`T(8,128)`), and keeps some arrays in
        on-chip or host memory (`S(1)` is VMEM, `S(5)` the host). A GPU has no tiles, and its
        `S(1)`, the memory of collectives, is part of its main memory.
        """
        if ":" not in self.layout:
            return self.bytes
        order, _ = self.layout.split(":", 1)
        space = _SPACE.search(self.layout)
        tile = _TILE.search(self.layout)
        if space and space[1] != "0" and (space[1] != "1" or tile):
            return 0
        if not tile or not self.dims:
            return self.bytes
        sizes = [int(size) for size in tile[1].split(",")]
        physical = [self.dims[int(axis)] for axis in reversed(order.split(","))]
        physical = [1] * (len(sizes) - len(physical)) + physical
        for axis, size in enumerate(sizes, start=len(physical) - len(sizes)):
            physical[axis] = -(-physical[axis] // size) * size
        return _packed_bytes(self.dtype, math.prod(physical))


def _packed_bytes(dtype: str, elements: int) -> int:
    return -(-elements * _bits(dtype) // 8)


@functools.cache
def _bits(dtype: str) -> int:
    """Bits of an element: the first number in the dtype's name; a bool has 8, a token 0."""
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def parse_arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, with nested tuples flattened in order.

    >>> [str(array) for array in parse_arrays("(bf16[8,128]{1,0:T(8,128)(2,1)}, (u32[], s4[3]))")]
    ['bf16[8,128]', 'u32[]', 's4[3]']
    """
    return tuple(
        Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def tuple_parts(shape: str) -> list[str]:
    """The elements of a tuple's shape as text; a shape that is not a tuple is its only element.

    >>> tuple_parts("((f32[2]{0}, u8[]), f32[4]{0})")
    ['(f32[2]{0}, u8[])', 'f32[4]{0}']
    """
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for match in re.finditer(r"[()\[\]{},]", shape):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if (match[0] == "," and depth == 1) or depth == 0:
            parts.append(shape[start : match.start()].strip())
            start = match.end()
    return parts


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, without the percent sign.
      opcode: what it does, e.g. "dot".
      shape: the shape of its result, as written.
      operands: names of the instructions that it reads.
      arguments: the text between the parentheses, such as the value of a constant or the number of
        a parameter.
      attributes: the text after the parentheses.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result."""
        return parse_arrays(self.shape)

    @property
    def elements(self) -> int:
        """Elements of its result, all arrays together."""
        return sum(array.elements for array in self.arrays)

    @functools.cached_property
    def unquoted(self) -> str:
        """The attributes with every string emptied, so that no name can pass for an attribute."""
        return _STRING.sub('""', self.attributes)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute: a word, or the text between braces; None if absent."""
        pattern = rf", {name}=(?:\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|([^\s,]+))"
        match = re.search(pattern, self.unquoted)
        if match is None:
            return None
        return match[2] if match[1] is None else match[1]

    def integers(self, name: str) -> tuple[int, ...]:
        """The integers of an attribute such as `lhs_contracting_dims={1}`; none if absent."""
        return tuple(int(digits) for digits in re.findall(r"\d+", self.attribute(name) or ""))

    def called(self, *names: str) -> list[str]:
        """Computations that the attributes of these names refer to, e.g. `calls=%body`."""
        return [
            reference.strip().lstrip("%")
            for name in names
            if (value := self.attribute(name)) is not None
            for reference in value.split(",")
        ]

    @property
    def op_name(self) -> str:
        """Its origin in the traced program (`jit(f)/layer/dot_general`), or empty."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """The target of a custom call; empty for anything else."""
        if self.opcode != "custom-call":
            return ""
        match = re.search(r', custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, operands before users, and the name of the result."""

    name: str
    instructions: dict[str, Instruction]
    root_name: str

    @property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return self.instructions[self.root_name]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that an instruction of this computation reads."""
        return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """The computations of a program by name.

    Attributes:
      computations: all of them.
      entry: the name of the computation that runs.
      num_devices: how many devices run it together.
    """

    computations: dict[str, Computation]
    entry: str
    num_devices: int


def parse_module(text: str) -> Module:
    """Reads the text of a module, in time linear in its length.

    Raises:
      ValueError: the text has no `ENTRY` computation.
    """
    header = text[: text.find("\n")]
    counts = [re.search(rf"{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
    computations: dict[str, Computation] = {}
    entry = ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            match = _COMPUTATION.match(line)
            if match:
                computations[match[2]] = _parse_computation(match[2], lines)
                entry = match[2] if match[1] else entry
    if not entry:
        raise ValueError(
            "the text has no ENTRY computation: pass what `jax.stages.Compiled.as_text()` returns"
        )
    return Module(computations, entry, math.prod(int(match[1]) for match in counts if match))


def _parse_computation(name: str, lines: Iterator[str]) -> Computation:
    """Reads lines up to the closing brace."""
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in _whole_lines(lines):
        match = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(line, match.end() - 1) if match else None
        if match is None or opcode is None:
            continue
        end = _closing(line, opcode.end())
        arguments = line[opcode.end() : end]
        operands = () if opcode[1] == "constant" else tuple(_OPERAND.findall(arguments))
        instructions[match[2]] = Instruction(
            match[2],
            opcode[1],
            line[match.end() : opcode.start()],
            operands,
            arguments,
            line[end + 1 :],
        )
        root = match[2] if match[1] else root
    return Computation(name, instructions, root or next(reversed(instructions), ""))


def _whole_lines(lines: Iterator[str]) -> Iterator[str]:
    """The instructions up to the closing brace, each on one line; a kernel's note may span many.

    >>> list(_whole_lines(iter(["  a = f(), note={", '"b":"1"', "}}, more={}", "  c = g()", "}"])))
    ['  a = f(), note={"b":"1"}}, more={}', '  c = g()']
    """
    whole: list[str] = []
    for line in lines:
        is_end = line == "}" or line.startswith("},")
        if whole and (is_end or _INSTRUCTION.match(line)):
            yield "".join(whole)
            whole = []
        if is_end:
            return
        whole.append(line)
    if whole:
        yield "".join(whole)


def _closing(line: str, start: int) -> int:
    """The index where the parenthesis that is open at `start` closes."""
    depth = 1
    for match in _BRACKETS.finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(line)
