"""The text of a command's --help: its docstring, its flags, and the settings of its config."""

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from moe_jax.config.file import configs_in, load_config

if TYPE_CHECKING:
    from moe_jax.command_line import Command


def print_help(text: str) -> int:
    """Prints help, also into a pipe that `| head` closes early; returns the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        leave_stdout()
    return 0


def leave_stdout() -> None:
    """Drops further output, which nobody reads after `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(command: "Command", own: Sequence[str], arguments: Sequence[str]) -> str:
    """The command's docstring, its flags, and the settings of its config."""
    module = sys.modules[command.main.__module__]
    lines = [(module.__doc__ or "").strip(), "", "Flags:"]
    for name in own:
        flag = flags.FLAGS[name]
        needed = " (needed)" if name in command.required else ""
        default = "" if flag.default in (None, "", [], False) else f"={flag.default}"
        text = f"--{'[no]' if flag.boolean else ''}{name}{default}{needed}: {flag.help}"
        lines.append(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent=" " * 6))
    if "config" in own:
        lines += ["", settings_help(arguments)]
    return "\n".join([*lines, "", "--helpfull lists the flags of the libraries as well."])


def settings_help(arguments: Sequence[str]) -> str:
    """Every setting of the config named in the arguments, or else of the default config."""
    from moe_jax.config import ExperimentConfig, from_config_dict
    from moe_jax.config.describe import describe_settings, settings_text

    named = configs_in(arguments)
    config = from_config_dict(load_config(named[-1])) if named else ExperimentConfig()
    source = f"of {named[-1]}" if named else "and their defaults; --config=FILE --help has a file's"
    return (
        f"Settings {source}:\n{settings_text(describe_settings(config))}\n\n"
        "A part of another kind has other settings. `python -m moe_jax.check_part --help` lists "
        "the kinds, `python -m moe_jax.check_part FAMILY.KIND --help` the settings of one."
    )
