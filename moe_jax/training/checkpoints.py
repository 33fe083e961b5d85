"""Checkpoints that survive a kill: written whole or not at all, and checked before they are used.

A checkpoint is the directory `<directory>/<step>/`. Orbax writes it in the background under a
temporary name and renames it when it is complete, so earlier checkpoints survive a kill. A flipped
bit on a disk, or a file truncated by a power failure, can restore without an error. Each checkpoint
therefore contains `manifest.json`, the size and SHA-256 of its files, written just before the
rename. A checkpoint that does not match it is not used.

    <directory>/<step>/state/           the arrays, as Orbax writes them
    <directory>/<step>/metadata.json    optional data of the caller, such as the config
    <directory>/<step>/manifest.json    size and SHA-256 of all of these
"""

import contextlib
import errno
import json
import logging
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from moe_jax import interrupts
from moe_jax.files import write_synced
from moe_jax.parallel.processes import all_or_none, of_first
from moe_jax.training.arrays import (
    by_name,
    describe,
    describe_saved,
    differences,
    read_arrays,
    require_shardings,
    some,
)
from moe_jax.training.files import (
    METADATA,
    STATE,
    DamagedCheckpointError,
    complete_steps,
    damage,
    metadata_of,
    path_of_whole,
    set_aside,
    write_hashes,
    write_manifest,
)
from moe_jax.training.orbax_messages import (
    no_warning_of_reading,
    not_a_traceback_of_orbax,
    reason_of,
)

logger = logging.getLogger(__name__)

NO_STEP = -1
ALL_DAMAGED = -2
TEMPORARY = ".orbax-checkpoint-tmp"  # suffix of a directory that Orbax is writing
# How long processes wait for the slowest to write and hash its share of a checkpoint. A lost
# process ends the others sooner, see `parallel.processes`.
TIMEOUT_SECONDS = 6 * 3600


class Checkpoints:
    """The checkpoints of one run, by step.

    A checkpoint saves a pytree of `jax.Array`s: parameters, optimizer state, router biases, the
    step and the data of random keys (`jax.random.key_data`, uint32). The data pipeline is a
    function of the step, so the step also determines where the data continues.

    All processes of a run make the same calls in the same order, on a file system they share.

    Args:
      directory: where the checkpoints are; made if absent. Unfinished checkpoints of a killed
        process are removed.
      keep: number of newest checkpoints to keep, at least 1. Older ones are deleted after a newer
        one is complete; quarantined ones (`damaged-<step>`) are never deleted. None: only read, and
        leave the directory unchanged, since a run may be writing a checkpoint.
      keep_every: checkpoints at multiples of this many steps are never deleted; 0: off.
      gigabytes_in_flight: limit of what is copied at once between arrays and files, at least the
        largest array; less saves memory, more is faster.

    Raises:
      ValueError: `keep` is less than 1.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        keep: int | None,
        *,
        keep_every: int = 0,
        gigabytes_in_flight: int = 96,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"a run must keep at least 1 checkpoint: keep={keep}. Raise keep.")
        self.directory = pathlib.Path(directory).resolve()
        self._read_only = keep is None
        self._gigabytes_in_flight = gigabytes_in_flight
        self._saving: int | None = None
        self._newest: int | None = None  # or NO_STEP; None: not yet known
        self._failed = False
        self._failed_here = False  # in this process, perhaps not in the others
        absl_logging.get_absl_logger().addFilter(not_a_traceback_of_orbax)
        if not self._read_only:
            interrupts.say_before_end(self.last_good_after_save)
        self._metadata: str | None = None
        with no_warning_of_reading() if self._read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    STATE: ocp.StandardCheckpointHandler(
                        save_concurrent_gb=gigabytes_in_flight,
                        restore_concurrent_gb=gigabytes_in_flight,
                    )
                },
                options=ocp.CheckpointManagerOptions(
                    read_only=self._read_only,
                    create=not self._read_only,
                    max_to_keep=keep,
                    keep_period=keep_every or None,
                    cleanup_tmp_directories=not self._read_only,
                    lightweight_initialize=True,
                    # Orbax runs this when all files are written, before the rename that publishes.
                    async_options=ocp.AsyncOptions(
                        timeout_secs=TIMEOUT_SECONDS,
                        barrier_sync_fn=self._meet,
                        post_finalization_callback=self._add_manifest,
                        # In the background, a directory that cannot be made leaves threads that
                        # wait for it and keep the process alive for minutes.
                        create_directories_asynchronously=False,
                    ),
                ),
            )
        # Orbax asks in its own thread, after training has moved on. That would set back JAX's count
        # of steps, by which processes agree where a signal stops them (`SignalFlag`).
        vars(self._manager)["reached_preemption"] = lambda step: False

    @property
    def latest_step(self) -> int | None:
        """The newest step whose checkpoint is complete on disk, unchecked; None if there is none.

        A save that is still running does not count: call `wait` first to include it.
        """
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """See `complete_steps`."""
        return complete_steps(self.directory)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> bool:
        """Writes a checkpoint in the background; not allowed when only reading.

        The arrays are copied before this returns, so the next step may donate them. It first waits
        for a save that is still running, and raises its error if it failed.

        Args:
          step: the number of finished training steps.
          state: a pytree of `jax.Array`s.
          metadata: JSON-compatible data to keep with the state, such as the run's config. It is
            published with the state and covered by the manifest.
          wait: whether to wait until the checkpoint is complete on disk.

        Returns:
          False if this step already has a checkpoint: it is kept, and nothing is written.

        Raises:
          ValueError: there is a checkpoint of a later step.
          TypeError: JSON cannot hold the metadata.
          OSError: this save or the previous one cannot be written, such as on a full disk, or the
            directory was removed. Checkpoints that were complete stay whole.
        """
        assert not self._read_only, "opened for reading"
        self.wait()
        # Remembered, not listed: on a network file system, processes may see different listings.
        if self._newest is None:
            self._newest = of_first(max(self.steps(), default=NO_STEP))
        if self._newest > step:
            raise ValueError(
                f"checkpoints must be saved in the order of their steps: step {step}, but "
                f"{self.directory} has step {self._newest}. Restore it first, or use another "
                "directory."
            )
        if self._newest == step:
            return False
        self._metadata = None if metadata is None else json.dumps(dict(metadata), indent=1) + "\n"
        self._saving = step
        with self._or_say_last_good():
            if not self.directory.is_dir():  # Orbax would recreate it
                raise FileNotFoundError(errno.ENOENT, "the directory was removed or renamed")
            self._manager.save(
                step, args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)}), force=True
            )
        self._newest = step
        if wait:
            self.wait()
        return True

    def has(self, step: int, name: str) -> bool:
        """Whether the saved state has arrays under a name, such as "opt_state"."""
        return any(one.startswith(f"{name}/") for one in self.arrays(step))

    def arrays(self, step: int) -> dict[str, str]:
        """See `describe_saved`."""
        return describe_saved(self.directory / str(step) / STATE)

    def metadata(self, step: int) -> dict[str, Any]:
        """See `metadata_of`."""
        return metadata_of(self.directory, step)

    def whole(self, step: int | None) -> int | None:
        """`step`, or the newest whole one; None if there is no checkpoint.

        Raises:
          DamagedCheckpointError, ValueError: see `newest_whole` and `require_whole`.
        """
        if step is None or not self.steps():
            return self.newest_whole()
        self.require_whole(step)
        return step

    def newest_whole(self) -> int | None:
        """The newest step whose checkpoint is whole, or None; process 0 reads every file.

        Newer damaged checkpoints cause a warning. Unless only reading, they are renamed to
        `damaged-<step>`, so that training can save their steps again.

        Raises:
          DamagedCheckpointError: there are checkpoints and all are damaged. They stay in place, so
            that a restart does not silently begin from step 0.
        """
        self.wait()
        step = of_first(self._set_damaged_aside() if jax.process_index() == 0 else NO_STEP)
        self._manager.reload()
        if step == ALL_DAMAGED:
            raise DamagedCheckpointError(
                "a checkpoint can be used only if it matches its manifest: all are damaged in "
                f"{self.directory}: {', '.join(map(str, self.steps()))}. Bring back a copy of one, "
                + ("or use another run." if self._read_only else "or move them away to start anew.")
            )
        self._newest = step
        return None if step == NO_STEP else step

    def require_whole(self, step: int) -> None:
        """Refuses a missing or damaged checkpoint; process 0 reads every file.

        Raises:
          DamagedCheckpointError: it does not match its manifest.
          ValueError: there is no checkpoint of this step; or process 0 refused it.
        """
        with all_or_none():
            if jax.process_index() == 0:
                path_of_whole(self.directory, step)
        self._manager.reload()

    def restore(self, step: int, abstract_state: Any, *, some_of: str = "") -> Any:
        """Restores the checkpoint of a step; all processes call this together.

        Args:
          step: step of a checkpoint that `newest_whole` or `require_whole` found whole.
          abstract_state: a pytree of `jax.ShapeDtypeStruct`s with shardings, shaped like the state
            that was saved. The shardings may differ from those of the run that saved it: the
            arrays are read straight into these.
          some_of: a subtree, such as "opt_state", whose arrays `abstract_state` may lack; those are
            not read.

        Returns:
          The state, bit for bit as saved.

        Raises:
          ValueError: a sharding is missing, or the checkpoint's arrays differ from those requested.
        """
        require_shardings(abstract_state)
        saved, wanted = self.arrays(step), by_name(abstract_state)
        unread = {n for n in saved.keys() - wanted if some_of and n.startswith(f"{some_of}/")}
        self._require_same_arrays(step, abstract_state, unread)
        if unread:
            found = self.restore_some(step, wanted)
            return jax.tree.unflatten(jax.tree.structure(abstract_state), found.values())
        args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract_state)})
        return self._manager.restore(step, args=args)[STATE]

    def wait(self) -> None:
        """Waits until no save is running.

        Raises:
          OSError: the save failed; see `save`.
        """
        if not self._failed:
            with self._or_say_last_good():
                self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises the error of a failed background save; does not wait for a running one.

        Raises:
          OSError: see `save`.
        """
        if self._failed_here or not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits for a running save and ends the background threads."""
        self.wait()
        if not self._failed:
            self._manager.close()

    @contextlib.contextmanager
    def _or_say_last_good(self) -> Iterator[None]:
        """Turns any error of a save into one line that names the last good step, raised once."""
        try:
            yield
        except Exception as error:
            self._failed, self._newest = True, None
            raise OSError(
                f"The checkpoint of step {self._saving} cannot be written to {self.directory}: "
                f"{reason_of(error)}; {self.last_good}. Put that right, then start again: the run "
                "goes on from there."
            ) from error

    def last_good_after_save(self) -> str:
        """`last_good`, after waiting for a running save: the process is about to end."""
        with contextlib.suppress(OSError):
            self.wait()
        return self.last_good

    @property
    def last_good(self) -> str:
        """The step that a run can resume from, for a message."""
        step = self.latest_step
        return "no checkpoint is complete" if step is None else f"last good step: {step}"

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _add_manifest(self) -> None:
        """Writes metadata and manifest into the checkpoint that is about to be published."""
        if jax.process_index() != 0:
            return
        path = self._being_saved()
        if self._metadata is not None:
            write_synced(path / METADATA, self._metadata)
        write_manifest(path, jax.process_count())

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits at an Orbax barrier; hashes this process's files before that of written arrays.

        A process whose own save failed does not wait: the others stand at an earlier barrier. Its
        `check` raises the error, its end ends the others (`parallel.processes`).
        """
        error = sys.exception()  # in Orbax's thread, which would now say that it is done
        if error is not None and threading.current_thread() is not threading.main_thread():
            self._failed_here = True
            raise error
        if "async_write_complete" in key:
            with contextlib.suppress(OSError):  # process 0 then reads these files
                path = self._being_saved()
                write_hashes(path, path / f"{STATE}{TEMPORARY}", jax.process_index())
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _being_saved(self) -> pathlib.Path:
        return self.directory / f"{self._saving}{TEMPORARY}"

    def _set_damaged_aside(self) -> int:
        damaged: list[pathlib.Path] = []
        steps = self.steps()
        for step in reversed(steps):
            path = self.directory / str(step)
            reason = damage(path)
            if reason is None:
                # Only now that a whole checkpoint is found.
                if not self._read_only:
                    for other in damaged:
                        name = set_aside(other)
                        logger.warning("Damaged checkpoint %s is kept as %s.", other, name)
                return step
            # A run deletes old checkpoints, but only after it has written a newer one.
            if self._read_only and max(self.steps(), default=NO_STEP) > steps[-1]:
                return self._set_damaged_aside()
            logger.warning("Checkpoint %s is damaged and not used: %s.", path, reason)
            damaged.append(path)
        return ALL_DAMAGED if damaged else NO_STEP

    def _require_same_arrays(self, step: int, abstract_state: Any, unread: set[str]) -> None:
        saved = {name: text for name, text in self.arrays(step).items() if name not in unread}
        lines = differences(saved, describe(abstract_state))
        if lines:
            raise ValueError(
                "a checkpoint can be restored only into a state of the same arrays: "
                f"{self.directory / str(step)} differs in {some(lines)}. Use the config it was "
                "saved with, or another directory."
            )

    def restore_some(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Reads some arrays of a checkpoint, by name, straight onto their devices.

        Args:
          step: step of a whole checkpoint.
          wanted: shape, dtype and sharding of existing arrays; floats may change their dtype.
        """
        tree = self._manager.item_metadata(step)[STATE].tree
        path = self.directory / str(step) / STATE
        return read_arrays(path, tree, wanted, self._gigabytes_in_flight)
