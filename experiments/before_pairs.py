"""The rule by which directions were decided before they were by paired differences.

The mean difference of paired seeds was held against an unpaired noise: the larger of the two arms'
pooled standard deviation and that of the baseline over five seeds. Results that have no "rule" of
their own were run under it, and keep its verdict beside the one of today.
"""

import math

from experiments.results import LOSS, Results
from moe_jax.analysis.paired import Paired, spread

MARGIN = 2.0  # times the noise shows a direction
NOISE_SEEDS = 5  # of the baseline


def noise_floor(results: Results) -> float:
    """Standard deviation of the baseline's loss over its seeds; nan of fewer than `NOISE_SEEDS`."""
    losses = results.values(results.baseline, LOSS)
    return spread(losses.values()) if len(losses) >= NOISE_SEEDS else math.nan


def noise(found: Paired, results: Results) -> float:
    """The larger of pooled standard deviation and noise floor; nan if one of them is."""
    floor = noise_floor(results)
    return math.nan if math.isnan(found.seed_sd + floor) else max(found.seed_sd, floor)


def direction(found: Paired, results: Results, margin: float) -> int:
    """-1 for below what is allowed, 1 for above, 0 where that was open.

    Args:
      found: the difference, of enough seeds.
      results: with a noise floor.
      margin: 0 of the claim that an arm is lower; of the claim that it is not above the noise took
        the place of any other.
    """
    unit = noise(found, results) if math.isfinite(found.mean) else 0.0
    below = 1.0 if margin else -MARGIN
    if found.mean < below * unit:
        return -1
    return 1 if found.mean > MARGIN * unit else 0
