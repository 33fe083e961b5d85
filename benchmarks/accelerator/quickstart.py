"""configs/quickstart.py for a hundred steps, on the device and on a CPU of the same machine.

Both have the same data in the same order and the same initial values, so their losses should stay
close.
"""

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.record import ROOT

STEPS = 100
SHOWN = (10, 20, 40, 60, 80, 100)
SMALLER = ["--config.training.evaluate_every=0", "--config.training.sample_prompt=",
           "--config.training.trackers=()", "--config.training.evaluation_batches=5"]  # fmt: skip
DRY = ["--config.training.batch_size=2", "--config.data.sequence_length=32",
       "--config.data.heldout_fraction=0.004", "--config.training.evaluation_batches=1",
       "--config.training.log_every=5", "--config.optimizer.warmup_steps=2"]  # fmt: skip


def rows(dry: bool) -> list[Row]:
    """Rows for the device and for the CPU."""
    return [
        Row("device", 45, functools.partial(train, "", dry), first=True),
        Row("cpu", 45, functools.partial(train, "cpu", dry)),
    ]


def train(platforms: str, dry: bool) -> dict[str, Any]:
    """Trains with the command and reads its metrics."""
    steps = 10 if dry else STEPS
    environment = dict(os.environ)
    if platforms:
        environment["JAX_PLATFORMS"] = platforms
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "moe_jax.train", "--config=configs/quickstart.py",
                   f"--workdir={workdir}", f"--config.training.num_steps={steps}", *SMALLER,
                   *([*DRY] if dry else [])]  # fmt: skip
        outcome = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if outcome.returncode:
            raise RuntimeError(reason(outcome.stderr or outcome.stdout))
        metrics = read(pathlib.Path(workdir) / "metrics.jsonl")
    return {"steps": steps, **summary(metrics)}


def summary(metrics: dict[int, dict[str, float]]) -> dict[str, Any]:
    """The losses at the steps of `SHOWN`, or at all steps of a shorter run; the median speed."""
    losses = {step: row["train/loss"] for step, row in metrics.items() if "train/loss" in row}
    shown = [step for step in SHOWN if step in losses] if max(losses) >= SHOWN[-1] else losses
    rates = [row["perf/tokens_per_s"] for row in metrics.values() if "perf/tokens_per_s" in row]
    return {
        "losses": {str(step): round(losses[step], 4) for step in shown},
        "tokens_per_s": statistics.median(rates) if rates else None,
    }


def read(path: pathlib.Path) -> dict[int, dict[str, float]]:
    """The metrics by step, for steps that have any."""
    found: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update(row)
    return found


def reason(text: str) -> str:
    """The last line that mentions an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line]
    return (telling or lines or ["it said nothing"])[-1][:250]
