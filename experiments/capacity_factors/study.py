"""Top-1 and top-2 by capacity factor; the factor multiplies tokens or choices."""

import pathlib
import statistics
from collections.abc import Callable
from operator import sub

from experiments.results import LOSS, Results, measured
from experiments.scoring import open_run, sample_loss
from experiments.study import LOOKS_AHEAD, NO_EXPERTS, Arm, Published, Study
from experiments.switch_against_dense.study import STUDY as SWITCH
from experiments.verdict import (
    Claim,
    Finding,
    every,
    in_every_seed,
    least_fall,
    lower,
    not_above,
    seed_by_seed,
)
from moe_jax.moe.queues import ChoiceMajor
from moe_jax.training.files import EVALUATION_FILE, read_json

# Judges the results of a study.
Expected = Callable[[Results], Finding]
FACTORS = (1.0, 1.25, 2.0)
# Slots are counted for the K choices of a token ("assignment") or for one ("token", as published).
# With K = 1 both are the same.
FAMILIES = ("top1", "top2_assignment", "top2_token")
ASSIGNMENTS = ("top1", "top2_assignment")
DENSE = {1.0: "dense", 1.25: "dense_1.25", 2.0: "dense_2.0"}  # by cost, in experts per token


def crossed(workdir: pathlib.Path) -> dict[str, float]:
    """Held-out bits per byte of one checkpoint at every capacity factor, on one sample.

    A dense model has no capacity: its capacity-limited loss is its loss.
    """
    config, state, data = open_run(workdir)
    moe = config.model.part.get("moe")
    if moe is None or moe.num_experts == 1:
        return {"capacity_limited": read_json(workdir / EVALUATION_FILE)["dropless"][LOSS]}
    return {
        f"evaluated_at_{factor}": sample_loss(config, data, state, capacity=factor)
        for factor in FACTORS
    }


def gain(family: str, factor: float) -> list[tuple[str, str]]:
    """The measures of a gain: the loss at the training factor, and the loss at 2.0."""
    return [(f"{family}_{factor}", f"evaluated_at_{at}") for at in (factor, 2.0)]


def gains(family: str, factor: float) -> Expected:
    """The claim that evaluation at factor 2.0 is better than at the training factor."""
    what = f"{family}_{factor} evaluated at {factor} less at 2.0, bits/byte"
    both = gain(family, factor)
    return lambda results: in_every_seed(what, seed_by_seed(results, sub, *both), least=1e-4)


def gains_less(family: str) -> Expected:
    """The claim that the gain from factor 2.0 is smaller after training with more capacity."""

    def less(tight: float, tight_wide: float, loose: float, loose_wide: float) -> float:
        return (tight - tight_wide) - (loose - loose_wide)

    what = f"{family}: gain after 1.0 less gain after 1.25"
    four = [*gain(family, 1.0), *gain(family, 1.25)]
    return lambda results: in_every_seed(what, seed_by_seed(results, less, *four), least=0)


def drops(arm: str, most: float) -> Expected:
    """The claim that an arm drops at most this fraction of choices."""
    what = f"dropped choices of {arm}"
    return lambda results: in_every_seed(
        what, results.values(arm, "dropped_fraction"), least=0.0, most=most
    )


def drops_less(family: str) -> Expected:
    """The claim that a larger factor drops less."""
    what = f"{family}: least fall of dropped choices"
    three = [(f"{family}_{factor}", "dropped_fraction") for factor in FACTORS]
    return lambda results: in_every_seed(what, seed_by_seed(results, least_fall, *three), least=0)


def names(family: str) -> list[str]:
    """The arms of a family."""
    return [f"{family}_{factor}" for factor in FACTORS]


def experts_of_a_token(family: str, factor: float) -> float:
    """Experts per token: its choices, or the slots per token if there are fewer."""
    return {"top1": 1.0, "top2_assignment": 2.0, "top2_token": factor}[family]


def dense_twin(family: str, factor: float) -> str:
    """The dense model of equal cost."""
    return DENSE[experts_of_a_token(family, factor)]


def dropless_twin(family: str) -> str:
    """The dense model with the cost of a dropless family, since losses are measured dropless."""
    return DENSE[1.0 if family == "top1" else 2.0]


def evaluations(results: Results) -> str:
    """Loss at the training factor and at 2.0, of arms trained with less than 2.0."""
    cells = []
    for arm, factor in [(f"{f}_{c}", c) for f in FAMILIES for c in FACTORS[:-1]]:
        found = [results.values(arm, f"evaluated_at_{c}").values() for c in (factor, 2.0)]
        if all(found):
            cells.append(f"{arm} " + " / ".join(f"{statistics.fmean(v):.4f}" for v in found))
    return ", ".join(cells) or "no runs"


def family_arms(family: str) -> tuple[Arm, ...]:
    """A family at every capacity factor, evaluated at its training factor.

    Slots per token follow Mesh TensorFlow, where all first choices precede second choices.
    """
    selected = 1 if family == "top1" else 2
    by_token = {
        "model.parts.moe.capacity.per": "token",
        "model.parts.moe.capacity.queue": ChoiceMajor(),
        **LOOKS_AHEAD,
    }
    return tuple(
        Arm(
            f"{family}_{factor}",
            f"{family.replace('_', ' per ')}, factor {factor}",
            {
                "model.parts.moe.num_selected_experts": selected,
                "model.parts.moe.router.renormalize": selected > 1,
                "model.parts.moe.capacity.train_factor": factor,
                "model.parts.moe.capacity.eval_factor": factor,
                **(by_token if family == "top2_token" else {}),
            },
            budget=f"experts: {experts_of_a_token(family, factor)}",
            against=dropless_twin(family),
        )
        for factor in FACTORS
    )


def dense_arms() -> tuple[Arm, ...]:
    """A dense model and wider ones: an FFN of equal cost replaces the experts."""
    dense = Arm(DENSE[1.0], "dense, cost of one expert", NO_EXPERTS, budget="experts: 1.0")
    return dense, *(
        Arm(
            name,
            f"dense, cost of {cost:g} experts",
            {
                "model.parts.moe.num_experts": 1,
                "model.parts.moe.num_selected_experts": 1,
                "model.parts.moe.expert_dim": lambda config, cost=cost: int(
                    cost * config.model.parts.mlp.dim
                ),
            },
            budget=f"experts: {cost}",
        )
        for cost, name in DENSE.items()
        if cost > 1
    )


STUDY = Study(
    file=__file__,
    question="What do a second expert and more capacity buy, in both conventions of capacity?",
    published=(
        Published(
            "Switch-Base (top-1), factor 2.0 / 1.25 / 1.0, negative log perplexity",
            "-1.554 / -1.553 / -1.561",
            "Switch Transformers (arXiv:2101.03961), table 1",
            measured("capacity_limited", *names("top1")),
        ),
        Published(
            "MoE-Base (top-2, slots per token), factor 2.0 / 1.25 / 1.0",
            "-1.547 / -1.559 / -1.572; dense T5-Base -1.731",
            "Switch Transformers (arXiv:2101.03961), table 1",
            measured("capacity_limited", *names("top2_token")),
        ),
        Published(
            "evaluation at the training factor, and at 2.0: top-1 at 1.0 and 1.25; top-2 alike",
            "-1.397 / -1.384, -1.378 / -1.373; -1.392 / -1.378, -1.375 / -1.369",
            "ST-MoE (arXiv:2202.08906), table 8",
            evaluations,
        ),
    ),
    base={
        **SWITCH.base,
        "model.parts.moe.num_experts": 16,
    },
    sizes={
        "smoke": {**SWITCH.sizes["smoke"], "training.evaluation_batches": 0},
        "small": {**SWITCH.sizes["small"], "training.num_steps": 1200},
        "gpu": SWITCH.sizes["gpu"],
        "base": SWITCH.sizes["base"],
    },
    arms=(
        *dense_arms(),
        *(arm for family in FAMILIES for arm in family_arms(family)),
    ),
    baseline="dense",
    seeds=(0, 1, 2, 3, 4),
    measures=(
        "capacity_limited",
        *(f"evaluated_at_{factor}" for factor in FACTORS),
        "dropped_fraction",
    ),
    measure=crossed,
    expect=(
        Claim(
            "Every arm of experts ends below the dense model of its cost: dropless where slots "
            "are counted by assignment; within its capacity where they are counted by token, "
            "which looks ahead.",
            every(
                [
                    *(lower(f"{f}_{c}", dropless_twin(f)) for f in ASSIGNMENTS for c in FACTORS),
                    *(
                        lower(f"top2_token_{c}", dense_twin("top2_token", c), "capacity_limited")
                        for c in FACTORS
                    ),
                ]
            ),
        ),
        Claim(
            "Loss does not rise with capacity, evaluated at the training factor, by 0.03 bits or "
            "more.",
            every(
                not_above(f"{f}_{b}", f"{f}_{a}", "capacity_limited")
                for f in FAMILIES
                for a, b in ((1.0, 1.25), (1.25, 2.0))
            ),
        ),
        Claim(
            "A checkpoint trained at 1.0 or 1.25 is better evaluated at 2.0 than at its own "
            "factor, by 0.0001 bits a byte or more, in every seed.",
            every(gains(f, c) for f in FAMILIES for c in (1.0, 1.25)),
            settles="After training with little capacity, evaluating with more is better.",
        ),
        Claim(
            "That gain is no larger after training at 1.25 than at 1.0, in every seed.",
            every(gains_less(f) for f in FAMILIES),
        ),
        Claim(
            "More capacity drops no more choices, and at 1.25 fewer than 5 % are dropped in the "
            "second half of training, where slots are counted by assignment.",
            every(
                [
                    *(drops_less(f) for f in FAMILIES),
                    # Our bound. It was 3 % until `switch_16` of switch_against_dense, which is
                    # top1_1.25 for twice the steps, was seen to drop 4.2, 3.8 and 4.0 %.
                    *(drops(f"{f}_1.25", most=0.05) for f in ASSIGNMENTS),
                ]
            ),
        ),
    ),
    notes="""\
* 16 experts in every second layer; data, tokenizer and model as in
  [switch_against_dense](../switch_against_dense/README.md). Top-2 gates sum to 1, as in GShard.
* Top-1 is the same in both conventions. Top-2 by assignment costs two experts a token. By token,
  as published, it fills no more slots than top-1 does at the same factor: second choices get what
  first choices leave, and what has no slot is not computed. Bits per byte are dropless: both
  experts of top-2 compute then, whatever it was trained with. So the table compares all of top-2
  with a dense model of the cost of two experts, of a wider FFN in their place.
* The first claim compares top-2 by token at the cost of its training, as published: its
  capacity-limited loss with that of a dense model of 1, 1.25 or 2 experts. Until 2026-11-30 it
  compared dropless losses with a dense model of two experts, of twice the cost at 1.0. A claim that
  by token at least (2 - factor) / 2 of the choices are dropped was deleted on that day: there are
  not slots enough, so that it could not fail. No run had been made.
* That queue serves all first choices of a batch before the second ones, so that a later token can
  take the slot of an earlier one's second choice. The capacity-limited columns of "top2 per token"
  look ahead that much; [future_leaks](../future_leaks/README.md) says how little it is worth. Bits
  per byte are dropless, where there is no queue.
* No direction is asked for between top-1 and top-2: published differences are 0.006 to 0.011.
  Nor is an order of step times, which this machine does not measure well enough; minutes stand
  in the table.
* Known beforehand: `top1_1.25` at `small` is `switch_16` of switch_against_dense for half of the
  steps. That dropped 4.2, 3.8 and 4.0 % in the second half of its 2,400 steps. Early routing is
  less even, so that the bound of 5 % can be missed.
* `small` was not timed as a whole: 60 runs of 4.9 M bytes, of six minutes at 13,000 tokens a
  second and core: three hours on two cores.""",
)
