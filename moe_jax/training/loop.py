"""A training run, from a config and a directory to checkpoints, metrics and an evaluation."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig, write_config
from moe_jax.config.installed import require_local
from moe_jax.config.json_text import json_text
from moe_jax.data import Data, check_data, open_data, train_batches
from moe_jax.files import write_atomically
from moe_jax.models.multi_token import own_name
from moe_jax.models.trained import count_trained, describe_trained
from moe_jax.parallel.batches import from_rows, rows_of_process
from moe_jax.parallel.mesh import describe_mesh, make_mesh
from moe_jax.parallel.processes import compile_in_all, of_first, require_same
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.evaluation import evaluate
from moe_jax.training.files import EVALUATION_FILE, complete_steps, read_json
from moe_jax.training.init_from import Source, first_state, open_source
from moe_jax.training.loss import Batch
from moe_jax.training.memory import check_memory, out_of_memory_explained
from moe_jax.training.metrics import MetricWriter, set_results_aside
from moe_jax.training.placement import (
    BATCH_AXES,
    check_run,
    compile_train_step,
    new_state,
    resolved_model,
)
from moe_jax.training.profiling import Profile
from moe_jax.training.progress import Progress
from moe_jax.training.rates import Rates
from moe_jax.training.rows import evaluation_line, evaluation_row, metrics_row
from moe_jax.training.run_record import write_run_record
from moe_jax.training.saved import CHECKPOINTS, restore
from moe_jax.training.signals import Interrupted, SignalFlag
from moe_jax.training.state import TrainState, evaluation_params
from moe_jax.training.step import StepMetrics
from moe_jax.training.trackers import check_trackers, open_trackers
from moe_jax.training.vocabulary import check_vocabulary, warn_of_unused_ids
from moe_jax.training.workdir import check_workdir, only_run, with_whole_paths

FINITE = ("loss", "total_loss", "grad_norm")  # a run stops if one of these metrics is not finite


def train(
    config: ExperimentConfig,
    workdir: str | pathlib.Path,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a model, or resumes the run in `workdir`.

    Args:
      config: the run's config. It alone determines steps, data order, dropout and noise.
      workdir: the run's directory: `config.json`, `run.json`, `metrics.jsonl`, `checkpoints/`,
        `evaluation.json`.
      facts: more to record in `run.json`. With "forward_flops_per_token" {"model"} and
        "peak_flops", of one device, MFU is measured too.

    Returns:
      The last evaluation, as in `evaluation.json`; {} without one.

    Raises:
      ValueError: the workdir holds another run, the vocabulary does not fit, or there is no text to
        train or evaluate on. No new run is begun then.
      FloatingPointError: the loss or the gradient is not finite.
      BufferOverflowError: a buffer with `stop_at_overflow` had no room for some choices.
      Interrupted: by SIGTERM, SIGINT or SIGHUP; the state is saved.
    """
    require_local("workdir", str(workdir))
    workdir = pathlib.Path(workdir)
    require_same("config", write_config(config))
    config = with_whole_paths(config.on_devices(jax.device_count()))
    mesh = make_mesh(config.mesh)
    check_run(config, mesh)
    with jax.set_mesh(mesh):
        resolved_model(config)  # refuses a kernel that cannot do its task
    check_trackers(config.training.trackers)
    check_memory(config, mesh)
    data = open_data(config.data)
    data = dataclasses.replace(data, fingerprints=content_of(config, data))
    require_same("content", dict(data.fingerprints))
    check_vocabulary(config, data.tokenizer)
    check_workdir(config, workdir, data.fingerprints)
    source = source_of(config, workdir, data)
    check_data(data, evaluates=config.training.evaluate_every > 0)
    if jax.process_index() == 0:
        warn_of_unused_ids(config, data.tokenizer)
    keep, keep_every = config.training.keep_checkpoints, config.training.keep_every
    # However this block ends, it waits for a checkpoint that is being written.
    with only_run(workdir), out_of_memory_explained(config, mesh, workdir):
        check_workdir(config, workdir, data.fingerprints)  # another run may have begun meanwhile
        with Checkpoints(workdir / CHECKPOINTS, keep, keep_every=keep_every) as checkpoints:
            return train_in(workdir, config, data, mesh, checkpoints, source, dict(facts or {}))


def content_of(config: ExperimentConfig, data: Data) -> dict[str, str]:
    """Sha256 of all that a run reads: its data, and the files of its training loss."""
    return {**data.fingerprints, **config.training.loss.content(config, data.fingerprints)}


def source_of(config: ExperimentConfig, workdir: pathlib.Path, data: Data) -> Source | None:
    """The checkpoint of another run to start from; None without `init_from`, or on resuming."""
    # Listings of a network file system may differ among processes.
    if not config.init_from.path or of_first(bool(complete_steps(workdir / CHECKPOINTS))):
        return None
    return open_source(config, data.fingerprints)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A run from a start or a resume to its end: its inputs, and where it writes."""

    workdir: pathlib.Path
    config: ExperimentConfig
    data: Data
    mesh: Mesh
    checkpoints: Checkpoints
    writer: MetricWriter
    progress: Progress
    rates: Rates
    signals: SignalFlag
    profile: Profile
    origin: Mapping[str, Any] | None  # the checkpoint that the run started from

    def is_last(self, step: int) -> bool:
        """Whether a step is the last of the run."""
        return step == self.config.training.num_steps

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out split is scored after a step."""
        every = self.config.training.evaluate_every
        return every > 0 and (self.is_last(step) or step % every == 0)

    def save(self, step: int, state: TrainState, *, wait: bool = False) -> None:
        """Saves a checkpoint with the run's record, once per step, after the step's metrics."""
        metadata = {
            "run": write_config(self.config, self.data.fingerprints),
            "metrics": self.writer.state(),
            "init_from": self.origin,
        }
        with self.rates.paused():
            self.checkpoints.save(step, state, metadata=metadata, wait=wait)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Scores held-out batches (all of them after the last step), and writes the results."""
        some = None if self.is_last(step) else self.config.training.evaluation_microbatches or None
        with self.rates.paused(), self.signals.nothing_to_save():
            evaluation = evaluate(
                evaluation_params(state),
                state.model_state,
                self.config,
                self.data,
                mesh=self.mesh,
                max_batches=some,
                step=state.step,
            )
        if self.is_last(step) and jax.process_index() == 0:
            content = {"step": step, **evaluation}
            write_atomically(self.workdir / EVALUATION_FILE, json_text(content, indent=2) + "\n")
        # Written last: this row marks the evaluation as done.
        self.writer.write(step, evaluation_row(evaluation))
        self.progress.print(evaluation_line(step, evaluation))


def train_in(
    workdir: pathlib.Path,
    config: ExperimentConfig,
    data: Data,
    mesh: Mesh,
    checkpoints: Checkpoints,
    source: Source | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Trains in a directory that no other run writes to; see `train`."""
    restored = restore(config, checkpoints, mesh)
    source = source if restored is None else None
    if restored is not None:
        state = restored
    elif source is not None:
        state = first_state(config, mesh, source)
    else:
        state = new_state(config, mesh)
    start = int(state.step)
    saved = checkpoints.metadata(start) if restored is not None else {}
    origin = saved.get("init_from") if source is None else source.record()
    num_steps = config.training.num_steps
    facts["init_from"] = origin
    facts["trained"] = count_trained(config.optimizer, config.model.specs())
    record = write_run_record(
        workdir, config, start_step=start, content=data.fingerprints, facts=facts
    )
    if jax.process_index() == 0:
        print(describe_mesh(mesh), flush=True)
        print(describe_trained(record["trained"]), flush=True)
        if source is not None:
            print(source.describe(), flush=True)
        if restored is not None and start:
            print(f"resuming after step {start} of {num_steps}{extension(saved, num_steps)}")

    on_cpu = record["platform"] == "cpu"
    progress = Progress(
        num_steps, start_step=start, utilization="of matmul peak" if on_cpu else "mfu"
    )
    # CPU devices share the cores, including devices outside the mesh.
    num_devices = jax.device_count() if on_cpu else mesh.size
    flops = facts.get("forward_flops_per_token", {}).get("model", 0.0)
    peak = facts.get("peak_flops")
    rates = Rates(config, 3 * flops, peak and peak * num_devices)
    trackers = open_trackers(config, workdir, start)
    profile = Profile(config.training.profile_steps, workdir)
    last_kept_step = start if restored is not None else 0  # of the rows of metrics
    if restored is None:
        set_results_aside(workdir)
    with MetricWriter(workdir, last_kept_step, saved.get("metrics"), trackers) as writer:
        with progress, SignalFlag(start) as signals, profile:
            session = Session(
                workdir=workdir,
                config=config,
                data=data,
                mesh=mesh,
                checkpoints=checkpoints,
                writer=writer,
                progress=progress,
                rates=rates,
                signals=signals,
                profile=profile,
                origin=origin,
            )
            run_steps(session, state, start)
    path = workdir / EVALUATION_FILE
    return read_json(path) if path.exists() else {}


def run_steps(session: Session, state: TrainState, start: int) -> None:
    """Runs the training steps after `start`.

    A step is saved before it is evaluated. A run that was stopped in between evaluates first when
    it resumes.
    """
    config, training = session.config, session.config.training
    step_function = compile_train_step(config, session.mesh)
    arrays = training.loss.arrays(config, session.mesh)
    batches = global_batches(config, session.data, session.mesh, start)
    pending: tuple[int, StepMetrics] | None = None

    def settle() -> None:
        """Checks, writes and shows the previous step's metrics while the device runs the next."""
        nonlocal pending
        if pending is None:
            return
        (step, metrics), pending = pending, None
        if not_finite(metrics):  # `compare` reads why the run ended
            session.writer.write(step, metrics_row(metrics, config.model.layers_of))
        check_finite(step, metrics, session.checkpoints)
        check_overflow(step, metrics, config, session.checkpoints)
        if step % training.log_every == 0 or step == training.num_steps:
            row = metrics_row(metrics, config.model.layers_of) | session.rates.measure(step)
            session.writer.write(step, row)
            session.progress.update(step, row)
        else:
            session.progress.update(step)

    if start and session.evaluates_after(start) and not is_evaluated(session, start):
        session.evaluate(start, state)
    for step in range(start + 1, training.num_steps + 1):
        session.checkpoints.check()  # steps after a failed save would be lost
        session.profile.before(step, state)
        with jax.set_mesh(session.mesh):
            batch = next(batches)
            if step == start + 1:
                compile_in_all(step_function, state, batch, *arrays)
            state, metrics = step_function(state, batch, *arrays)
        session.profile.after(step, state)
        if step == start + 1:
            jax.block_until_ready(metrics)  # the speed excludes compilation
            session.rates.start(step)
        settle()
        pending = (step, metrics)

        last, evaluates = session.is_last(step), session.evaluates_after(step)
        if last or evaluates or step % training.checkpoint_every == 0:
            # Metrics first, so that a run that resumes here has all of them.
            settle()
            session.save(step, state, wait=last)
        if evaluates:
            session.evaluate(step, state)
        stopped = session.signals.stops_after(step)  # once a step: a signal may come at any time
        if stopped:
            settle()
            session.save(step, state, wait=True)
            raise Interrupted(stopped, step)


def extension(saved: Mapping[str, Any], num_steps: int) -> str:
    """The message's suffix if `num_steps` has changed since the checkpoint; else empty."""
    before = saved.get("run", {}).get("training", {}).get("num_steps", num_steps)
    return f", extended from {before}" if before != num_steps else ""


def is_evaluated(session: Session, step: int) -> bool:
    """Whether the metrics contain an evaluation of a step; process 0 decides for all."""
    return bool(of_first(session.writer.has_evaluation(step)))


def global_batches(config: ExperimentConfig, data: Data, mesh: Mesh, start: int) -> Iterator[Batch]:
    """Yields the batches of the steps after `start`, cut into microbatches, on the mesh.

    Each process reads the rows of each microbatch that its devices hold. The sequences of a step
    depend neither on the mesh nor on the processes.
    """
    num_parts = config.training.num_microbatches
    num_rows = config.training.batch_size // num_parts
    rows = rows_of_process(mesh, num_rows)
    parts = train_batches(data, global_batch_size=num_rows, rows=rows, start_step=start * num_parts)
    while True:
        some = [next(parts) for _ in range(num_parts)]
        read = {name: np.stack([part[name] for part in some]) for name in some[0]}
        read.pop("domain")
        yield from_rows(read, rows, num_rows, mesh, BATCH_AXES)


def not_finite(metrics: StepMetrics) -> list[str]:
    """The names of `FINITE` whose values are not finite."""
    return [name for name in FINITE if not np.isfinite(float(getattr(metrics, name)))]


def check_finite(step: int, metrics: StepMetrics, checkpoints: Checkpoints) -> None:
    """Stops a run whose loss or gradient is not finite.

    Raises:
      FloatingPointError: naming the metric, the step and the last good checkpoint.
    """
    for name in not_finite(metrics):
        raise FloatingPointError(
            f"train/{name} is {getattr(metrics, name)} at step {step}; "
            f"{checkpoints.last_good_after_save()} in {checkpoints.directory}. Lower "
            "optimizer.learning_rate or lengthen optimizer.warmup_steps, and start in another "
            "workdir. A model with experts may also need a router_z loss of more weight."
        )


class BufferOverflowError(ValueError):
    """A buffer with `stop_at_overflow` had no room for some received choices."""


def check_overflow(
    step: int, metrics: StepMetrics, config: ExperimentConfig, checkpoints: Checkpoints
) -> None:
    """Stops a run that lost choices in a part with `stop_at_overflow`.

    Raises:
      BufferOverflowError: naming the layer that needs most, and a sufficient factor.
    """
    parts: dict[str, Any] = config.model.all_parts
    for part, moe in parts.items():
        lost_X = metrics.of_parts.get(f"{part}/buffer_overflow")
        if lost_X is None or not moe.stop_at_overflow or not np.any(lost_X):
            continue
        factor_X = np.asarray(metrics.of_parts[f"{part}/buffer_factor"])
        worst = int(np.argmax(factor_X))
        rows, layer = metrics.of_parts[f"{part}/buffer_rows"][worst], config.model.layers_of[part]
        factor = math.ceil(100 * factor_X[worst]) / 100
        raise BufferOverflowError(
            f"{part}/layer_{layer[worst]:02d} lost {int(lost_X[worst]):,} choices at step {step}: "
            f"a device was sent {int(rows):,} rows, {factor_X[worst]:.4g} times the mean, and has "
            f"room for buffer_factor={moe.buffer_factor:g} times; "
            f"{checkpoints.last_good_after_save()} in {checkpoints.directory}. "
            f"Set model.parts.{own_name(part)}.buffer_factor={factor:g}, or "
            f"stop_at_overflow=False, and go on in this workdir."
        )
