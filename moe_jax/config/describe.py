"""Lists every setting of a config with its value and its comment in the source of its class."""

import ast
import dataclasses
import functools
import inspect
import io
import shlex
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_jax.config.convert import are_parts, hints, is_named_part, to_dict
from moe_jax.config.kinds import KINDS, by_kind, load_kind
from moe_jax.config.settings import Settings


class Setting(NamedTuple):
    """An entry of the list of settings: a setting or a section.

    Attributes:
      path: such as "config.training.num_steps".
      value: in the form of a flag or a config file; None for a section.
      comment: describes the setting; for a section, the first line of its class docstring.
    """

    path: str
    value: str | None
    comment: str


@functools.cache
def comments_of(cls: type[Settings]) -> dict[str, str]:
    """The comment on each field of a class, inherited fields included; "" without one."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= {name: text or comments.get(name, "") for name, text in written_in(base)}
    return {
        field.name: comments.get(field.name) or choices_of(field)
        for field in dataclasses.fields(cls)
    }


def choices_of(field: dataclasses.Field[Any]) -> str:
    """The choices of a field without a comment; "" if it has none."""
    bounds = field.metadata.get("bounds")
    return f"one of {', '.join(map(str, bounds.choices))}" if bounds and bounds.choices else ""


def written_in(cls: type) -> Iterator[tuple[str, str]]:
    """The fields in the source of a class, each with the comment beside it or else above it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # made at run time
        return
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    beside = {token.start[0]: token.string.lstrip("# ") for token in comments}
    above = {line: text for line, text in beside.items() if is_alone(source, line)}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = beside.get(node.end_lineno or node.lineno, "").partition("fmt:")[0]
            first = node.lineno
            while first - 1 in above:
                first -= 1
            lines = [above[line] for line in range(first, node.lineno)]
            yield node.target.id, text or " ".join(lines)


def is_alone(source: str, line: int) -> bool:
    """Whether a line, counted from 1, contains only a comment."""
    return source.splitlines()[line - 1].lstrip().startswith("#")


def describe_settings(value: Settings, path: str = "config") -> Iterator[Setting]:
    """Every setting of an object, and of the objects in it, in the order of the source."""
    summary = (type(value).__doc__ or "").strip().partition("\n")[0]
    yield Setting(path, None, summary)
    cls: Any = type(value)
    comments = comments_of(cls)
    sections: list[tuple[str, Settings]] = []
    for name, expected in hints(cls).items():
        item = getattr(value, name)
        inner = parts_in(item, expected)
        written = to_dict(item)
        if isinstance(item, Settings) and not isinstance(written, str):
            sections.append((f"{path}.{name}", item))
        elif inner:
            sections += [(f"{path}.{name}.{key}", part) for key, part in inner]
        else:
            yield Setting(f"{path}.{name}", literal(written), comments[name])
    for where, section in sections:
        yield from describe_settings(section, where)


def parts_in(item: Any, expected: Any) -> list[tuple[str, Settings]]:
    """The parts of a field by name, if it contains several."""
    if are_parts(expected):
        return list(by_kind(item).items())
    is_dict = isinstance(item, tuple) and item and all(is_named_part(one) for one in item)
    return list(item) if is_dict and isinstance(to_dict(item), dict) else []


def literal(value: Any) -> str:
    """A value in the form of a flag."""
    return value if isinstance(value, str) else repr(value)


def settings_text(settings: Iterator[Setting]) -> str:
    """One line per setting, ready to paste: the flag, and its comment after #."""
    lines = []
    for setting in settings:
        if setting.value is None:
            lines.append(f"\n{setting.path}: {setting.comment}")
            continue
        flag = f"  {in_shell(f'--{setting.path}={setting.value}')}"
        lines.append(f"{flag:<58}  # {setting.comment}" if setting.comment else flag)
    return "\n".join(lines)


def in_shell(word: str) -> str:
    """Quotes a word for a shell; prefers double quotes, which are easier to read.

    >>> print(in_shell("--a=1"), in_shell("--a=('b',)"), in_shell("--a=$b"))
    --a=1 "--a=('b',)" '--a=$b'
    """
    quoted = shlex.quote(word)
    return f'"{word}"' if quoted != word and not set(word) & set('"$`\\!') else quoted


def kinds_text() -> str:
    """The kinds of every family, one line per family."""
    width = max(map(len, KINDS))
    return "\n".join(f"  {family:<{width}}  {', '.join(kinds)}" for family, kinds in KINDS.items())


def describe_kind(family: str, kind: str) -> str:
    """The fields of a kind with their types, defaults and comments."""
    cls: Any = load_kind(family, kind)
    comments = comments_of(cls)
    lines = [f"{family}.{kind}: {(cls.__doc__ or '').strip().partition(chr(10))[0]}"]
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING:
            default = None if field.default_factory is dataclasses.MISSING else (
                field.default_factory()
            )  # fmt: skip
        flag = f"  --{field.name}={literal(to_dict(default))}"
        lines.append(f"{flag:<58}  # {comments[field.name]}" if comments[field.name] else flag)
    return "\n".join(lines)
