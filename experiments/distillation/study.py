"""Distillation: what a dense student keeps of what its sparse teacher gained."""

import itertools
import math
import statistics

from experiments.results import LOSS, Results, measured
from experiments.study import MLP_LAYER, MOE_LAYER, RUN_OF, Arm, Published, Study
from experiments.switch_against_dense.study import STUDY as SWITCH
from experiments.verdict import (
    INCONCLUSIVE,
    Claim,
    Finding,
    difference,
    every,
    in_every_seed,
    lower,
    too_few,
)
from moe_jax.analysis.paired import spread
from moe_jax.finetune.distil import Distil
from moe_jax.layers.feed_forward import Mlp

# A student has this layer in the place of the teacher's MoE layer; it starts fresh.
NEW_LAYER = ("attention", "new_mlp")
STUDENT = {
    "model.stack.unit": (MLP_LAYER, NEW_LAYER),
    "model.parts.new_mlp": lambda config: Mlp(dim=config.model.parts.mlp.dim),
}
# Either model has these alone: the layer, and the norm before it.
NOT_THE_TEACHERS = ("new_mlp", "new_mlp_norm", "moe", "moe_norm")
# All parameters of the teacher that are of no expert and of no router.
FROM_TEACHER = {"init_from.path": f"{RUN_OF}teacher", "init_from.fresh": NOT_THE_TEACHERS}
SOFT = {"training.loss": Distil(teacher=f"{RUN_OF}teacher", weight=1.0)}
MIXED = {"training.loss": Distil(teacher=f"{RUN_OF}teacher", weight=0.25)}
ORDERED = ("distilled", "distilled_init", "distilled_init_mixed")


def recovered(results: Results, arm: str) -> dict[int, float]:
    """The share of the gap between dense and teacher that an arm closes, by seed."""
    dense, teacher, own = (results.values(name) for name in ("dense", "teacher", arm))
    return {
        seed: (dense[seed] - own[seed]) / (dense[seed] - teacher[seed])
        for seed in sorted(dense.keys() & teacher.keys() & own.keys())
    }


def mean_recovered(results: Results, arm: str) -> float:
    """Its mean over the seeds; nan of fewer than are needed."""
    shares = recovered(results, arm)
    enough = len(shares) >= results.least_seeds
    return statistics.fmean(shares.values()) if enough else math.nan


def has_a_gap(results: Results) -> Finding:
    """The teacher is below the dense model by five deviations of the paired differences."""
    found = difference(results, "teacher", "dense")
    by_seed = {seed: -value for seed, value in found.by_seed.items()}
    if len(by_seed) < results.least_seeds:
        return too_few("teacher and dense", len(by_seed), results.least_seeds)
    least = 5 * spread(by_seed.values())
    return in_every_seed("gap of the teacher, bits a byte", by_seed, least=least)


def recovers(results: Results) -> Finding:
    """Hard and soft targets from the teacher's parameters recover 15 % of the gap or more."""
    shares = recovered(results, "distilled_init_mixed")
    return in_every_seed("share of the gap", shares, least=0.15)


def share_of(arm: str):
    """The share that an arm recovers, as text, for the table."""

    def text(results: Results) -> str:
        share = mean_recovered(results, arm)
        return INCONCLUSIVE if math.isnan(share) else f"{share:.1%}"

    return text


TABLE = "Switch Transformers (arXiv:2101.03961), table 6"
STUDY = Study(
    name="distillation",
    question="How much of what experts gain does a dense student keep that learns from them?",
    published=(
        Published(
            "negative log perplexity of T5-Base and of its teacher of 3.8B parameters",
            "-1.636 and -1.444",
            TABLE,
            measured(LOSS, "dense", "teacher"),
        ),
        Published("share of the gap: soft targets", "3 %", TABLE, share_of("distilled")),
        Published(
            "and parameters of no expert from the teacher", "20 %", TABLE,
            share_of("distilled_init"),
        ),
        Published(
            "and 0.75 of hard targets, 0.25 of soft ones", "29 %", TABLE,
            share_of("distilled_init_mixed"),
        ),
        Published("parameters of the teacher alone", "none (-1.639)", TABLE, share_of("init")),
    ),
    base={**SWITCH.base, "model.parts.moe.num_experts": 16},
    sizes={
        **SWITCH.sizes,
        "smoke": {
            **SWITCH.sizes["smoke"],
            "model.stack.unit": (MLP_LAYER, MOE_LAYER),
            "model.parts.moe.num_experts": 4,
        },
    },
    arms=(
        Arm("dense", "dense, from scratch", STUDENT),
        Arm("teacher", "teacher: Switch, E = 16", {}),
        Arm("init", "from the teacher's parameters of no expert", {**STUDENT, **FROM_TEACHER}),
        Arm("distilled", "soft targets", {**STUDENT, **SOFT}),
        Arm(
            "distilled_init", "soft targets, from those parameters",
            {**STUDENT, **FROM_TEACHER, **SOFT},
        ),
        Arm(
            "distilled_init_mixed", "0.25 of soft targets, from those parameters",
            {**STUDENT, **FROM_TEACHER, **MIXED},
        ),
    ),
    baseline="dense",
    expect=(
        Claim(
            "The teacher ends below the dense model, by more than chance.",
            lower("teacher", "dense"),
        ),
        Claim(
            "It does by five standard deviations of the paired differences or more: less is no gap "
            "of which shares can be told.",
            has_a_gap,
        ),
        Claim(
            "Hard and soft targets, from the teacher's parameters of no expert, recover 15 % of "
            "the gap or more, in every seed.",
            recovers,
        ),
        Claim(
            "Soft targets end above the same with those parameters, and these above the same with "
            "hard targets as well.",
            every(lower(more, fewer) for fewer, more in itertools.pairwise(ORDERED)),
        ),
        Claim(
            "All of it ends below those parameters alone: it is not training on from them that "
            "closes the gap.",
            lower("distilled_init_mixed", "init"),
        ),
    ),
    notes="""\
* The sizes are those of `switch_against_dense`, whose sixteen experts ended lowest. A student is
  trained as long as its teacher, on the same batches in the same order. What the teacher computes
  for it is not in its FLOPs.
* A student has the teacher's layers, but a feed-forward network that starts fresh where the teacher
  has experts. Attention, norms, embedding and the other feed-forward networks are taken.
* The soft targets are the teacher's probabilities at temperature 1, on every token. The teacher is
  dropless while it teaches, and has no dropout.
* Held-out loss of the teacher is dropless too.
* That the teacher's parameters alone recover nothing is shown, and no claim: at this size losses
  still fall by 5 % of the gap in 50 steps, and those parameters bring 2,400 steps with them.
* The criteria were written before any run of this study.""",
)  # fmt: skip
