"""An arm of a study with its seeds, as a process.

`experiments.run` starts it; the same command resumes from the newest checkpoint.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from experiments.arm import run_arm
from experiments.results import read_results, run_of
from experiments.study import Study, load_study, run_name
from moe_jax.training.files import METRICS_FILE
from moe_jax.training.metrics import last_step
from moe_jax.training.signals import Interrupted
from moe_jax.user_errors import USER_ERRORS


@dataclasses.dataclass(frozen=True)
class Job:
    """An arm with its missing seeds, run one after another, and the paths of its files.

    All seeds share one program, which is compiled once.
    """

    study: Study
    size: str
    arm: str
    seeds: tuple[int, ...]
    runs: pathlib.Path
    results: pathlib.Path
    corpus: str

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"{self.arm} (seed {', '.join(map(str, self.seeds))})"

    @property
    def workdir(self) -> pathlib.Path:
        """The directory of its log; hidden, since it is not the directory of a run."""
        return self.runs / ".logs" / self.arm

    @property
    def workdirs(self) -> dict[int, pathlib.Path]:
        """The directory of each run, by seed."""
        return {seed: self.runs / run_name(self.arm, seed) for seed in self.seeds}

    @property
    def whereabouts(self) -> dict[str, Any]:
        """All fields except the study, whose functions cannot be sent to another process."""
        return {name: value for name, value in vars(self).items() if name != "study"}

    def is_finished(self) -> bool:
        """Whether every seed has a line of results, whichever process wrote it."""
        return not self.seeds_left()

    def seeds_left(self) -> list[int]:
        """The seeds without a line of results."""
        done = set(map(run_of, read_results(self.results)))
        return [seed for seed in self.seeds if (self.size, self.arm, seed) not in done]

    @property
    def num_steps(self) -> int:
        """Steps of training, over all seeds."""
        config = self.study.experiment(self.size, self.arm, self.seeds[0])
        return len(self.seeds) * config.training.num_steps

    def finished_steps(self) -> int:
        """Finished steps of the runs, from their metrics."""
        return sum(last_step(workdir / METRICS_FILE) for workdir in self.workdirs.values())

    def command(self) -> list[str]:
        """The command that runs the job in its own process."""
        return [
            sys.executable, "-m", "experiments.job", f"--study={self.study.place}",
            f"--size={self.size}", f"--arm={self.arm}",
            f"--seeds={','.join(map(str, self.seeds))}", f"--runs={self.runs}",
            f"--results={self.results}", f"--corpus={self.corpus}",
        ]  # fmt: skip

    def run_here(self) -> None:
        """Runs the seeds without results, one after another, in this process."""
        for seed in self.seeds_left():
            run_arm(
                self.study, self.size, self.arm, seed,
                workdir=self.workdirs[seed], results=self.results, corpus=self.corpus,
            )  # fmt: skip


def main() -> None:
    """Runs the job that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("study", "size", "arm", "seeds", "runs", "results", "corpus"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # otherwise libraries cannot read absl flags
    try:
        Job(
            load_study(args.study),
            args.size,
            args.arm,
            tuple(map(int, args.seeds.split(","))),
            pathlib.Path(args.runs),
            pathlib.Path(args.results),
            args.corpus,
        ).run_here()
    except Interrupted as interruption:
        sys.exit(128 + interruption.signal_number)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
