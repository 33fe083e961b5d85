r"""Runs a study: `python -m experiments.run STUDY`, and again to go on where it was stopped.

    python -m moe_jax.data.build --out=runs/corpus
    python -m moe_jax.data.train_tokenizer --corpus=jsonl:runs/corpus \
        --out=runs/corpus/bpe8192.model
    python -m experiments.run switch_against_dense --jobs=2
    python -m experiments.run switch_against_dense --smoke

Every arm and seed is a process of its own and adds one line to `results.jsonl` beside the study
when it is finished. Those that have their line are not run again; one that was interrupted goes on
from its newest checkpoint. The baseline comes first, with more seeds: it is the noise floor.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.arm import run_arm
from experiments.budget import check_budget
from experiments.results import RESULTS_FILE, check_same_text, read_results, run_of
from experiments.study import CORPUS, SIZES, Study, load_study
from experiments.tables import budget_table
from moe_jax.command_line import Parser
from moe_jax.config.check import require
from moe_jax.config.installed import require_local
from moe_jax.jobs.places import add_xla_flag, this_machine
from moe_jax.jobs.side_by_side import Board, Stopped, run_side_by_side
from moe_jax.training.metrics import METRICS_FILE, read_metrics
from moe_jax.training.signals import Interrupted
from moe_jax.user_errors import USER_ERRORS, describe

COMPILE_QUICKLY = "--xla_backend_optimization_level=0"


@dataclasses.dataclass(frozen=True)
class Job:
    """An arm with a seed, and where it is run."""

    study: Study
    size: str
    arm: str
    seed: int
    workdir: pathlib.Path
    results: pathlib.Path
    corpus: str

    @property
    def name(self) -> str:
        """What it is called, and its directory."""
        return f"{self.arm}_seed{self.seed}"

    @property
    def whereabouts(self) -> dict[str, Any]:
        """All of it but the study, which has functions: they do not travel to another process."""
        return {name: value for name, value in vars(self).items() if name != "study"}

    def is_finished(self) -> bool:
        """Whether it is finished, be it by another process."""
        return (self.size, self.arm, self.seed) in map(run_of, read_results(self.results))

    @property
    def num_steps(self) -> int:
        """Of its training."""
        return self.study.experiment(self.size, self.arm, self.seed).training.num_steps

    def finished_steps(self) -> int:
        """How far it is, from the metrics that it has written."""
        path = self.workdir / METRICS_FILE
        rows = read_metrics(path) if path.exists() else []
        return rows[-1]["step"] if rows else 0

    def command(self) -> list[str]:
        """The process that runs it."""
        return [
            sys.executable, "-m", "experiments.arm", f"--study={self.study.name}",
            f"--size={self.size}", f"--arm={self.arm}", f"--seed={self.seed}",
            f"--workdir={self.workdir}", f"--results={self.results}", f"--corpus={self.corpus}",
        ]  # fmt: skip

    def run_here(self) -> None:
        """Runs it in this process."""
        run_arm(
            self.study, self.size, self.arm, self.seed,
            workdir=self.workdir, results=self.results, corpus=self.corpus,
        )  # fmt: skip


def jobs_of(
    study: Study,
    size: str,
    *,
    arms: tuple[str, ...] = (),
    num_seeds: int | None = None,
    runs: pathlib.Path,
    results: pathlib.Path,
    corpus: str = "",
) -> list[Job]:
    """What there is to run: the baseline with all its seeds, then the other arms seed by seed.

    Args:
      study: the study.
      size: one of its sizes.
      arms: some of its arms; (): all.
      num_seeds: only so many of an arm's seeds; None: all.
      runs: directory of the runs of all studies.
      results: file of results; what has its line there is left out.
      corpus: directory of the large corpus.

    Raises:
      ValueError: an unknown arm or size, or results of other settings than the study has now.
    """
    names = [study.arm(name).name for name in arms] or [arm.name for arm in study.arms]
    pairs = [(arm, seed) for arm in names for seed in study.seeds_of(arm)[:num_seeds]]
    pairs.sort(key=lambda pair: (pair[0] != study.baseline, pair[1]))
    done = {(row["arm"], row["seed"]): row for row in read_results(results, size)}
    jobs = []
    for arm, seed in pairs:
        if (arm, seed) not in done:
            workdir = runs / study.name / size / f"{arm}_seed{seed}"
            jobs.append(Job(study, size, arm, seed, workdir, results, corpus))
            continue
        study.check_row(done[arm, seed])
    return jobs


def check_corpus(study: Study, size: str, corpus: str) -> None:
    """Refuses to start without the files that the study reads.

    Raises:
      ValueError: with the commands that make them.
    """
    data = study.experiment(size, study.baseline, 0).data
    build = f"Run `python -m moe_jax.data.build --out={corpus}`"
    require(
        CORPUS not in data.corpus or any(pathlib.Path(corpus).glob("*.jsonl")),
        "--corpus is the directory of the large corpus",
        f"there is no .jsonl file in {corpus}",
        build,
    )
    model = pathlib.Path(corpus) / "bpe8192.model"
    require(
        CORPUS not in data.tokenizer or model.exists(),
        "--corpus is the directory of the large corpus and of its tokenizer",
        f"there is no {model}",
        f"{build}, then `python -m moe_jax.data.train_tokenizer --corpus=jsonl:{corpus} "
        f"--out={model}`",
    )


def run_in_turn(jobs: list[Job], board: Board) -> list[Job]:
    """Runs the jobs in this process, one after another: arms of seconds, which `smoke` has."""
    for job in jobs:
        board.begin(job)
        job.run_here()
        board.end(job)
    return []


def run_in_workers(jobs: list[Job], num_workers: int, board: Board) -> list[Job]:
    """Runs jobs of seconds in a few processes, each of which takes job after job."""
    waiting, running = list(jobs), {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        while waiting or running:
            while waiting and len(running) < num_workers:
                job = waiting.pop(0)
                board.begin(job)
                running[pool.submit(run_named, job.study.name, job.whereabouts)] = job
            ended, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in ended:
                job = running.pop(future)
                future.result()  # raises what the job did
                board.end(job)
    return []


def run_named(study: str, whereabouts: Mapping[str, Any]) -> None:
    """Runs a job in a worker."""
    flags.FLAGS.mark_as_parsed()
    Job(load_study(study), **whereabouts).run_here()


def stop_on_signals() -> None:
    """Makes SIGTERM, and SIGHUP of a terminal that is gone, what Ctrl-C is."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--smoke", action="store_true", help="--size=smoke --seeds=1")
    parser.add_argument("--seeds", type=int, help="only so many seeds of every arm")
    parser.add_argument("--arms", default="", help="only these, with commas between")
    parser.add_argument("--jobs", type=int, help="processes side by side; 1, and 2 for a smoke run")
    parser.add_argument("--out", help="directory of results.jsonl; the study's own by default")
    parser.add_argument("--runs", default="runs/experiments", help="directory of the runs")
    parser.add_argument("--corpus", default="runs/corpus", help="directory of the large corpus")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.size, args.seeds = "smoke", 1 if args.seeds is None else args.seeds
    if args.jobs is None:
        args.jobs = 2 if args.size == "smoke" else 1
    if args.size == "smoke":
        add_xla_flag(os.environ, COMPILE_QUICKLY)
    try:
        for name, value in (("--jobs", args.jobs), ("--seeds", args.seeds)):
            require(value is None or value > 0, f"{name} is 1 or more", str(value), "Correct it")
        for name in ("out", "runs", "corpus"):
            require_local(f"--{name}", getattr(args, name) or "")
        study, runs = load_study(args.study), pathlib.Path(args.runs)
        out = study.directory if args.size != "smoke" else runs / study.name / "smoke"
        results = pathlib.Path(args.out or out) / RESULTS_FILE
        arms = tuple(name for name in args.arms.split(",") if name)
        print(f"{study.question}\n\n{budget_table(study, args.size)}", flush=True)
        check_budget(study, args.size)
        jobs = jobs_of(
            study, args.size, arms=arms, num_seeds=args.seeds,
            runs=runs, results=results, corpus=args.corpus,
        )  # fmt: skip
        if jobs:
            check_corpus(study, args.size, args.corpus)
            data = study.experiment(args.size, study.baseline, 0, args.corpus).data
            check_same_text(read_results(results, args.size), data)
        stop_on_signals()
        with Board(jobs, "arms and seeds") as board:
            if args.size != "smoke":
                places = this_machine("cpu").places(args.jobs)
                failed = run_side_by_side(jobs, places, board)
            elif args.jobs > 1 and len(jobs) > 1:
                failed = run_in_workers(jobs, args.jobs, board)
            else:
                failed = run_in_turn(jobs, board)
    except USER_ERRORS as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted, Stopped):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"results: {results}")
    return 1 if failed else 0


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # libraries that read absl flags refuse to before
    sys.exit(main())
