"""A training run, from a config and a directory to checkpoints, metrics and a report."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from moe_jax.analysis.report import write_report
from moe_jax.config import ExperimentConfig
from moe_jax.data import open_tokenizer, train_batches
from moe_jax.inference import continue_text
from moe_jax.planning.arithmetic import count_flops, count_parameters, summary
from moe_jax.planning.hardware import peak_flops
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.evaluation import evaluate
from moe_jax.training.metrics import MetricWriter, write_atomically, write_run_record
from moe_jax.training.progress import Progress
from moe_jax.training.rates import Rates
from moe_jax.training.rows import evaluation_line, evaluation_row, metrics_row
from moe_jax.training.saved import CHECKPOINTS, restore
from moe_jax.training.signals import Interrupted, SignalFlag
from moe_jax.training.state import TrainState, init_state
from moe_jax.training.step import StepMetrics, make_train_step
from moe_jax.training.workdir import check_workdir, only_run


def train(config: ExperimentConfig, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Trains a model, or goes on with the run in `workdir`.

    Args:
      config: the run. Steps, data order, dropout and noise are functions of it alone.
      workdir: holds the run: `config.json`, `run.json`, `metrics.jsonl`, `checkpoints/`,
        `evaluation.json`, `sample.txt`, `report/`.

    Returns:
      The last evaluation, as `evaluation.json` has it.

    Raises:
      ValueError: the workdir is of another config, or the vocabulary does not fit.
      FloatingPointError: the loss or the gradient is not finite.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    workdir = pathlib.Path(workdir)
    check_workdir(config, workdir)
    check_vocabulary(config)
    keep = config.training.keep_checkpoints
    # However this ends, a checkpoint that is being written is waited for.
    with only_run(workdir), Checkpoints(workdir / CHECKPOINTS, keep) as checkpoints:
        return train_in(workdir, config, checkpoints)


def train_in(
    workdir: pathlib.Path, config: ExperimentConfig, checkpoints: Checkpoints
) -> dict[str, Any]:
    """Trains in a directory that nobody else writes to; see `train`."""
    restored = restore(config, checkpoints)
    state = jax.jit(init_state, static_argnums=0)(config) if restored is None else restored
    start = int(state.step)
    parameters = count_parameters(config.model)
    flops = count_flops(config.model, config.data.sequence_length)
    peak = peak_flops()
    facts = {
        "parameters": {"total": parameters.total, "active": parameters.active},
        "forward_flops_per_token": {"model": flops.model, "computed": flops.computed},
        "peak_flops": peak,
    }
    record = write_run_record(workdir, config, start_step=start, facts=facts)
    print(summary(config.model, config.data.sequence_length), flush=True)
    if start:
        print(f"resuming after step {start} of {config.training.num_steps}", flush=True)

    num_steps = config.training.num_steps
    on_cpu = record["platform"] == "cpu"
    progress = Progress(
        num_steps, start_step=start, utilization="of matmul peak" if on_cpu else "mfu"
    )
    rates = Rates(config, 3 * flops.model, peak)
    with MetricWriter(workdir, start) as writer, progress, SignalFlag() as signals:
        state, said = run_steps(config, state, start, checkpoints, writer, progress, rates, signals)
    return finish(config, workdir, state, said)


def run_steps(
    config: ExperimentConfig,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    progress: Progress,
    rates: Rates,
    signals: SignalFlag,
) -> tuple[TrainState, dict[str, Any] | None]:
    """Takes the steps from `start` on, and writes down what they say.

    Returns:
      The last state and its evaluation (None if there was no step left to take).
    """
    training = config.training
    step_function = jax.jit(make_train_step(config), donate_argnums=0)
    batches = train_batches(config.data, global_batch_size=training.batch_size, start_step=start)
    pending: tuple[int, StepMetrics] | None = None
    said: dict[str, Any] | None = None
    saved = start

    def settle() -> None:
        """Checks, writes and shows the metrics of the step before: the device is on the next."""
        if pending is None:
            return
        step, metrics = pending
        check_finite(step, metrics, saved, checkpoints.directory)
        if step % training.log_every == 0 or step == training.num_steps:
            row = metrics_row(metrics, config.model.moe_layers) | rates.measure(step)
            writer.write(step, row)
            progress.update(step, row)
        else:
            progress.update(step)

    for step in range(start + 1, training.num_steps + 1):
        batch = next(batches)
        batch.pop("domain")
        state, metrics = step_function(state, batch)
        if step == start + 1:
            jax.block_until_ready(metrics)  # compilation is not part of the speed
            rates.start(step)
        settle()
        pending = (step, metrics)

        last = step == training.num_steps
        if last or step % training.evaluate_every == 0:
            settle()
            pending = None
            max_batches = None if last else training.evaluation_batches or None
            with rates.paused():
                said = evaluate(state.params, state.router_bias_XE, config, max_batches=max_batches)
            writer.write(step, evaluation_row(said))
            progress.print(evaluation_line(step, said))
        stopped = signals.received  # read once, and after the evaluation: it may come at any time
        if last or stopped or step % training.checkpoint_every == 0:
            # The metrics first: a run that resumes here has all of them.
            settle()
            pending = None
            with rates.paused():
                checkpoints.save(step, state, wait=last or stopped is not None)
            saved = step
        if stopped:
            raise Interrupted(stopped, step)
    return state, said


def finish(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    state: TrainState,
    said: dict[str, Any] | None,
) -> dict[str, Any]:
    """Writes the evaluation on the whole held-out split, a sample, and the report."""
    if said is None:
        said = evaluate(state.params, state.router_bias_XE, config)
    said = {"step": int(state.step), **said}
    write_atomically(workdir / "evaluation.json", json.dumps(said, indent=2) + "\n")
    training = config.training
    if training.sample_prompt:
        text = continue_text(
            state.params,
            state.router_bias_XE,
            config,
            training.sample_prompt,
            num_tokens=training.sample_tokens,
        )
        write_atomically(workdir / "sample.txt", training.sample_prompt + text + "\n")
        print(f"\nsample:\n{training.sample_prompt}{text}\n")
    print(f"report: {write_report(workdir)}", flush=True)
    return said


def check_vocabulary(config: ExperimentConfig) -> None:
    """Refuses a model whose vocabulary is smaller than the tokenizer's."""
    size = open_tokenizer(config.data.tokenizer).vocab_size
    if config.model.vocab_size < size:
        raise ValueError(
            "model.vocab_size is at least the tokenizer's: "
            f"model.vocab_size={config.model.vocab_size}, {config.data.tokenizer!r} has {size}. "
            f"Set model.vocab_size={size}."
        )


def check_finite(step: int, metrics: StepMetrics, saved: int, directory: pathlib.Path) -> None:
    """Stops a run that has gone to infinity.

    Raises:
      FloatingPointError: naming the metric, the step and the last good checkpoint.
    """
    for name in ("loss", "total_loss", "grad_norm"):
        value = float(getattr(metrics, name))
        if not np.isfinite(value):
            where = f"checkpoint of step {saved} in {directory}" if saved else "no checkpoint yet"
            raise FloatingPointError(
                f"train/{name} is {value} at step {step}; last good state: {where}. Lower "
                "optimizer.learning_rate, lengthen the warm-up, or raise "
                "model.moe.balance.router_z_loss_weight; then start in another workdir."
            )
