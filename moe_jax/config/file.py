"""Finds and runs config files, and applies flags of the form --config.SECTION.FIELD=VALUE.

A config file is Python with a function `get_config()`, or `get_config(presets)`, that returns a
`ml_collections.ConfigDict`. It runs with the rights of the user. The `config.json` of a run can
replace it.
"""

import ast
import contextlib
import difflib
import inspect
import json
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import ml_collections

from moe_jax.config.check import require
from moe_jax.config.convert import InFamily, build, config_dict, hints, read_config, to_dict
from moe_jax.config.installed import home, is_lfs_pointer, require_local
from moe_jax.config.kinds import is_foreign, load_kind
from moe_jax.config.run import ExperimentConfig, InitFrom
from moe_jax.config.settings import Settings

CONFIG = "config"  # the flag
KIND_OF_A_FLAG = "flags set fields, and the kind of a part comes from the config file or a preset"
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
MODULE = "__config_file__"  # while a config file runs
# Fields by the names that other systems give them.
ELSEWHERE = {
    "top_k": "num_selected_experts", "topk": "num_selected_experts",
    "moe_top_k": "num_selected_experts", "num_experts_per_tok": "num_selected_experts",
    "num_local_experts": "num_experts", "n_routed_experts": "num_experts",
    "moe_intermediate_size": "expert_dim", "capacity_factor": "train_factor",
    "num_hidden_layers": "repeats", "num_layers": "repeats", "hidden_size": "model_dim",
    "seq_len": "sequence_length", "max_seq_len": "sequence_length", "lr": "learning_rate",
    "global_batch_size": "batch_size",
}  # fmt: skip


def load_config(name: str) -> ml_collections.ConfigDict:
    """The config of `FILE`, `FILE:PRESET,PRESET` or `RUN/config.json`.

    Raises:
      ValueError: there is no such file, it fails, or it returns no config; with file and line.
      OSError: it cannot be read.
    """
    require_local("--config", name)
    written, colon, presets = name.partition(":")
    path = find_file(written)
    if path.suffix == ".json":
        return recorded_config(path, presets)
    code = compile_file(path)
    # Config files import each other as `configs.NAME`, from whatever folder the command runs in.
    if str(home()) not in sys.path:
        sys.path.append(str(home()))
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    sys.modules[MODULE] = module  # dataclasses look it up
    try:
        with blamed_on(path):
            exec(code, module.__dict__)
            get_config = getattr(module, "get_config", None)
            if not callable(get_config):
                raise ValueError("a config file must define get_config(): it does not. Add it")
            takes_presets = bool(inspect.signature(get_config).parameters)
            if colon and not takes_presets:
                raise ValueError(f"its get_config() takes no presets: {presets!r}. Leave them out")
            config = get_config(presets) if colon else get_config()
            if not isinstance(config, ml_collections.ConfigDict):
                raise ValueError(
                    "get_config() must return a ml_collections.ConfigDict: it returned "
                    f"{type(config).__name__}. Return moe_jax.config.config_dict(...)"
                )
    finally:
        del sys.modules[MODULE]
    return config.lock()


def recorded_config(path: pathlib.Path, presets: str) -> ml_collections.ConfigDict:
    """The config recorded by a run, or with an imported or derived model.

    Raises:
      ValueError: the file is not such a record, names parts outside the library, or presets are
        given.
    """
    with blamed_on(path):
        require(not presets, "a recorded config takes no presets", repr(presets), "Leave them out")
        record = json.loads(path.read_text(encoding="utf-8"))
        require(
            isinstance(record, dict) and "model" in record,
            "a JSON file given as --config must be the config.json of a run",
            f"it has {sorted(record)[:5] if isinstance(record, dict) else type(record).__name__}",
            "Name that of a run, or a Python file",
        )
        require(
            not record.get("sources"),
            "a recorded config may contain only parts of this library",
            f"it names {', '.join(record.get('sources') or ())}",
            "Name the Python file that the run was started with",
        )
        return config_dict(read_config(record, ExperimentConfig)).lock()


def find_file(name: str) -> pathlib.Path:
    """A config file by its path, from the current folder or from the folder of the library's own.

    Raises:
      ValueError: there is none; with the places searched and the library's configs.
    """
    folders = [pathlib.Path.cwd()]
    folders += [home()] if home() != folders[0] else []
    paths = [folder / pathlib.Path(name).expanduser() for folder in folders]
    for path in paths:
        if path.is_file():
            return path
        if path.is_dir():
            raise ValueError(f"--config is a file: {path} is a folder. {ours()}")
    looked = " and ".join(dict.fromkeys(map(str, paths)))
    raise ValueError(f"--config is a file: there is none at {looked}. {ours()}")


def ours() -> str:
    """A sentence that proposes the configs of the library."""
    names = sorted(path.name for path in (home() / "configs").glob("[a-z]*.py"))
    return f"Pass the path of one, such as {', '.join(f'configs/{name}' for name in names)}."


def compile_file(path: pathlib.Path) -> types.CodeType:
    """The compiled code of a config file.

    Raises:
      ValueError: it is not Python; with the line.
    """
    data = path.read_bytes()
    if is_lfs_pointer(data):
        raise ValueError(
            f"{path} is a Git LFS pointer in place of the file. Run `git lfs pull` in its folder."
        )
    if path.suffix != ".py":
        raise ValueError(
            f"--config must be a Python file, *.py, or RUN/config.json: {path} is not. {ours()}"
        )
    with blamed_on(path):
        return compile(data, path, "exec", dont_inherit=True)


@contextlib.contextmanager
def blamed_on(path: pathlib.Path) -> Iterator[None]:
    """Converts any exception of a config file to a one-line ValueError with its file and line.

    Raises:
      ValueError: in place of any `Exception`.
    """
    try:
        yield
    except Exception as error:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        reason = " ".join(message.split()) or "no message"
        if type(error) is not ValueError:
            reason = f"{type(error).__name__}: {reason}"
        if isinstance(error, ImportError):
            reason += ". Install it, or put its folder on PYTHONPATH"
        where = f"{path}{line_of(error, path)}"
        raise ValueError(f"{where}: {reason}{'' if reason.endswith('.') else '.'}") from error


def line_of(error: BaseException, path: pathlib.Path) -> str:
    """The line of a file from which an exception came, as ", line 3"; "" if unknown."""
    if isinstance(error, SyntaxError):
        elsewhere = error.filename if error.filename != str(path) else None
        line = f", line {error.lineno}" if error.lineno else ""
        return f" imports {elsewhere}{line}" if elsewhere else line
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def settings_of(config: Mapping[str, Any], path: str = CONFIG) -> dict[str, Any]:
    """Every setting of a (nested) config by its dotted path, "config.training.num_steps"."""
    settings: dict[str, Any] = {}
    for name in config:
        value = config[name]
        inner = isinstance(value, Mapping | ml_collections.ConfigDict) and len(value) > 0
        settings |= settings_of(value, f"{path}.{name}") if inner else {f"{path}.{name}": value}
    return settings


def configs_in(arguments: Sequence[str]) -> list[str]:
    """The name in each --config=NAME or --config NAME of a command line.

    >>> configs_in(["--config=a.py", "--config.seed=3", "-config", "b.py:x"])
    ['a.py', 'b.py:x']
    """
    matches = [re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL) for word in arguments]
    following = [*arguments[1:], ""]
    return [
        after if match[1] is None else match[1]
        for match, after in zip(matches, following, strict=True)
        if match
    ]


def split_overrides(
    arguments: Sequence[str],
) -> tuple[list[str], list[tuple[str, str | bool]]]:
    """The other arguments, and the settings of the config as (path, text) pairs.

    Raises:
      ValueError: for --noconfig.NAME=VALUE, which is ambiguous.

    >>> split_overrides(["--config=a.py", "--config.seed", "3", "--noconfig.model.scan_layers"])
    (['--config=a.py'], [('config.seed', '3'), ('config.model.scan_layers', False)])
    """
    plain: list[str] = []
    overrides: list[tuple[str, str | bool]] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        found = re.match(r"--?(no)?(config\.[^=]*)(=?)(.*)", argument, re.DOTALL)
        if argument == "--":
            return [*plain, argument, *left], overrides
        if found and found[1] and found[3]:
            raise ValueError(f"--noNAME takes no value: {argument}. Write --{found[2]}=false.")
        if not found:
            plain.append(argument)
        elif found[3] or found[1]:
            overrides.append((found[2], found[4] if found[3] else False))
        elif left and not re.match(r"-+[a-zA-Z]", left[0]):
            overrides.append((found[2], left.pop(0)))
        else:
            overrides.append((found[2], True))
    return plain, overrides


def config_with(
    name: str, overrides: Sequence[tuple[str, str | bool]]
) -> ml_collections.ConfigDict:
    """The config of this name, with the settings of flags; see `load_config` and `override`.

    A recorded config says how its own run began. With a flag for `init_from.path`, its other
    settings of `init_from` are defaults unless flags set them: they are about the old source.

    Args:
      name: such as "FILE:PRESET" or "RUN/config.json".
      overrides: as `split_overrides` returns them.

    Raises:
      ValueError: see `load_config` and `override`.
    """
    config = load_config(name)
    is_recorded = name.partition(":")[0].endswith(".json")
    if is_recorded and any(flag == f"{CONFIG}.init_from.path" for flag, _ in overrides):
        with config.unlocked():
            config.init_from = config_dict(InitFrom())
    for flag, text in overrides:
        override(config, flag, text)
    return config


def override(config: ml_collections.ConfigDict, flag: str, text: str | bool) -> None:
    """Sets a field of a config to the value of a flag.

    Args:
      config: the config, changed in place.
      flag: such as "config.training.num_steps".
      text: the value; a bool for a flag without one, --config.FIELD or --noconfig.FIELD.

    Raises:
      ValueError: there is no such setting (it proposes the nearest), or the value has another type.
    """
    *sections, last = flag.split(".")[1:]
    if "kind" in (*sections, last):
        raise ValueError(f"{KIND_OF_A_FLAG}: --{flag}. Change the config file, or write a preset.")
    section, path = config, CONFIG
    for name in sections:
        require_field(flag, path, section, name, config)
        path = f"{path}.{name}"
        write_out(config, section, name, path)
        section = section[name]
    require_field(flag, path, section, last, config)
    if isinstance(section[last], ml_collections.ConfigDict):
        raise ValueError(
            f"{KIND_OF_A_FLAG}: --{flag}={text} would replace a section, of "
            f"{fields_of(section[last])}. Set one of these, or change the config file."
        )
    wanted = section.get_type(last)
    if text == "None" and wanted in (int, float):
        with section.ignore_type():
            section[last] = None  # `build` refuses it where a number is needed
    else:
        section[last] = parse_value(f"--{flag}", text, wanted)


def write_out(
    config: ml_collections.ConfigDict, section: ml_collections.ConfigDict, name: str, path: str
) -> None:
    """Replaces a section without fields by its default fields, so that a flag can set one.

    It is a part given only by its kind, such as "causal_lm", or an optional section that is None
    and has one kind, such as `model.adapters`.

    Args:
      config: the whole config.
      section: contains it; changed in place.
      name: of its field.
      path: of it, such as "config.data.objective".

    Raises:
      ValueError: there is no such kind.
    """
    expected, value = type_at(config, path), section[name]
    if isinstance(expected, InFamily) and isinstance(value, str):
        part = to_dict(build(expected, value, path))
    elif value is None and (optional := section_in(expected)):
        part = config_dict(optional())
    else:
        return
    with section.unlocked(), section.ignore_type():
        section[name] = part


def type_at(config: ml_collections.ConfigDict, path: str) -> Any:
    """The type of a setting, an `InFamily` if it is a part; None if no class declares it."""
    expected: Any = ExperimentConfig
    section: Any = config
    for name in path.split(".")[1:]:
        if isinstance(expected, InFamily):
            kind = section.get("kind", "")
            expected = None if is_foreign(kind) else load_kind(expected.family, kind)
        is_section = isinstance(expected, type) and issubclass(expected, Settings)
        if not is_section or not isinstance(section, ml_collections.ConfigDict):
            return None
        expected, section = hints(expected).get(name), section.get(name)
    return expected


def section_in(expected: Any) -> type[Settings] | None:
    """The section of a type "section or None"; None for other types."""
    sections = [one for one in get_args(expected) if one is not types.NoneType]
    if len(sections) == 1 and isinstance(sections[0], type) and issubclass(sections[0], Settings):
        return sections[0]
    return None


def require_field(flag: str, path: str, section: Any, name: str, config: Any) -> None:
    """Refuses a flag for a missing field, and proposes the nearest one.

    Args:
      flag: the whole flag.
      path: of the section.
      section: the object at that path.
      name: of the field.
      config: the whole config, since a setting may be in another section.

    Raises:
      ValueError: the section has no such field, or is not a section.
    """
    if not isinstance(section, ml_collections.ConfigDict):
        if section is None or isinstance(section, str):  # a part without fields, or none
            raise ValueError(
                f"{KIND_OF_A_FLAG}: --{path}={section} has no fields, which --{flag} needs. "
                "Change the config file, or write a preset."
            )
        raise ValueError(f"--{path} is one value, {section!r}: --{flag}. Set --{path}.")
    if name in section:
        return
    names, settings = flag.split("."), settings_of(config)
    rest = names[path.count(".") + 2 :]
    defaults = settings_of(config_dict(ExperimentConfig()))
    if flag in defaults and names[1] != "model":  # model defaults apply only to the default kinds
        value = defaults[flag]
        for inner in reversed(rest):
            value = {inner: value}
        raise ValueError(
            f"flags change what the config file sets: it leaves out {path}.{name}, --{flag}. "
            f"Add {path}.{name} = {value!r} to it."
        )
    near = difflib.get_close_matches(name, list(section), n=1)
    field = ELSEWHERE.get(names[-1].lower())
    proposed = [other for other in settings if other.split(".")[-1] == field]
    proposed += [".".join([path, *near, *rest])] if near else []
    proposed += [other for other in settings if other.split(".")[-1] == names[-1]]
    proposed = [other for other in proposed if other in settings] or proposed
    fix = f"Did you mean --{proposed[0]}?" if proposed else "--help lists every setting."
    known = "" if proposed else f", {fields_of(section)}"
    raise ValueError(
        f"there is no setting --{flag}: {name!r} is not a field of {path}{known}. {fix}"
    )


def fields_of(section: ml_collections.ConfigDict) -> str:
    """The names in a section."""
    return str([name for name in section if name != "kind"])


def parse_value(flag: str, text: str | bool, wanted: type) -> Any:
    """The value that a flag gives to a field.

    Args:
      flag: for messages.
      text: the text after "="; a bool for a flag without one.
      wanted: the type of the field; `object` if it is None now and accepts anything.

    Raises:
      ValueError: it cannot be read as that type.
    """
    if isinstance(text, bool):
        if wanted is bool:
            return text
        raise ValueError(f"{flag} is of type {wanted.__name__}: it has no value. Add =VALUE.")
    try:
        if wanted is bool:
            return BOOLEANS[text.lower()]
        if wanted in (int, float, str):
            return wanted(text)
        value = ast.literal_eval(text)
    except (KeyError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        if wanted in (object, types.NoneType):
            return text
        if wanted is tuple and re.fullmatch(r"[a-z_][\w/]*(,[a-z_][\w/]*)*", text):
            return tuple(text.split(","))  # names need no quotes
        raise ValueError(
            f"{flag} is of type {wanted.__name__}: {text!r} is not. {EXAMPLES.get(wanted, '')}"
        ) from error
    if wanted is tuple:
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return value


EXAMPLES = {
    bool: "Write true or false.",
    int: "Write a whole number, such as 16.",
    float: "Write a number, such as 0.1 or 3e-4.",
    tuple: "Write a tuple, such as \"(('prose', 1.0),)\", in quotes that keep the shell off it.",
}
