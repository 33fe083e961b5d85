"""The directory of a run: one config, one run at a time."""

import contextlib
import dataclasses
import fcntl
import pathlib
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import jax

from moe_jax.config import ExperimentConfig, difference, read_config, to_dict, write_config
from moe_jax.config.check import require
from moe_jax.config.upgrade import check_format
from moe_jax.data import with_whole_paths as data_with_whole_paths
from moe_jax.parallel.processes import all_or_none, gather, of_first
from moe_jax.training.arrays import describe_saved
from moe_jax.training.files import (
    CONFIG_FILE,
    METRICS_FILE,
    STATE,
    DamagedCheckpointError,
    DamagedFileError,
    complete_steps,
    metadata_of,
    path_of_whole,
    read_json,
)
from moe_jax.training.optimizers import steps_independent_of_length
from moe_jax.training.step import depends_on_microbatches

LOCK_FILE = ".lock"
LOCK_SECONDS = 10.0  # to wait for a run that has been stopped and saves
# The same on several machines: a network file system frees the lock of a lost one after about 90 s.
LOCK_SECONDS_OF_PROCESSES = 150.0
CHECKPOINTS = "checkpoints"
IMPORTED_FILE = "imported.json"  # of a model that was made, not trained; see `imported`
# Settings that change expert dropout masks, through the placement and order of experts' rows.
PLACES_OF_ROWS = ("run_experts", "grouped_matmul", "exchange", "exchange_chunks")
# A run's config, from `write_config`: in `config.json` and in each checkpoint.
Record = Mapping[str, Any]


def recorded_run(workdir: pathlib.Path, step: int | None = None) -> tuple[Record, str]:
    """The record of the run in a directory, and the path that it was read from.

    A checkpoint contains the record of its run. Without one, `config.json` counts: before the first
    checkpoint, and with checkpoints of earlier releases.

    Args:
      workdir: the run's directory.
      step: step of a checkpoint; None: the newest with whole metadata. Its arrays are not read.

    Returns:
      The record and its path; ({}, "") if there is none.

    Raises:
      DamagedFileError: `config.json` is needed and cannot be read.
      ValueError: `config.json` has an unsupported layout.
    """
    directory, path = workdir / CHECKPOINTS, workdir / CONFIG_FILE
    for one in reversed(complete_steps(directory) if step is None else [step]):
        with contextlib.suppress(DamagedCheckpointError, ValueError):
            if "run" in (metadata := metadata_of(directory, one)):
                return metadata["run"], str(directory / str(one))
            break
    if not path.exists():
        return {}, ""
    record = read_json(path)
    check_format(record, str(path))
    return record, str(path)


def has_steps(workdir: pathlib.Path) -> bool:
    """Whether a directory has trained steps: a checkpoint, damaged or not, or metrics."""
    checkpoints, metrics = workdir / CHECKPOINTS, workdir / METRICS_FILE
    has_checkpoint = checkpoints.is_dir() and any(
        path.name.removeprefix("damaged-").isdecimal() for path in checkpoints.iterdir()
    )
    return has_checkpoint or (metrics.exists() and metrics.stat().st_size > 0)


def check_workdir(
    config: ExperimentConfig, workdir: pathlib.Path, content: Mapping[str, str] | None = None
) -> None:
    """Refuses a directory that holds another run.

    Configs are compared as objects: a setting that is newer than the run has its default. Settings
    that do not change results may differ. With expert dropout, the mesh and the way that experts
    run do change results. `training.num_steps` may rise if no finished step depends on it. A
    directory without trained steps accepts any run.

    Args:
      config: config of the run to start or resume.
      workdir: its directory.
      content: sha256 of its corpus and its tokenizer; paths may differ if these agree.

    Raises:
      ValueError: listing every setting, source and content that differs; or the record has an
        unsupported layout.
    """
    try:
        record, path = recorded_run(workdir)
    except DamagedFileError:
        if has_steps(workdir):
            raise
    if not has_steps(workdir):
        return
    if not record:
        raise ValueError(
            f"a workdir with steps must record its run: there is neither a {CONFIG_FILE} nor a "
            f"checkpoint with a record in {workdir}. Bring back {CONFIG_FILE}, or use another "
            "--workdir."
        )
    require_moments(workdir)
    lines = changes(record, config, content or {})
    if lines:
        raise ValueError(
            f"A workdir can hold only one run: {path} belongs to another (old -> new):\n  "
            + "\n  ".join(lines)
            + "\nUse another --workdir, or what the run was started with."
        )
    check_extension(record, config, workdir)


def require_moments(workdir: pathlib.Path) -> None:
    """Refuses to train in the directory of a made model that has no optimizer state.

    Raises:
      ValueError: naming the setting that starts a run from it.
    """
    directory = (workdir / CHECKPOINTS).resolve()  # Orbax reads no relative path
    steps = complete_steps(directory)
    if not steps or not (workdir / IMPORTED_FILE).exists():
        return
    try:
        newest = path_of_whole(directory, steps[-1], only=f"{STATE}/_METADATA")
        saved = describe_saved(newest / STATE)
    except (OSError, ValueError):
        return  # damage is reported when the whole checkpoint is read
    require(
        any(name.startswith("opt_state/") for name in saved),
        "A run can go on only from a checkpoint with the optimizer's state",
        f"{newest} is of a model that was made without one ({IMPORTED_FILE})",
        f"Use another --workdir and --config.init_from.path={workdir}",
    )


def check_extension(record: Record, config: ExperimentConfig, workdir: pathlib.Path) -> None:
    """Refuses to raise `num_steps` if a finished step depends on it.

    Raises:
      ValueError: naming what depends on the number of steps.
    """
    given, made = config.training.num_steps, complete_steps(workdir / CHECKPOINTS)
    before = record.get("training", {}).get("num_steps", given)
    if given == before or not made:
        return
    alike = {
        f"optimizer.schedule={config.optimizer.schedule!r}": steps_independent_of_length(
            config.optimizer, before
        ),
        **{
            f"the selection bias of {name!r}": part.steps_independent_of_length(before)
            for name, part in config.model.all_parts.items()
        },
    }
    bent = {name: int(last) for name, last in alike.items() if last < made[-1]}
    require(
        not bent,
        "training.num_steps of a run can be raised only where its finished steps do not depend on "
        "it",
        f"{before} -> {given} in {workdir} at step {made[-1]}, but "
        + ", ".join(f"{name} follows num_steps from step {last}" for name, last in bent.items()),
        "Schedules 'constant' and 'rsqrt' can be extended, and 'wsd' before its decay; here, start "
        f"a run in another --workdir with init_from.path={workdir} and "
        "init_from.optimizer_state=True",
    )


def changes(record: Record, config: ExperimentConfig, content: Mapping[str, str]) -> list[str]:
    """One line per difference between a config and the recorded run."""
    given = write_config(config)["sources"]
    lines = changed_hashes("source", record.get("sources", {}), given)
    known = record.get("content", {})
    if known and content:
        lines += changed_hashes("content", known, content)
    if lines:
        return lines
    # Only modules that the given config names are imported.
    old = read_config(record, ExperimentConfig, trust=frozenset(given))
    allowed = {"config.data.corpus", "config.data.tokenizer"} if known and content else set()
    if config.training.num_steps > old.training.num_steps:
        allowed.add("config.training.num_steps")
    new = with_whole_paths(config)
    lines = difference(to_dict(old, only_results=True), to_dict(new, only_results=True))
    lines = [line for line in lines if line.partition(":")[0] not in allowed]
    cut = [line for line in lines if line.startswith("config.training.num_microbatches:")]
    if cut and not depends_on_microbatches(config):
        lines.remove(*cut)
    return lines + changed_masks(old, new)


def changed_masks(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """One line per difference that changes the dropout masks of experts.

    A mask depends on the layout of the experts' rows: the explicit exchange draws one per device,
    and sorted rows draw in their order. Slots that the compiler exchanges are one array on every
    mesh, with one mask.
    """
    parts: Iterable[Any] = new.model.all_parts.values()
    drawing = [part for part in parts if part.routes and part.expert_dropout_rate > 0]
    in_one = all(
        part.run_experts != "auto" and part.exchange == "compiler" and part.exchange_chunks == 1
        for part in drawing
    )
    lines = []
    for line in difference(to_dict(old), to_dict(new)) if drawing else []:
        path = line.partition(":")[0].split(".")
        if (path[1] == "mesh" and not in_one) or path[-1] in PLACES_OF_ROWS:
            lines.append(f"{line} (changes the dropout masks of experts)")
    return lines


def with_whole_paths(config: ExperimentConfig) -> ExperimentConfig:
    """The config with absolute paths, as a run records them."""
    source, training = config.init_from, config.training
    if source.path:
        path = str(pathlib.Path(source.path).expanduser().absolute())
        source = dataclasses.replace(source, path=path)
    return dataclasses.replace(
        config,
        data=data_with_whole_paths(config.data),
        init_from=source,
        training=dataclasses.replace(training, loss=training.loss.with_whole_paths()),
    )


def changed_hashes(
    what: str, old: Mapping[str, str | None], new: Mapping[str, str | None]
) -> list[str]:
    """One line per named hash that was changed, added or removed."""
    return [
        f"{what} of {name}: sha256 {(old.get(name) or 'not there')[:12]} -> "
        f"{(new.get(name) or 'not there')[:12]}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Locks the directory for this run; the system unlocks it however the process ends.

    Raises:
      ValueError: another run holds the lock, or this run's processes do not share the directory.
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
        alone = jax.process_count() == 1
        until = time.monotonic() + (LOCK_SECONDS if alone else LOCK_SECONDS_OF_PROCESSES)
        while not _try_lock(lock):
            require(
                time.monotonic() < until,
                "a workdir can be written by only one run at a time",
                f"another process trains in {workdir}",
                "Use another --workdir, or wait for that run or stop it. On a network file system "
                f"a lost machine may hold {LOCK_FILE} for minutes: try again, or delete it",
            )
            time.sleep(0.1)
        yield


def _try_lock(lock: IO[str]) -> bool:
    """Locks an open file and returns True, or returns False if another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def require_shared(workdir: pathlib.Path) -> None:
    """Refuses a workdir that the processes do not share.

    Raises:
      ValueError: naming the process that does not see what process 0 wrote.
    """
    if jax.process_count() == 1:
        return
    sign = of_first(secrets.token_hex(8))
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
                "All processes of a run must write to one workdir: what process 0 wrote to it is "
                f"not in {workdir} of {socket.gethostname()}. Pass a --workdir on a file system "
                "that all machines share."
            )
