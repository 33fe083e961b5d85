"""Runs the study and writes its report; see README.md beside this file."""

import pathlib
import sys

from absl import flags

from configs import quickstart
from moe_jax import command_line
from moe_jax.analysis.paired import paired
from moe_jax.config import from_config_dict
from moe_jax.config.json_text import json_text
from moe_jax.files import write_atomically
from moe_jax.training.files import EVALUATION_FILE, RUN_FILE, read_json
from moe_jax.training.loop import train
from moe_jax.training.metrics import read_metrics, training_seconds

HERE = pathlib.Path(__file__).parent
ARMS = {"moe": "", "dense": "dense"}
SEEDS = (0, 1, 2)


def run_arm(arm: str, seed: int, directory: pathlib.Path) -> dict[str, float | str]:
    """Trains one arm with one seed (re-evaluates a finished run) and reads its result."""
    settings = quickstart.get_config(ARMS[arm])
    with settings.unlocked():
        settings.seed = settings.data.seed = seed
    train(from_config_dict(settings), directory)
    evaluation = read_json(directory / EVALUATION_FILE)
    record = read_json(directory / RUN_FILE)
    seconds = training_seconds(read_metrics(directory / "metrics.jsonl"))
    return {
        "bits_per_byte": evaluation["dropless"]["bits_per_byte"],
        "nats_per_token": evaluation["dropless"]["nats_per_token"],
        "training_minutes": seconds / 60,
        "commit": record["commit"],
    }


def judge(results: dict[str, dict[str, dict[str, float | str]]]) -> dict[str, float | bool]:
    """The criterion of README.md, applied to bits per byte by arm and seed."""
    values = {
        arm: [float(run["bits_per_byte"]) for run in runs.values()] for arm, runs in results.items()
    }
    mean = {arm: sum(v) / len(v) for arm, v in values.items()}
    spread = {arm: max(v) - min(v) for arm, v in values.items()}
    gap = mean["dense"] - mean["moe"]
    by_seed = [dict(enumerate(of_arm)) for of_arm in (values["dense"], values["moe"])]
    low, high = paired(*by_seed).interval
    return {
        "mean_moe": mean["moe"],
        "mean_dense": mean["dense"],
        "gap": gap,
        "gap_low": low,
        "gap_high": high,
        "spread_moe": spread["moe"],
        "spread_dense": spread["dense"],
        "passed": gap > max(spread.values()),
    }


def report(results: dict[str, dict[str, dict[str, float | str]]]) -> str:
    """The results as Markdown."""
    verdict = judge(results)
    lines = [
        "# The quickstart MoE against its dense twin: results",
        "",
        "Held-out bits a byte at the last step, dropless; written by `run.py`.",
        "",
        "| seed | moe | dense | gap |",
        "| --- | --- | --- | --- |",
    ]
    for seed in results["moe"]:
        moe, dense = (float(results[arm][seed]["bits_per_byte"]) for arm in ("moe", "dense"))
        lines.append(f"| {seed} | {moe:.4f} | {dense:.4f} | {dense - moe:.4f} |")
    lines += [
        f"| mean | {verdict['mean_moe']:.4f} | {verdict['mean_dense']:.4f} "
        f"| {verdict['gap']:.4f} |",
        f"| spread | {verdict['spread_moe']:.4f} | {verdict['spread_dense']:.4f} | |",
        "",
        f"Criterion (gap larger than either spread): "
        f"**{'passed' if verdict['passed'] else 'failed'}**. It is the rule of the time when this "
        "was run.",
        "",
        "By the rule of today, paired differences: "
        + (
            "**no direction is shown**"
            if verdict["gap_low"] <= 0 <= verdict["gap_high"]
            else "**a direction is shown**"
        )
        + f", the 95 % interval of the gap is {verdict['gap_low']:+.4f} to "
        f"{verdict['gap_high']:+.4f}.",
        "",
        "| arm | seed | commit | minutes of training steps |",
        "| --- | --- | --- | --- |",
    ]
    for arm, runs in results.items():
        for seed, run in runs.items():
            commit, minutes = str(run["commit"])[:12], float(run["training_minutes"])
            lines.append(f"| {arm} | {seed} | {commit} | {minutes:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs every arm and seed, then judges."""
    runs = pathlib.Path(flags.FLAGS.runs)
    results: dict[str, dict[str, dict[str, float | str]]] = {arm: {} for arm in ARMS}
    for seed in SEEDS:
        for arm in ARMS:
            results[arm][str(seed)] = run_arm(arm, seed, runs / f"{arm}_seed{seed}")
    write_atomically(HERE / "results.json", json_text(results, indent=2) + "\n")
    write_atomically(HERE / "report.md", report(results))
    print(report(results))


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("runs", "runs/moe_against_dense", "Directory of the runs.")


if __name__ == "__main__":
    sys.exit(command_line.Command(main, define_flags)(sys.argv[1:]))
