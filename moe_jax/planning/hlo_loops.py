"""How often a loop of an HLO program runs."""

import re

from moe_jax.planning.hlo_text import Computation, Instruction, Module

_SAME_VALUE = frozenset({"bitcast", "convert", "copy", "copy-done", "copy-start", "reshape"})
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """The number of iterations of a while loop.

    The compiler's note (`known_trip_count`) is trusted. A TPU's programs have none: there, two
    kinds of loop are understood. A counter may start at a constant, change by a constant and be
    compared with a constant. Or the body clears a flag: such a loop is a condition, which counts as
    true.

    Args:
      module: the program.
      caller: the computation that contains the loop.
      loop: the while instruction.

    Returns:
      The count; None if the text does not show it.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called("condition")[0]]
    body = module.computations[loop.called("body")[0]]
    state = _source(caller, caller.instructions[loop.operands[0]])
    if state.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    initial = [_source(caller, operand) for operand in caller.operands(state)]

    def constant(computation: Computation, value: Instruction) -> int | None:
        """The value, if it is a constant or an element of the state that stays constant."""
        index = _state_index(computation, value)
        if index is not None and index == _state_index(body, _next(body, index)):
            value = initial[index]
        return _integer(value)

    flag = _state_index(condition, _source(condition, condition.root))
    if flag is not None:
        cleared = _next(body, flag)
        return 1 if (cleared.opcode, cleared.arguments) == ("constant", "false") else None
    comparison, sides = _operation(module, condition, condition.root)
    if comparison.opcode != "compare" or len(sides) != 2:
        return None
    direction = comparison.attribute("direction") or ""
    for (counter, bound), relation in (
        (sides, direction),
        (sides[::-1], _MIRRORED.get(direction, "")),
    ):
        index, end = _state_index(condition, counter), constant(condition, bound)
        if index is None or end is None:
            continue
        change, terms = _operation(module, body, _next(body, index))
        steps = [constant(body, term) for term in terms if _state_index(body, term) != index]
        if change.opcode in ("add", "subtract") and len(terms) == 2 and len(steps) == 1:
            step = steps[0]
            if step is not None and change.opcode == "subtract":
                step = -step if _state_index(body, terms[0]) == index else None
            return _iterations(_integer(initial[index]), end, step, relation)
    return None


def _iterations(start: int | None, end: int, step: int | None, relation: str) -> int | None:
    """How often `relation` holds between a counter and its end."""
    if start is None or not step:
        return None
    if relation in ("LE", "GE"):
        end += 1 if relation == "LE" else -1
    if relation == "NE" and (end - start) % step:
        return None
    if relation == "NE" or (step > 0) == (relation in ("LT", "LE")):
        return max(0, -((start - end) // step))
    return None


def _next(body: Computation, index: int) -> Instruction:
    """An element of the state after an iteration."""
    return _source(body, body.operands(body.root)[index])


def _source(computation: Computation, value: Instruction) -> Instruction:
    """The instruction that computes a value, behind mere copies of it."""
    while value.opcode in _SAME_VALUE:
        value = computation.instructions[value.operands[0]]
    return value


def _operation(
    module: Module, computation: Computation, value: Instruction
) -> tuple[Instruction, list[Instruction]]:
    """The instruction that computes a value, inside a fusion if any, and its operands' sources."""
    value = _source(computation, value)
    outer = [_source(computation, operand) for operand in computation.operands(value)]
    if value.opcode != "fusion":
        return value, outer
    body = module.computations[value.called("calls")[0]]
    root = _source(body, body.root)
    inner = [_source(body, operand) for operand in body.operands(root)]
    return root, [outer[int(i.arguments)] if i.opcode == "parameter" else i for i in inner]


def _state_index(computation: Computation, value: Instruction) -> int | None:
    """The index of a value in the loop's state; None if it is not an element of it."""
    if value.opcode != "get-tuple-element":
        return None
    source = computation.instructions.get(value.operands[0])
    return value.integers("index")[0] if source and source.opcode == "parameter" else None


def _integer(value: Instruction) -> int | None:
    if value.opcode != "constant" or not re.fullmatch(r"-?\d+", value.arguments):
        return None
    return int(value.arguments)
