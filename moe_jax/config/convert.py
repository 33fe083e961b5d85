"""Converts `ml_collections.ConfigDict`, the user's interface, to frozen objects and back.

A section of one kind is a dict of its fields. A part is a dict of its fields and its "kind"; a part
with default fields may be just the kind, as a string. Several parts of one family are a dict by
name; the name is the kind unless "kind" is given.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from moe_jax.config.check import require
from moe_jax.config.kinds import by_kind, is_foreign, kind_of, load_kind, source_hash
from moe_jax.config.settings import Settings
from moe_jax.config.upgrade import FORMAT, upgrade

if TYPE_CHECKING:
    import ml_collections  # needed only to write settings as a ConfigDict

HEADER = ("format", "sources", "content")  # of a written config, in addition to its settings
Config = TypeVar("Config")
Trust = bool | frozenset[str]  # in modules outside the library: all, none, those of these kinds


def config_dict(config: Settings) -> "ml_collections.ConfigDict":
    """A locked `ConfigDict` with every field of an object, nested in the same way, with kinds.

    A field that is None may be set to anything, as by `--config.model.parts.moe.bias=sign`.
    """
    import ml_collections

    return ml_collections.ConfigDict(open_none(to_dict(config))).lock()


def open_none(value: Any) -> Any:
    """Nested dicts in which None is a placeholder for a value of any type."""
    if isinstance(value, Mapping):
        return {name: open_none(item) for name, item in value.items()}
    from ml_collections.config_dict import placeholder

    return placeholder(object) if value is None else value


def to_dict(value: Any, *, only_results: bool = False) -> Any:
    """Plain dicts, tuples and numbers from which `build` makes the same object.

    Args:
      value: an object, or the value of a field.
      only_results: whether to leave out settings that do not change the results of a run.
    """
    if isinstance(value, Settings):
        fields = fields_dict(value, only_results)
        if not value.family:
            return fields
        return {"kind": kind_of(value), **fields} if fields else kind_of(value)
    if isinstance(value, tuple):
        if value and all(is_named_part(item) for item in value):
            named = {name: to_dict(part, only_results=only_results) for name, part in value}
            # A dict loses order and duplicate names; where these matter it stays a tuple of pairs.
            if list(named) == sorted(name for name, _ in value):
                return named
        return tuple(to_dict(item, only_results=only_results) for item in value)
    return value


def fields_dict(value: Settings, only_results: bool = False) -> dict[str, Any]:
    """The fields of an object in the format of `to_dict`; several parts of one family by name."""
    fields: dict[str, Any] = {}
    cls: Any = type(value)
    changes = {
        field.name: field.metadata.get("changes_results", True) for field in dataclasses.fields(cls)
    }
    for name, expected in hints(cls).items():
        item = getattr(value, name)
        if only_results and not changes[name]:
            continue
        if are_parts(expected):
            fields[name] = parts_dict(item, only_results)
        elif isinstance(expected, Ordered):
            fields[name] = tuple(
                (key, to_dict(part, only_results=only_results)) for key, part in item
            )
        else:
            fields[name] = to_dict(item, only_results=only_results)
    return fields


def are_parts(expected: Any) -> bool:
    """Whether a field contains several parts of one family."""
    items = typing.get_args(expected)
    of_tuple = typing.get_origin(expected) is tuple and bool(items)
    return of_tuple and isinstance(items[0], type) and issubclass(items[0], Settings)


def is_named_part(item: Any) -> bool:
    """Whether an item of a tuple is a (name, part) pair."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Settings)


def parts_dict(parts: tuple[Settings, ...], only_results: bool = False) -> dict[str, Any]:
    """Parts of one family, with the names of `by_kind`."""
    return {
        name: {"kind": kind_of(part), **fields_dict(part, only_results)}
        for name, part in by_kind(parts).items()
    }


@dataclasses.dataclass(frozen=True)
class InFamily:
    """The type of a part whose base class `config` may not import; `family` names it."""

    family: str


@dataclasses.dataclass(frozen=True)
class Ordered:
    """The type of (name, part) pairs whose order matters."""

    of: Any


def build(expected: Any, value: Any, path: str, *, trust: Trust = True) -> Any:
    """Makes an object from a user's values.

    Args:
      expected: the type of a field: a subclass of `Settings`, a tuple of them, or a plain type.
      value: the user's value.
      path: of the setting, for messages.
      trust: whether modules outside this library may be imported, or for which kinds.

    Raises:
      ValueError: an unknown field, a value of another type, or settings that break a rule.
    """
    origin, items = typing.get_origin(expected), typing.get_args(expected)
    if isinstance(expected, InFamily):
        if isinstance(value, Settings):
            require(
                value.family == expected.family, f"{path} must be a {expected.family}",
                repr(value), "Pass one",
            )  # fmt: skip
            return value
        return build_settings(expected.family, value, path, trust)
    if isinstance(expected, Ordered):
        require(not isinstance(value, Mapping), f"{path} needs ordered pairs, not a dict",
                repr(value), "Write pairs: (('attention', ...), ('mlp', ...))")  # fmt: skip
        return build(expected.of, value, path, trust=trust)
    if origin in (types.UnionType, typing.Union):
        return build_union(items, value, path, trust)
    if origin is typing.Literal:
        require(value in items, f"{path} is one of {list(items)}", repr(value), "Name one of them")
        return value
    if isinstance(expected, type) and issubclass(expected, Settings):
        if isinstance(value, Settings):
            require(isinstance(value, expected), f"{path} is a {expected.__name__}", repr(value),
                    "Pass one")  # fmt: skip
            return value
        return build_settings(expected.family or expected, value, path, trust)
    if are_parts(expected):
        return build_parts(items[0], value, path, trust)
    if origin is tuple:
        return build_tuple(items, value, path, trust)
    return convert(value, expected, path)


def build_union(items: tuple[Any, ...], value: Any, path: str, trust: Trust) -> Any:
    """Builds the value with the first of several types that accepts it."""
    if value is None and types.NoneType in items:
        return None
    errors = []
    for item in items:
        if item is not types.NoneType:
            try:
                return build(item, value, path, trust=trust)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def build_settings(of: str | type[Settings], value: Any, path: str, trust: Trust) -> Settings:
    """A section of a class, or a part of a family with the kind that the value names."""
    if isinstance(value, str) and isinstance(of, str):
        value = {"kind": value}
    require(
        isinstance(value, Mapping), f"{path} must be a section of settings", repr(value),
        "Set its fields",
    )  # fmt: skip
    value = dict(value)
    if isinstance(of, str):
        kind = value.pop("kind", None)
        require(
            isinstance(kind, str), f"{path} must name its kind", f"kind={kind!r}", "Set the kind"
        )
        trusted = trust if isinstance(trust, bool) else kind in trust
        require(
            trusted or not is_foreign(kind),
            f"{path} is of a kind outside this library, whose module runs when it is imported",
            f"kind={kind!r}",
            "Pass --trust if you know where this config comes from",
        )
        cls = with_path(load_kind, path)(of, kind)
    else:
        cls = of
    types_, arguments = hints(cls), {}
    for name, item in value.items():
        if name not in types_:
            refuse_field(path, name, types_)
        arguments[name] = build(types_[name], item, f"{path}.{name}", trust=trust)
    return with_path(cls, path)(**arguments)


def with_path(function: Any, path: str) -> Any:
    """The function, with the path of the setting in front of its `ValueError`."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    return checked


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """The type of every field; `InFamily` or `Ordered` where a type cannot express it."""
    types_ = typing.get_type_hints(cls)

    def hint(field: Any) -> Any:
        if "family" in field.metadata:
            return InFamily(field.metadata["family"])
        return Ordered(types_[field.name]) if "ordered" in field.metadata else types_[field.name]

    return {field.name: hint(field) for field in dataclasses.fields(cls)}


def build_parts(cls: type[Settings], value: Any, path: str, trust: Trust) -> tuple[Any, ...]:
    """Parts of one family, from a dict by name (in order of the names) or from a sequence."""
    if not isinstance(value, Mapping):
        require(
            isinstance(value, list | tuple), f"{path} must have parts by name", repr(value),
            "Pass a dict of parts",
        )  # fmt: skip
        return tuple(
            build(cls, item, f"{path}[{index}]", trust=trust) for index, item in enumerate(value)
        )
    parts = []
    for name in sorted(value):
        item = value[name]
        if isinstance(item, Mapping) and "kind" not in item:
            item = {"kind": name, **item}
        parts.append(build(cls, item, f"{path}.{name}", trust=trust))
    return tuple(parts)


def build_tuple(items: tuple[Any, ...], value: Any, path: str, trust: Trust) -> tuple[Any, ...]:
    """A tuple, or (name, value) pairs from a dict by name."""
    pairs = items[-1] is Ellipsis and typing.get_origin(items[0]) is tuple
    if pairs and isinstance(value, Mapping):
        value = sorted(value.items())
        inner = typing.get_args(items[0])[1]
        return tuple(
            (name, build(inner, item, f"{path}.{name}", trust=trust)) for name, item in value
        )
    require(isinstance(value, list | tuple), f"{path} must be a tuple", repr(value), "Pass a tuple")
    inner_types = [items[0]] * len(value) if items[-1] is Ellipsis else list(items)
    require(
        len(inner_types) == len(value), f"{path} must have {len(inner_types)} items", repr(value),
        "Correct it",
    )  # fmt: skip
    return tuple(
        build(t, v, f"{path}[{i}]", trust=trust)
        for i, (v, t) in enumerate(zip(value, inner_types, strict=True))
    )


def refuse_field(path: str, name: str, fields: Iterable[str]) -> NoReturn:
    """Raises `ValueError` for an unknown field of a section; it proposes the nearest name."""
    near = difflib.get_close_matches(name, fields, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else "Remove the field."
    raise ValueError(f"{path} has the fields {sorted(fields)}: {path}.{name}. {fix}")


def convert(value: Any, expected: Any, path: str) -> Any:
    """Checks a value against a plain type; converts integers to floats where needed."""
    if expected is Any:
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(
        type(value) is expected,
        f"{path} is of type {expected.__name__}",
        f"{value!r} of type {type(value).__name__}",
        f"Pass a {expected.__name__}",
    )
    return value


def foreign_kinds(value: Any) -> set[str]:
    """The kinds outside this library that an object uses."""
    if isinstance(value, Settings):
        own = {kind_of(value)} if value.family else set()
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        return {kind for kind in own if is_foreign(kind)}.union(*map(foreign_kinds, fields))
    if isinstance(value, tuple):
        return set().union(*map(foreign_kinds, value))
    return set()


def write_config(config: Settings, content: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The content of `config.json`: settings, format, and hashes of what the settings name.

    Args:
      config: the settings.
      content: sha256 of the content at paths in the settings, such as {"corpus": "01ab..."};
        the sources of foreign kinds are added.
    """
    sources = {kind: source_hash(kind) for kind in sorted(foreign_kinds(config))}
    header = {"format": FORMAT, "sources": sources, "content": dict(content or {})}
    return {**header, **to_dict(config)}


def read_config(written: Mapping[str, Any], cls: type[Config], *, trust: Trust = False) -> Config:
    """The object that `write_config` wrote, in this or an earlier release with parts.

    Args:
      written: the content of a `config.json`.
      cls: class of the object.
      trust: whether modules outside this library may be imported, or for which kinds.

    Raises:
      ValueError: it has the layout before parts, or names a foreign kind without trust.
    """
    values = {name: value for name, value in upgrade(written).items() if name not in HEADER}
    return build(cls, values, "config", trust=trust)


def branches_by_name(value: Any) -> Any:
    """(Name, section) pairs as a dict if names are unique; any other value unchanged."""
    if not isinstance(value, tuple):
        return value
    is_pair = (isinstance(one, tuple) and len(one) == 2 for one in value)
    if not all(is_pair) or not all(isinstance(section, Mapping) for _, section in value):
        return value
    return dict(value) if len(dict(value)) == len(value) else value


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "config") -> list[str]:
    """One line per setting in which two (nested) configs differ: "path: old -> new"."""
    lines = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        sections = branches_by_name(a), branches_by_name(b)
        are_sections = all(isinstance(section, Mapping) for section in sections)
        if are_sections and (isinstance(a, Mapping) or list(sections[0]) == list(sections[1])):
            lines += difference(*sections, f"{path}.{name}")
        elif a != b:
            lines.append(f"{path}.{name}: {a!r} -> {b!r}")
    return lines
