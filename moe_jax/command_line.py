"""What the commands share: quiet logs, errors of the user as one message, several processes."""

import re
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from moe_jax import interrupts
from moe_jax.config import MeshConfig, build
from moe_jax.parallel import processes
from moe_jax.training.checkpoints import DamagedCheckpointError

# What a user can put right, by another setting, file or directory.
USER_ERRORS = (ValueError, FloatingPointError, MemoryError, OSError, DamagedCheckpointError)
KIND_OF_A_FLAG = "flags set fields, and the kind of a part comes from the config file or a preset"


def run(
    main: Callable[..., None],
    required: Sequence[str],
    *,
    arguments: str = "",
    several_processes: bool = False,
    saves_on_sigterm: bool = False,
) -> None:
    """Runs a command.

    Args:
      main: does the work; one of `USER_ERRORS` ends the process with its message and exit code 1.
      required: the flags that must be given.
      arguments: what stands without a flag, one or more, such as "RUN"; `main` is called with the
        list of them. "": nothing does.
      several_processes: whether the command can be one of several processes; defines their flags.
      saves_on_sigterm: whether several processes agree on what to do on SIGTERM; see
        `processes.start`.
    """

    def checked(argv: list[str]) -> None:
        if len(argv) > 1 and not arguments:
            raise app.UsageError(f"unexpected arguments: {argv[1:]}")
        if arguments and len(argv) == 1:
            fail(f"error: the command works on what it is given: no {arguments}. Pass one or more.")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if several_processes:
                start_processes(saves_on_sigterm)
            main(argv[1:]) if arguments else main()
            processes.wait_for_all()
        except USER_ERRORS as error:
            saved = interrupts.said_before_end() if isinstance(error, OSError) else ""
            known = not saved or saved in str(error)
            fail(f"error: {error}" if known else f"error: {error}; {saved}")
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            fail(
                f"{traceback.format_exc()}If another process was lost, start all of them again: "
                "a training run goes on from its newest checkpoint."
            )
        finally:
            processes.leave()

    if several_processes:
        define_process_flags()
    flags.mark_flags_as_required(required)
    with interrupts.ending_at_once():
        app.run(checked, flags_parser=parse)


def fail(message: str) -> None:
    """Ends the process; says why at once, before the other processes are waited for."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(1)


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
    """Joins the other processes of this command, if its flags say that there are any."""
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
    """Defines --trust, for a run whose config names parts outside the library."""
    flags.DEFINE_boolean(
        "trust", False,
        "Import the modules that the run's config names for parts of its own: they run code.",
    )  # fmt: skip


def define_mesh_flag() -> None:
    """Defines --mesh, for a trained model; training has config.mesh."""
    flags.DEFINE_string(
        "mesh",
        "",
        "Devices that share the model, whatever mesh it was trained on, such as data=2,fsdp=-1; "
        "by default one device. Several processes need it.",
    )


def mesh_of_flag() -> MeshConfig | None:
    """What --mesh says, or None.

    Raises:
      ValueError: it is not of the form NAME=SIZE,NAME=SIZE, or a mesh has no such size.
    """
    text = flags.FLAGS.mesh
    if not text:
        if jax.process_count() > 1:
            raise ValueError(
                "Several processes share the model over a mesh of all their devices: --mesh is "
                "not given. Pass --mesh=data=-1, or --mesh=fsdp=-1 for a model too large for one."
            )
        return None
    sizes: dict[str, int] = {"data": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        try:
            sizes[name] = int(size)
        except ValueError as error:
            raise ValueError(
                f"--mesh is NAME=SIZE,NAME=SIZE: got {part!r} in --mesh={text}. Correct it."
            ) from error
    return build(MeshConfig, sizes, "mesh")


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Reads flags; what is wrong with one ends the process with a message and exit code 1."""
    kinds = [arg for arg in argv if re.match(r"--?config\.[\w.]*\bkind\b", arg)]
    if kinds:
        sys.exit(f"error: {KIND_OF_A_FLAG}: {kinds[0]}. Change the config file, or write a preset.")
    try:
        return values(argv)
    except flags.Error as error:
        # Where a config file raised an error, its traceback is in between.
        lines = str(error).splitlines()
        message = " ".join([lines[0], *lines[1:][-1:]])
        if "as a ConfigDict:" in message:
            message = f"{KIND_OF_A_FLAG}: {message}"
        sys.exit(f"error: {message}")
    except (AttributeError, KeyError) as error:  # --config.FIELD or --config.SECTION.FIELD
        sys.exit(f"error: unknown setting in --config or --config.FIELD: {unknown_name(error)}")
    except ValueError as error:  # a field of a part that is None
        sys.exit(f"error: {KIND_OF_A_FLAG}: {error}")


def unknown_name(error: Exception) -> str:
    """The name that a `ConfigDict` does not have, and the nearest that it has."""
    found = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', str(error))
    return f"{found[2]!r}. Did you mean {found[1]!r}?" if found else str(error)
