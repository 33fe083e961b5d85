"""The collectives of a program: which devices take part, and what one holds and must send."""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from moe_jax.planning.hlo_text import Array, Computation, Instruction

OPERATIONS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, and how often one device executes it.

    Attributes:
      operation: the HLO opcode, e.g. "all-gather", without `-start`.
      shape: the arrays of the larger of input and output, e.g. "bf16[8,128]"; several are
        separated by a space.
      bytes: their size on one device in one execution, without padding: the gathered array of an
        all-gather, the unreduced one of a reduce-scatter. The buffer of a ragged all-to-all counts
        in full, as an upper bound.
      group: device ids of the group that is written first; for a permute, of the devices that are
        connected with the first pair.
      op_name: its origin in the traced program, with named scopes.
      count: executions, multiplied by the trip counts of enclosing loops.
    """

    operation: str
    shape: str
    bytes: int
    group: tuple[int, ...]
    op_name: str = ""
    count: int = 1

    @property
    def group_size(self) -> int:
        """The number of devices that take part, n."""
        return len(self.group)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device must send in one execution of the best algorithm.

        The share (n-1)/n of `bytes` for all-gather, reduce-scatter and both all-to-alls, twice
        that for all-reduce (a reduce-scatter and an all-gather), all `bytes` for a permute and a
        broadcast.
        """
        if self.operation in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        n = self.group_size
        return self.bytes * (n - 1) / n * (2 if self.operation == "all-reduce" else 1)


def by_operation(collectives: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Executions and bytes by operation, in alphabetical order: {operation: (count, bytes)}."""
    totals: dict[str, tuple[int, int]] = {}
    for one in sorted(collectives, key=lambda one: one.operation):
        count, size = totals.get(one.operation, (0, 0))
        totals[one.operation] = (count + one.count, size + one.count * one.bytes)
    return totals


def continued(body: Computation) -> set[str]:
    """Collectives of a fused computation that another fusion has started.

    A TPU splits one collective into three fusions: one that starts it, with a custom call
    `AsyncCollectiveStart`, one that does other work meanwhile, and one that ends it. Each of them
    contains the collective.
    """
    started = {
        operand
        for instruction in body.instructions.values()
        if instruction.target == "AsyncCollectiveStart"
        for operand in instruction.operands
    }
    return {
        name
        for name, instruction in body.instructions.items()
        if instruction.opcode in OPERATIONS
        and "async_collective_fusion_config" in instruction.attributes
        and name not in started
    }


def make_collective(
    operation: str,
    instruction: Instruction,
    inputs: Iterable[Array],
    outputs: Iterable[Array],
    num_devices: int,
    op_name: str,
) -> Collective:
    """The collective that an instruction executes once.

    Args:
      operation: one of `OPERATIONS`.
      instruction: the instruction, for its groups.
      inputs: the arrays that one device provides.
      outputs: the arrays that it receives.
      num_devices: the program's number of devices; all take part if no group is written.
      op_name: its origin in the traced program.
    """
    sides = [tuple(inputs), tuple(outputs)]
    larger = max(sides, key=lambda arrays: sum(array.bytes for array in arrays))
    if operation == "collective-permute":
        group = _connected(instruction.integers("source_target_pairs"))
    else:
        match = re.search(r", replica_groups=(.*)", instruction.unquoted)
        group = first_group(match[1] if match else "", num_devices)
    size = sum(array.bytes for array in larger)
    return Collective(operation, " ".join(map(str, larger)), size, group, op_name)


def first_group(groups: str, num_devices: int) -> tuple[int, ...]:
    """The device ids of the first replica group.

    Args:
      groups: text that starts with the groups, in any of the forms that the compiler writes: lists,
        a reshaped and transposed iota, or axes of a mesh.
      num_devices: all devices take part if the list is empty.

    >>> first_group("{{0,2},{1,3}}", 4), first_group("[4,2]<=[2,4]T(1,0)", 8)
    ((0, 2), (0, 4))
    >>> first_group("mesh['a'=2,'b'=4] {'b'}", 8), first_group("{}", 3)
    ((0, 1, 2, 3), (0, 1, 2))
    """
    if listed := re.match(r"\{\{([\d, ]+)\}", groups):
        return tuple(int(device) for device in listed[1].split(","))
    if iota := re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", groups):
        shape = _integers(iota[1])
        return tuple(_iota(iota[2]).reshape(shape[0], -1)[0].tolist())
    if mesh := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", groups):
        return _mesh_group(*mesh.groups())
    return tuple(range(num_devices))


def _mesh_group(axes: str, device_ids: str | None, grouped: str) -> tuple[int, ...]:
    """The first group along axes of a mesh; `a:(2)4` is the part of size 4 after 2 of axis a."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", axes)}
    parts = re.findall(r"'?([^',:()]+)'?(?::\((\d+)\)(\d+))?", grouped)
    devices = np.arange(math.prod(sizes.values()))
    if device_ids:
        devices = _iota(device_ids) if "[" in device_ids else np.array(_integers(device_ids))
    # A device's index is the sum of its position times the stride, over all axes.
    strides = dict(zip(sizes, np.cumprod([1, *reversed(sizes.values())])[-2::-1], strict=True))
    positions = np.zeros(1, int)
    for name, before, size in parts:
        length = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * length) if size else 1)
        positions = (positions[:, None] + np.arange(length) * step).ravel()
    return tuple(devices.ravel()[positions].tolist())


def _iota(text: str) -> np.ndarray:
    """Device ids of `[2,4]T(1,0)`, with or without `<=` in front, flat."""
    match = re.fullmatch(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    dims, order = match.groups()
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return ids.transpose(_integers(order) if order else None).ravel()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _connected(pairs: tuple[int, ...]) -> tuple[int, ...]:
    """The devices that exchange data, directly or not, with the first device of flattened pairs."""
    neighbours: dict[int, set[int]] = {}
    for source, target in zip(pairs[::2], pairs[1::2], strict=True):
        neighbours.setdefault(source, set()).add(target)
        neighbours.setdefault(target, set()).add(source)
    found, frontier = set(pairs[:1]), list(pairs[:1])
    while frontier:
        new = neighbours[frontier.pop()] - found
        found |= new
        frontier += new
    return tuple(sorted(found))
