r"""Runs a study: `python -m experiments.run STUDY`; run it again to resume after a stop.

    python -m moe_jax.data.build --out=runs/corpus
    python -m moe_jax.data.train_tokenizer --corpus=jsonl:runs/corpus \
        --out=runs/corpus/bpe8192.model
    python -m experiments.run switch_against_dense --jobs=2
    python -m experiments.run switch_against_dense --smoke

    python -m experiments.run switch_against_dense --size=gpu --corpus=runs/packed --minutes=9

Each arm runs in its own process, in which its seeds share one program. A finished seed adds one
line to `results.jsonl` beside the study. Seeds with a line are not run again. A seed that was
interrupted, or stopped by --minutes, resumes from its newest checkpoint. The baseline runs first.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from experiments.budget import check_budget
from experiments.job import Job
from experiments.results import RESULTS_FILE, check_same_text, read_results
from experiments.study import CORPUS, SIZES, Study, load_study
from experiments.tables import budget_table
from moe_jax.command_line import Parser
from moe_jax.config.check import require
from moe_jax.config.installed import require_local
from moe_jax.data.packed_corpus import MANIFEST
from moe_jax.jobs.places import add_xla_flag, this_machine
from moe_jax.jobs.side_by_side import Board, Stopped, run_side_by_side
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.placement import check_run
from moe_jax.training.signals import Interrupted
from moe_jax.training.state import abstract_batch, abstract_state
from moe_jax.training.step import make_train_step
from moe_jax.user_errors import USER_ERRORS, describe

COMPILE_QUICKLY = "--xla_backend_optimization_level=0"


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
    """The jobs left to run: the baseline, then the other arms, each with its missing seeds.

    An arm that needs runs of other arms follows all arms that need none.

    Args:
      study: the study.
      size: one of its sizes.
      arms: some of its arms; (): all.
      num_seeds: number of seeds per arm; None: all.
      runs: directory of the runs of all studies.
      results: results file; runs with a line in it are left out.
      corpus: directory of the large corpus.

    Raises:
      ValueError: an arm or size is unknown, or results are from other settings than the study's.
    """
    names = [study.arm(name).name for name in arms] or [a.name for a in study.arms_at(size)]
    names.sort(key=lambda name: (study.stage(size, name), name != study.baseline))
    done = {(row["arm"], row["seed"]): row for row in read_results(results, size)}
    jobs = []
    for arm in names:
        seeds = study.seeds_of(arm)[:num_seeds]
        for seed in seeds:
            if (arm, seed) in done:
                study.check_row(done[arm, seed])
        left = tuple(seed for seed in seeds if (arm, seed) not in done)
        if left:
            jobs.append(Job(study, size, arm, left, runs / study.name / size, results, corpus))
    return jobs


def check_corpus(study: Study, size: str, corpus: str) -> None:
    """Refuses to start without the files that the study reads.

    Raises:
      ValueError: files are missing; the message has the commands that make them.
    """
    data = study.experiment(size, study.baseline, 0).data
    folder = pathlib.Path(corpus)
    require(
        data.corpus != f"packed:{CORPUS}" or (folder / MANIFEST).exists(),
        f"at the size {size} --corpus is a folder of packed tokens",
        f"there is no {folder / MANIFEST}",
        f"Run `python -m moe_jax.data.pack --corpus=jsonl:CORPUS --out={corpus} "
        f"--heldout_fraction={data.heldout_fraction} "
        "--tokenizer=sentencepiece:CORPUS/bpe8192.model` where the large corpus is in CORPUS",
    )
    build = f"Run `python -m moe_jax.data.build --out={corpus}`"
    require(
        data.corpus != f"jsonl:{CORPUS}" or any(folder.glob("*.jsonl")),
        "--corpus is the directory of the large corpus",
        f"there is no .jsonl file in {corpus}",
        build,
    )
    model = folder / "bpe8192.model"
    require(
        CORPUS not in data.tokenizer or model.exists(),
        "--corpus is the directory of the large corpus and of its tokenizer",
        f"there is no {model}",
        f"{build}, then `python -m moe_jax.data.train_tokenizer --corpus=jsonl:{corpus} "
        f"--out={model}`",
    )


def run_in_turn(jobs: list[Job], board: Board) -> list[Job]:
    """Runs jobs in this process, one after another: short jobs, or jobs on a GPU that it holds."""
    for job in jobs:
        board.begin(job)
        job.run_here()
        board.end(job)
    return []


def run_in_workers(jobs: list[Job], num_workers: int, board: Board) -> list[Job]:
    """Runs short jobs in a pool of `num_workers` processes."""
    waiting = list(jobs)
    running: dict[concurrent.futures.Future[None], Job] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        while waiting or running:
            while waiting and len(running) < num_workers:
                job = waiting.pop(0)
                board.begin(job)
                running[pool.submit(run_at, job.study.place, job.whereabouts)] = job
            ended, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in ended:
                job = running.pop(future)
                future.result()  # raises the error of the job
                board.end(job)
    return []


def run_at(place: str, whereabouts: Mapping[str, Any]) -> None:
    """Runs a job of the study at a place, in a worker."""
    flags.FLAGS.mark_as_parsed()
    Job(load_study(place), **whereabouts).run_here()


def stop_after(minutes: float | None) -> threading.Timer:
    """Sends SIGTERM to this process after `minutes`, if given; runs save first."""
    timer = threading.Timer(60 * (minutes or 0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if minutes:
        timer.start()
    return timer


def dry_run(study: Study, size: str, jobs: list[Job]) -> None:
    """Traces the training steps and prints what the jobs would do; computes nothing.

    Raises:
      ValueError: a batch or a model does not fit the available devices.
    """
    for job in jobs:
        if needed := study.needed_by(size, job.arm):
            print(f"{job.name}: behind {', '.join(sorted(needed))}, whose runs it reads")
            continue
        config = study.experiment(size, job.arm, job.seeds[0], job.corpus)
        config = config.on_devices(jax.device_count())
        mesh = make_mesh(config.mesh)
        check_run(config, mesh)
        rows = config.training.batch_size // config.training.num_microbatches
        state = abstract_state(config)
        batch = abstract_batch(config, (config.training.num_microbatches, rows))
        with jax.set_mesh(mesh):
            jax.eval_shape(make_train_step(config), state, batch)
        size_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        steps = config.training.num_steps
        tokens = steps * config.training.batch_size * config.data.sequence_length
        print(
            f"{job.name}: {len(job.seeds)} x {steps:,} steps of {tokens / steps:,.0f} tokens, "
            f"{tokens / 1e6:.1f} M; parameters and moments {size_of_state / 1e9:.2f} GB"
        )


def stop_on_signals() -> None:
    """Makes SIGTERM, and SIGHUP from a closed terminal, act as Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def run_jobs(jobs: list[Job], size: str, num_jobs: int, minutes: float | None) -> list[Job]:
    """Runs the jobs in the way of their size; returns failed jobs.

    Smoke jobs take seconds and share a few processes. At the size gpu all arms run in the one
    process that holds the card. Otherwise every arm has its own process. Arms whose runs others
    need run first; if one of them fails, later stages are not run.
    """
    stop_on_signals()
    timer = stop_after(minutes)
    failed: list[Job] = []
    try:
        with Board(jobs, "arms") as board:
            for _, some in itertools.groupby(jobs, lambda job: job.study.stage(size, job.arm)):
                failed = failed or run_stage(list(some), size, num_jobs, board)
        return failed
    finally:
        timer.cancel()


def run_stage(jobs: list[Job], size: str, num_jobs: int, board: Board) -> list[Job]:
    """Runs jobs that do not need each other; returns failed jobs."""
    if size not in ("smoke", "gpu"):
        return run_side_by_side(jobs, this_machine("cpu").places(num_jobs), board)
    if size == "smoke" and num_jobs > 1 and len(jobs) > 1:
        return run_in_workers(jobs, num_jobs, board)
    return run_in_turn(jobs, board)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a folder of experiments/, or the path of your own")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--smoke", action="store_true", help="--size=smoke --seeds=1")
    parser.add_argument("--seeds", type=int, help="run the first SEEDS seeds of every arm")
    parser.add_argument("--arms", default="", help="run these arms only, separated by commas")
    parser.add_argument("--jobs", type=int, help="arms side by side; default 1, for a smoke run 2")
    parser.add_argument(
        "--minutes", type=float, help="save and stop after so many; run again to resume"
    )
    parser.add_argument(
        "--dry", action="store_true", help="print the sizes of the steps, train nothing"
    )
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
        require(args.minutes is None or args.minutes > 0, "--minutes are above 0",
                str(args.minutes), "Correct it")  # fmt: skip
        for name in ("out", "runs", "corpus"):
            require_local(f"--{name}", getattr(args, name) or "")
        study, runs = load_study(args.study), pathlib.Path(args.runs)
        out = study.directory if args.size != "smoke" else runs / study.name / "smoke"
        results = pathlib.Path(args.out or out) / RESULTS_FILE
        arms = tuple(name for name in args.arms.split(",") if name)
        sizes = [size for size in SIZES if size in study.sizes]
        require(args.size in sizes, f"{study.name} has the sizes {sizes}", repr(args.size),
                "Correct --size")  # fmt: skip
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
        if args.dry:
            dry_run(study, args.size, jobs)
            return 0
        failed = run_jobs(jobs, args.size, args.jobs, args.minutes)
    except USER_ERRORS as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted, Stopped):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"results: {results}")
    return 1 if failed else 0


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # otherwise libraries cannot read absl flags
    sys.exit(main())
