"""Code shared by all commands: flags, help, one-line errors for users, several processes.

A command is a module with `define_flags()`, `main()`, and `command = Command(main, define_flags)`.
Imports that take seconds (JAX, and modules that use it) are in `main`, so that --help and errors in
flags appear at once.
"""

import argparse
import dataclasses
import difflib
import logging
import math
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging

from moe_jax import interrupts
from moe_jax.command_help import help_text, leave_stdout, print_help
from moe_jax.config import MeshConfig, parse_mesh
from moe_jax.config.environment import check_environment, order_collectives
from moe_jax.config.file import config_with, settings_of, split_overrides
from moe_jax.config.installed import install_command, require_local
from moe_jax.user_errors import FIX_PERMISSIONS, USER_ERRORS, describe, is_transient, whole_flags

# The exit code if another process was lost, or its disk for a moment: launchers restart all.
LOST = 75
HELP = ("--help", "-help", "-h", "--helpshort")
TEXT_FLAGS = ("prompt", "stop")  # flags with text, in which "://" does not mean a path


class Parser(argparse.ArgumentParser):
    """For a command with positional arguments: an error is one line, with exit code 1."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(1, f"error: {message}. --help lists the arguments.\n")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: called with arguments, it runs and returns the exit code.

    Attributes:
      main: does the work, and may return an exit code. An exception in `USER_ERRORS` ends the
        process with its message and exit code 1.
      define_flags: defines the flags of the command, in `absl.flags.FLAGS`.
      required: the flags that must be given.
      positional: name of positional arguments, one or more, such as "RUN"; `main` gets their list.
        "": there are none.
      gets_arguments: whether `main` gets the arguments as they were given.
      uses_devices: whether it computes on the devices of the process.
      several_processes: whether the command can run in several processes; defines their flags.
      saves_on_sigterm: whether several processes agree on what to do on SIGTERM; see
        `processes.start`.
    """

    main: Callable[..., int | None]
    define_flags: Callable[[], None]
    required: Sequence[str] = ()
    positional: str = ""
    gets_arguments: bool = False
    uses_devices: bool = True
    several_processes: bool = False
    saves_on_sigterm: bool = False

    def __call__(self, arguments: Sequence[str]) -> int:
        """Parses the flags and runs the command; ends the process if that fails."""
        before = set(flags.FLAGS)
        self.define_flags()
        if self.several_processes:
            define_process_flags()
        own = [name for name in flags.FLAGS if name not in before]
        try:
            with interrupts.ending_at_once():
                return self.answer(arguments, own)
        finally:
            for name in own:
                delattr(flags.FLAGS, name)

    def answer(self, arguments: Sequence[str], own: Sequence[str]) -> int:
        """Prints help, or parses the flags and runs; `own` are the command's flags."""
        if set(arguments) & set(HELP):
            return print_help(help_text(self, own, arguments))
        if "--helpfull" in arguments:
            return print_help(flags.FLAGS.get_help())
        try:
            check_environment(os.environ)  # before a config file imports JAX
            positional = parse(self, arguments, own)
            inputs = [positional] if self.positional else [list(arguments)] * self.gets_arguments
            return run(self, *inputs)
        except USER_ERRORS as error:  # in the flags
            fail(error)


def run(command: Command, *inputs: list[str]) -> int:
    """Runs a command whose flags are parsed; see `Command` for what its `main` gets."""
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)
    show_warnings()
    order_collectives(os.environ)
    import jax

    from moe_jax.parallel import processes

    try:
        if command.several_processes:
            start_processes(command.saves_on_sigterm)
        if command.uses_devices:
            check_devices()
            processes.require_joined("--processes=auto" if command.several_processes else "")
        code = command.main(*inputs)
        sys.stdout.flush()
        processes.wait_for_all()
        return code or 0
    except BrokenPipeError:
        leave_stdout()
        return 1
    except USER_ERRORS as error:
        fail(error)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        print(
            f"{traceback.format_exc()}If another process was lost, start all of them again: "
            "a training run goes on from its newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        return LOST
    finally:
        processes.leave()


class _Lines(logging.Formatter):
    """Formats log records like errors: "warning: ..."."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def show_warnings() -> None:
    """Prints log messages of libraries on standard error, unless logging has a handler."""
    if not logging.root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Lines())
        logging.root.addHandler(handler)


def fail(error: Exception) -> NoReturn:
    """Ends the process; prints the reason at once, before it waits for the other processes."""
    import jax

    if absl_logging.get_verbosity() > absl_logging.INFO:  # --verbosity=1
        traceback.print_exception(error)
    given = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    settings = {} if given is None or isinstance(given, str) else settings_of(given)
    text = whole_flags(describe(error), settings)
    saved = interrupts.said_before_end() if isinstance(error, OSError) else ""
    if saved not in text:
        end = f" {saved[0].upper()}{saved[1:]}." if text.endswith(".") else f"; {saved}"
        text += end
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(LOST if jax.distributed.is_initialized() and is_transient(error) else 1)


def check_devices() -> None:
    """Refuses a missing backend, before anything else asks for a device.

    Raises:
      ValueError: with the variable that selects the backend, and how to install it.
    """
    import jax

    try:
        jax.devices()
    except RuntimeError as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        extra = next((name for name in ("tpu", "cuda") if name in wanted), None)
        install = f", or install the backend: {install_command(extra)}" if extra else ""
        raise ValueError(
            f"JAX finds no device: JAX_PLATFORMS={wanted}: {str(error).rstrip('.')}. Unset it, or "
            f"set it to cpu{install}."
        ) from error


def parse(command: Command, arguments: Sequence[str], own: Sequence[str]) -> list[str]:
    """Reads the flags into `flags.FLAGS`, and the config that they name.

    Args:
      command: the command, whose flags are defined.
      arguments: of the command line.
      own: the names of the command's flags.

    Returns:
      The positional arguments.

    Raises:
      ValueError: a flag is unknown (it proposes the nearest name), missing, or has a wrong value.
    """
    values = flags.FLAGS
    arguments = values.read_flags_from_files(list(arguments))
    arguments = [with_underscores(argument, own) for argument in arguments]
    plain, overrides = split_overrides(arguments) if "config" in own else (arguments, [])
    try:
        positional = values(["command", *plain])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, [*own, "help"], n=1)
        fix = f"Did you mean --{near[0]}?" if near else "--help lists the flags."
        raise ValueError(f"there is no flag --{error.flagname}. {fix}") from error
    except flags.Error as error:
        raise ValueError(f"{str(error).rstrip('.')}. Correct it.") from error
    if positional and not command.positional:
        raise ValueError(
            f"flags are written as --NAME=VALUE: unexpected arguments: {positional}. Remove them, "
            "or quote a value that has spaces."
        )
    if command.positional and not positional:
        raise ValueError(f"{command.positional} must be given, one or more: there is none. Add it.")
    empty = [name for name in command.required if values[name].value == ""]
    if empty:
        raise ValueError(f"--{empty[0]} is empty: --{empty[0]}=. Give it a value.")
    missing = [name for name in command.required if values[name].value is None]
    if missing:
        names = ", ".join(f"--{name}" for name in missing)
        what = values[missing[0]].help.partition(";\n")[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"{names} must be given: {what}. See --help.")
    check_values(own)
    if "config" in own and values.config is not None:
        config = config_with(values.config, overrides)
        for name, value in settings_of(config).items():
            if name.startswith("config.data.") and isinstance(value, str):
                require_local(f"--{name}", value)
        values.config = config
    elif overrides:
        raise ValueError(f"--config must be given with --{overrides[0][0]}: it is not. Add it.")
    return list(positional)


def with_underscores(argument: str, own: Sequence[str]) -> str:
    """Rewrites --from-hf=DIR to --from_hf=DIR if that is a flag of the command."""
    name, equals, value = argument.partition("=")
    flag = name.lstrip("-").replace("-", "_")
    return f"--{flag}{equals}{value}" if name.startswith("--") and flag in own else argument


def check_values(own: Sequence[str]) -> None:
    """Refuses NaN, infinity, and URLs in place of paths; expands ~/ to the user's home.

    Raises:
      ValueError: with the name of the flag.
    """
    for name in own:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} is a finite number: --{name}={value}. Correct it.")
        for text in value if isinstance(value, list) else [value]:
            if text == "" and name not in TEXT_FLAGS and flags.FLAGS[name].default != "":
                raise ValueError(
                    f"--{name} is not empty: --{name}=. Give a value, or leave it out."
                )
            if isinstance(text, str) and name not in TEXT_FLAGS:
                require_local(f"--{name}", text)
        if isinstance(value, str) and value.startswith("~/") and name not in TEXT_FLAGS:
            flags.FLAGS[name].value = os.path.expanduser(value)


def require_folder(flag: str, path: str) -> None:
    """Refuses an output folder that cannot be made or written to, before the work begins.

    Raises:
      ValueError: with the path that prevents it.
    """
    _require_writable(f"--{flag} is a folder", f"--{flag}={path}", path)


def require_file(flag: str, path: str, replaces: str | None = None) -> None:
    """Refuses an output file that cannot be written, before the work begins.

    Args:
      flag: name of the flag.
      path: its value.
      replaces: how an earlier output of the command begins, a regular expression. No other file is
        replaced. "": none is. None: the command itself decides.

    Raises:
      ValueError: with the path that prevents it.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        raise ValueError(f"--{flag} is a file: --{flag}={path} is a folder. Name a file in it.")
    if replaces is not None and file.exists():
        with file.open("rb") as stream:
            begins = stream.read(10_000).decode(errors="replace")
        if not replaces or not re.match(replaces, begins):
            earlier = " or one that this command wrote" if replaces else ""
            raise ValueError(
                f"--{flag} is a new file{earlier}: --{flag}={path} is another. Name a new one, or "
                "remove it."
            )
    _require_writable(f"--{flag} is a file in a folder", f"--{flag}={path}", os.path.dirname(path))


def _require_writable(rule: str, given: str, folder: str) -> None:
    place = pathlib.Path(folder).absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{rule}: {there} is a file, {given}. Name another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{rule} that can be written: {there} cannot, {given}. {FIX_PERMISSIONS}.")


def define_config_flag() -> None:
    """Defines --config; --config.SECTION.FIELD=VALUE sets a field of it."""
    flags.DEFINE_string(
        "config",
        None,
        "The experiment: FILE, FILE:PRESET,PRESET or RUN/config.json. FILE is looked for from the "
        "current folder, then beside the library. --config.SECTION.FIELD=VALUE changes a setting.",
    )


def define_process_flags() -> None:
    """Defines the flags of `start_processes`."""
    flags.DEFINE_string(
        "processes",
        "1",
        "How many processes run this command together: 1; auto, from SLURM, Open MPI, Cloud TPU, "
        "GKE, Kubernetes or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; or a "
        "number, with --process_id and --coordinator.",
    )
    flags.DEFINE_integer("process_id", None, "Which of --processes=N this is, from 0.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, the same for all.")
    flags.DEFINE_integer(
        "startup_seconds", 300, "How long processes wait for each other to start.", lower_bound=1
    )
    flags.DEFINE_integer(
        "lost_after_seconds",
        60,
        "A process that was silent so long is lost, and the others end.",
        lower_bound=10,
    )


def start_processes(saves_on_sigterm: bool) -> None:
    """Joins the other processes of this command, if its flags name any."""
    from moe_jax.parallel import processes

    values = flags.FLAGS
    processes.start(
        values.processes,
        values.process_id,
        values.coordinator,
        startup_seconds=values.startup_seconds,
        lost_after_seconds=values.lost_after_seconds,
        catch_sigterm=saves_on_sigterm,
    )


def define_trust_flag() -> None:
    """Defines --trust, for runs whose config names parts outside the library."""
    flags.DEFINE_boolean(
        "trust", False,
        "Import the modules that the run's config names for parts of its own: they run code.",
    )  # fmt: skip


def define_step_flag() -> None:
    """Defines --step."""
    flags.DEFINE_integer(
        "step",
        None,
        "Step of a checkpoint that was kept (training.keep_checkpoints, training.keep_every); by "
        "default the newest.",
        lower_bound=0,
    )


def define_mesh_flag() -> None:
    """Defines --mesh, for a trained model; training has config.mesh."""
    flags.DEFINE_string(
        "mesh",
        "",
        "Devices that share the model, whatever mesh it was trained on, such as data=2,fsdp=-1; "
        "by default one device. Several processes need it.",
    )


def mesh_of_flag() -> MeshConfig | None:
    """The mesh in --mesh, or None.

    Raises:
      ValueError: it does not have the form NAME=SIZE,NAME=SIZE, a mesh has no such size, or it is
        missing with several processes.
    """
    import jax

    text = flags.FLAGS.mesh
    if not text:
        if jax.process_count() > 1:
            raise ValueError(
                "Several processes share the model over a mesh of all their devices: --mesh is "
                "not given. Pass --mesh=data=-1, or --mesh=fsdp=-1 for a model too large for one."
            )
        return None
    return parse_mesh(text, "--mesh")
