"""Checks a part: `python -m moe_jax.check_part package.module:Class --field=value ...`.

    python -m moe_jax.check_part my_package.routers:RoundRobin --offset=2
    python -m moe_jax.check_part router.token_choice --projection.temperature=0.5

Builds a tiny model around the part and prints a line for each check: the part serialises, its specs
and values are sound, it sees later tokens only if it declares it, every parameter gets a gradient,
and padding changes nothing. A mesh of eight CPU devices must agree with one device, microbatches
with a whole batch, a scan with single layers, and decoding from caches with one pass. The exit code
is 1 if a check fails. Values are Python literals, or else strings. A dot leads to the fields of a
part inside the part.
"""

import ast
import dataclasses
import difflib
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moe_jax.command_help import print_help
from moe_jax.config.convert import InFamily, build, to_dict
from moe_jax.config.describe import describe_kind, kinds_text
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.config.settings import Settings

NUM_DEVICES = 8
USAGE = "usage: python -m moe_jax.check_part package.module:Class | FAMILY.KIND [--field=value ...]"
Told = tuple[str, bool | None, str]  # the name of a check, and its `Result`
WORDS = {True: "ok", False: "FAILED", None: "-"}


def main(arguments: list[str]) -> int:
    """Checks the part that the arguments name; returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        print_help(f"{USAGE}\n\n{__doc__}\nFamilies and kinds:\n{kinds_text()}")
        return 0 if set(arguments) & {"--help", "-h"} else 2
    if {"--help", "-h"} & set(arguments[1:]):
        return report_errors(lambda: print_help(describe_kind(*names_of(arguments[0]))))
    return report_errors(lambda: check_part(arguments[0], arguments[1:]))


def report_errors(work: Callable[[], int | None]) -> int:
    """Does the work; prints a user's error in one line and returns exit code 1."""
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check_part(name: str, flags: list[str]) -> int:
    """Checks a part and prints a line for each check; returns the exit code."""
    import jax

    # Before JAX starts, so that any machine can check a mesh of eight devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    from moe_jax.checks import CHECKS, Trial, check

    trial = Trial(part_of(name, flags))
    around = dict(trial.model.parts)["checked"]
    where = "" if around == trial.part else f", in {brief(around)}"
    print(f"{trial.part.family} {brief(trial.part)}{where}, in a model of two layers\n")
    failed = []
    for one, passed, text in told_once((one, *check(one, trial)) for one in CHECKS):
        print(line(one, passed, text), flush=True)
        failed += [one] if passed is False else []
    print(f"\n{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}" if failed
          else f"\n{len(CHECKS)} checks: none failed")  # fmt: skip
    return 1 if failed else 0


def told_once(results: Iterable[Told]) -> Iterator[Told]:
    """Replaces a failure with the text of an earlier one by the name of that check."""
    first: dict[str, str] = {}
    for name, passed, text in results:
        told = passed is False and first.setdefault(text, name) != name
        yield name, passed, f"as in {first[text]!r}" if told else text


def brief(part: Any) -> str:
    """A part with the fields that differ from their defaults."""
    if not isinstance(part, Settings):
        return repr(part)
    fields = (
        f"{field.name}={brief(getattr(part, field.name))}"
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    )
    return f"{type(part).__name__}({', '.join(fields)})"


def line(name: str, passed: bool | None, text: str) -> str:
    """One line of the report, wrapped to the right of its name."""
    head = f"{WORDS[passed]:7}{name:23}"
    return textwrap.fill(text, 100, initial_indent=head, subsequent_indent=" " * len(head))


def part_of(name: str, flags: list[str]) -> Any:
    """Builds a part.

    Args:
      name: "package.module:Class", or "family.kind" of `moe_jax.config.kinds.KINDS`.
      flags: "--field=value".

    Raises:
      ValueError: there is no such part, or its settings break a rule.
    """
    family, kind = names_of(name)
    values = defaults(family, kind)
    for flag in flags:
        field, equals, text = flag.removeprefix("--").partition("=")
        if not equals or not flag.startswith("--"):
            raise ValueError(f"A field is set by --field=value: {flag!r}. Correct it.")
        inner = values
        *sections, last = field.split(".")
        for section in sections:
            if not isinstance(inner.setdefault(section, {}), dict):
                inner[section] = {"kind": inner[section]}
            inner = inner[section]
        inner[last] = literal(text)
    return build(InFamily(family), values, name)


def names_of(name: str) -> tuple[str, str]:
    """The family and the kind of a part.

    Raises:
      ValueError: there is no such family or kind; the message gives the nearest.
    """
    family, _, kind = name.partition(".")
    if ":" in name:
        return family_of(name), name
    known = [f"{family}.{kind}" for family, kinds in KINDS.items() for kind in kinds]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else "--help lists families and kinds."
        raise ValueError(
            f"A part is named by 'package.module:Class' or 'family.kind': {name!r}. {fix}"
        )
    return family, kind


def defaults(family: str, kind: str) -> dict[str, Any]:
    """The kind and the default fields of a part; only the kind if a field has no default."""
    try:
        written = to_dict(load_kind(family, kind)())
    except TypeError:
        return {"kind": kind}
    return {"kind": written} if isinstance(written, str) else dict(written)


def family_of(path: str) -> str:
    """The family that a class declares.

    Raises:
      ValueError: the class cannot be imported or has no family.
    """
    module, _, name = path.partition(":")
    try:
        family = getattr(importlib.import_module(module), name).family
    except (ImportError, AttributeError) as error:
        raise ValueError(
            "A part must be a class that can be imported, derived from the base class of its "
            f"family: {path!r} gives {error!r}. Correct the path, or put its folder on PYTHONPATH."
        ) from error
    return str(family)


def literal(text: str) -> Any:
    """The value of a Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
