"""The earlier rule for directions, before the rule of paired differences.

It compares the mean difference of paired seeds with an unpaired noise: the larger of the two arms'
pooled standard deviation and that of the baseline over five seeds. Results without the field "rule"
were run under it; reports show its verdict beside the current one.
"""

import math

from experiments.results import LOSS, Results
from moe_jax.analysis.paired import Paired, spread

MARGIN = 2.0  # a difference above this multiple of the noise shows a direction
NOISE_SEEDS = 5  # seeds of the baseline


def noise_floor(results: Results) -> float:
    """Standard deviation of the baseline's loss over seeds; nan if fewer than `NOISE_SEEDS`."""
    losses = results.values(results.baseline, LOSS)
    return spread(losses.values()) if len(losses) >= NOISE_SEEDS else math.nan


def noise(found: Paired, results: Results) -> float:
    """The larger of pooled standard deviation and noise floor; nan if either is nan."""
    floor = noise_floor(results)
    return math.nan if math.isnan(found.seed_sd + floor) else max(found.seed_sd, floor)


def direction(found: Paired, results: Results, margin: float) -> int:
    """-1 below the allowed difference, 1 above, 0 if undecided.

    Args:
      found: the difference, from enough seeds.
      results: results with a noise floor.
      margin: 0 for the claim that an arm is lower; any other value means that it is not above, with
        the noise as the margin.
    """
    unit = noise(found, results) if math.isfinite(found.mean) else 0.0
    below = 1.0 if margin else -MARGIN
    if found.mean < below * unit:
        return -1
    return 1 if found.mean > MARGIN * unit else 0
