"""One arm of a study with one seed: trains it, measures it, appends its results line."""

import os
import pathlib
import platform
import statistics
import sys
from typing import Any

from experiments.budget import cost_of
from experiments.results import LOSS, PAIRED, append_result
from experiments.routing_measures import late_values
from experiments.same_runs import link_same_run
from experiments.study import Study
from moe_jax.config import ExperimentConfig
from moe_jax.data import open_data
from moe_jax.data.corpora import form_of
from moe_jax.training.evaluation import evaluate
from moe_jax.training.files import EVALUATION_FILE, METRICS_FILE, RUN_FILE, read_json
from moe_jax.training.loop import train
from moe_jax.training.metrics import read_metrics, training_seconds
from moe_jax.training.saved import load_run, open_run_data

CURVE = f"heldout/dropless/{LOSS}"


def run_arm(
    study: Study,
    size: str,
    arm: str,
    seed: int,
    *,
    workdir: pathlib.Path,
    results: pathlib.Path,
    corpus: str,
) -> dict[str, Any]:
    """Trains or resumes an arm; its results line is written after all measurements.

    Args:
      study: the study of the arm.
      size: one of its sizes.
      arm: name of the arm.
      seed: seed of parameters and data.
      workdir: directory of the run.
      results: the results file.
      corpus: directory of the large corpus.

    Returns:
      The results line.
    """
    config = study.experiment(size, arm, seed, corpus, str(workdir.parent))
    try:
        outcome = outcome_of(study, config, workdir, trained(study, config, arm, workdir))
    except FloatingPointError as error:  # also a result: another run would end alike
        print(error, file=sys.stderr)
        outcome = divergence_of(workdir)
    cost, data = cost_of(study, size, arm), open_data(config.data)
    row = {
        "study": study.name,
        "rule": PAIRED,
        "size": size,
        "arm": arm,
        "seed": seed,
        "overrides": study.overrides(size, arm),
        "config": study.settings(size, arm, seed),
        "steps": config.training.num_steps,
        "tokens": config.training.num_steps
        * config.training.batch_size
        * config.data.sequence_length,
        "forward_flops_per_token": {"active": cost.active, "computed": cost.computed},
        "parameters": {"total": cost.total_parameters, "active": cost.active_parameters},
        "minutes": training_seconds(read_metrics(workdir / METRICS_FILE)) / 60,
        **outcome,
        "data": {
            "corpus": form_of(config.data.corpus),
            "corpus_sha256": data.fingerprints["corpus"],
            "tokenizer": form_of(config.data.tokenizer),
            "tokenizer_sha256": data.fingerprints["tokenizer"],
        },
        **circumstances(workdir),
    }
    append_result(results, row)
    return row


def trained(
    study: Study, config: ExperimentConfig, arm: str, workdir: pathlib.Path
) -> dict[str, Any]:
    """The last evaluation of a run; trains the run unless another study already has."""
    if study.start is not None:
        study.start(config, arm, workdir)
    elif other := link_same_run(config, workdir):
        print(f"{other.parent.parent.name} has trained this run: {other}", flush=True)
    if workdir.is_symlink():
        evaluation: dict[str, Any] = read_json(workdir / EVALUATION_FILE)
        return evaluation
    return train(config, workdir)


def outcome_of(
    study: Study, config: ExperimentConfig, workdir: pathlib.Path, evaluation: dict[str, Any]
) -> dict[str, Any]:
    """The losses, curve and measures of a run.

    Args:
      study: the study of the run.
      config: its settings.
      workdir: its directory.
      evaluation: its last evaluation.
    """
    rows = read_metrics(workdir / METRICS_FILE)
    return {
        "heldout": {
            kind: evaluation[kind]
            for kind in ("dropless", "capacity_limited")
            if kind in evaluation
        },
        "curve": curve_of(workdir, rows),
        "measures": measures_of(evaluation, rows, config.training.num_steps)
        | dict(study.measure(workdir) if study.measure else {}),
    }


def divergence_of(workdir: pathlib.Path) -> dict[str, Any]:
    """The outcome of a diverged run: the curve before divergence, no measures."""
    rows = read_metrics(workdir / METRICS_FILE)
    curve = [(row["step"], row[CURVE]) for row in rows if CURVE in row]
    return {
        "heldout": {},
        "curve": {"step": [step for step, _ in curve], LOSS: [loss for _, loss in curve]},
        "measures": {},
        "diverged_after_step": rows[-1]["step"] if rows else 0,
    }


def curve_of(workdir: pathlib.Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Held-out bits per byte after each evaluated step, all on the same batches.

    A run's last evaluation uses the whole held-out split. For the curve the last state is scored
    again, on the sample used by the earlier evaluations.
    """
    curve = {row["step"]: row[CURVE] for row in rows if CURVE in row}
    config, state = load_run(workdir, trust=True)  # a study may define its own parts
    if config.training.evaluation_batches:
        evaluation = evaluate(
            state.params,
            state.model_state,
            config,
            open_run_data(workdir, config),
            max_batches=config.training.evaluation_microbatches,
            step=state.step,
        )
        curve[config.training.num_steps] = evaluation["dropless"][LOSS]
    steps = sorted(curve)
    return {"step": steps, LOSS: [curve[step] for step in steps]}


def measures_of(
    evaluation: dict[str, Any], rows: list[dict[str, Any]], num_steps: int
) -> dict[str, float]:
    """Held-out bits per byte, and routing metrics averaged over layers and late steps."""
    measures = {LOSS: evaluation["dropless"][LOSS]}
    if "capacity_limited" in evaluation:
        measures["capacity_limited"] = evaluation["capacity_limited"][LOSS]
    for name in ("dropped_fraction", "max_violation", "router_entropy"):
        if values := late_values(rows, name, num_steps):
            measures[name] = statistics.fmean(values)
    return measures


def circumstances(workdir: pathlib.Path) -> dict[str, Any]:
    """Commit, versions and hardware, from the record of the run."""
    record = read_json(workdir / RUN_FILE)
    sessions = [*record.get("earlier", []), record]
    return {
        "commit": record["commit"],
        "dirty": any(session["dirty"] for session in sessions),
        "commits": sorted({str(session["commit"]) for session in sessions}),
        "sessions": len(sessions),
        "versions": record["versions"] | {"python": record["python"]},
        "hardware": {
            "platform": record["platform"],
            "device_kind": record["device_kind"],
            "num_devices": record["num_devices"],
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
        },
    }
