"""The directory of a run: one config, one run at a time."""

import contextlib
import fcntl
import json
import pathlib
import re
import secrets
import socket
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.config import ExperimentConfig, difference, read_config, to_dict, write_config
from moe_jax.config.convert import check_format
from moe_jax.parallel.processes import all_or_none, gather
from moe_jax.training.metrics import CONFIG_FILE

LOCK_FILE = ".lock"
# What does not change the results of a run, and so may change while it goes on.
PLACEMENT = re.compile(
    r"config\.mesh\.|config\.model\.parts\.[^:]+\.(run_experts|exchange|exchange_chunks):"
)


def check_workdir(config: ExperimentConfig, workdir: pathlib.Path) -> None:
    """Refuses a directory that holds a run of another config.

    Configs are compared as objects: a setting that did not exist when the run was started is at its
    default.

    Raises:
      ValueError: with every setting that differs; or the config is of an older layout.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    check_format(written, str(path))
    given = write_config(config)["sources"]
    lines = changed_sources(written.get("sources", {}), given)
    if not lines:
        # No module is imported that the given config does not name itself.
        old = read_config(written, ExperimentConfig, trust=frozenset(given))
        lines = difference(to_dict(old), to_dict(config))
        lines = [line for line in lines if not PLACEMENT.match(line)]
    if lines:
        raise ValueError(
            "A workdir holds one run, of one config: "
            f"{workdir} was started with another (old -> new):\n  "
            + "\n  ".join(lines)
            + "\nUse another --workdir, or the config that it was started with."
        )


def changed_sources(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each kind outside the library that changed, came or went."""
    return [
        f"source of {kind}: {old.get(kind, 'not there')} -> {new.get(kind, 'not there')}"
        for kind in sorted({*old, *new})
        if old.get(kind) != new.get(kind)
    ]


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the directory for this run; the system lets go of it when the process ends, however.

    Raises:
      ValueError: another run holds it, or the processes of this one do not see one directory.
    """
    with contextlib.ExitStack() as held:
        with all_or_none():
            if jax.process_index() == 0:
                held.enter_context(_lock(workdir))
        require_shared(workdir)
        yield


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"A workdir is written by one run at a time: another process trains in {workdir}. "
                "Use another --workdir, or wait for that run or stop it."
            ) from error
        yield


def require_shared(workdir: pathlib.Path) -> None:
    """Refuses a workdir that is another directory on another process's machine.

    Raises:
      ValueError: naming the process that does not see what process 0 has written.
    """
    if jax.process_count() == 1:
        return
    sign = gather(secrets.token_hex(8))[0]
    path = workdir / f".seen_by_all_{sign}"
    if jax.process_index() == 0:
        path.touch()
    gather("")
    seen = path.exists()
    gather("")
    if jax.process_index() == 0:
        path.unlink()
    with all_or_none():
        if not seen:
            raise ValueError(
                "All processes of a run write to one workdir: what process 0 wrote to it is not "
                f"in {workdir} of {socket.gethostname()}. Pass a --workdir on a file system that "
                "all machines share."
            )
