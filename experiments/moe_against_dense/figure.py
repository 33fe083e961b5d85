"""Draws the study: `python -m experiments.moe_against_dense.figure --runs=DIR`."""

import pathlib
import sys

import numpy as np
from absl import flags

from experiments.moe_against_dense.run import ARMS, HERE, SEEDS
from moe_jax import command_line
from moe_jax.analysis.drawing import Figure
from moe_jax.analysis.report import read_run

COLORS = {"moe": "#0072B2", "dense": "#D55E00"}
NAMES = {"moe": "MoE, 2 of 8 experts", "dense": "dense twin"}
SMOOTH = 7  # logged steps averaged per point of a curve


def draw(runs: pathlib.Path) -> Figure:
    """Training loss of every run, and held-out bits per byte by seed."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for arm in ARMS:
        for seed in SEEDS:
            run = read_run(runs / f"{arm}_seed{seed}")
            steps, loss = run.curve("train/loss")
            window = np.ones(SMOOTH) / SMOOTH
            middle = slice(SMOOTH // 2, -(SMOOTH // 2))
            label = NAMES[arm] if seed == SEEDS[0] else None
            smooth = np.convolve(loss, window, "valid")
            left.plot(steps[middle], smooth, color=COLORS[arm], label=label, lw=1.2)
            bits = run.evaluation["dropless"]["bits_per_byte"]
            right.plot(seed, bits, "o", color=COLORS[arm])
    left.set(xlabel="step", ylabel="training loss, nats/token", ylim=(1.6, 2.6))
    right.set(xlabel="seed", ylabel="held-out bits/byte", xticks=SEEDS, xlim=(-0.5, 2.5))
    left.legend(frameon=False)
    for axis in (left, right):
        axis.grid(color="#DDDDDD", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Writes result.png beside this file."""
    draw(pathlib.Path(flags.FLAGS.runs)).savefig(HERE / "result.png", dpi=110)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("runs", "runs/moe_against_dense", "Directory of the runs.")


if __name__ == "__main__":
    sys.exit(command_line.Command(main, define_flags)(sys.argv[1:]))
