"""What regularises the fine-tuning of an MoE: dropout, expert dropout, capacity."""

from typing import Any

from experiments.finetuning_subsets.study import (
    BASE,
    PRETRAINED,
    PRETRAINED_ARM,
    SIZES,
    on_target,
    tuned,
)
from experiments.results import measured
from experiments.study import Arm, Published, Study
from experiments.verdict import Claim, every, not_above

RATES = (0.1, 0.2, 0.3)
# With one choice per token, a factor of 0.9 drops a tenth, as ST-MoE's runs at 0.75 did (10.6 %);
# here 0.75 would drop a quarter.
FACTORS = (0.9, 2.0)
EXPERT_DROPOUT = "model.parts.moe.expert_dropout_rate"
PLAIN = tuple(f"dropout_{rate}" for rate in RATES)


def capacity(factor: float, weight: float) -> Arm:
    """An arm with a capacity factor and a weight of the load-balance loss, which may be 0."""
    overrides: dict[str, Any] = {
        "model.parts.moe.capacity.train_factor": factor,
        "model.parts.moe.losses.load_balance.weight": weight,
    }
    name = f"capacity_{factor}" + ("" if weight else "_no_loss")
    label = f"capacity factor {factor}, " + ("balance loss" if weight else "no balance loss")
    return tuned(name, label, overrides, budget=f"capacity {factor}")


STUDY = Study(
    file=__file__,
    question="What do dropout, expert dropout, dropped experts and capacity do in fine-tuning?",
    published=(
        Published(
            "GLUE and SuperGLUE at dropout 0.1, 0.2, 0.3, and 0.1 with 0.4 on experts",
            "84.7, 84.4, 83.9, 85.2 and 73.0, 73.2, 70.7, 73.0",
            "Switch Transformers (arXiv:2101.03961), table 4",
            measured("target", *PLAIN, "expert_0.4"),
        ),
        Published(
            "SuperGLUE where 10.6 % of the tokens are dropped (capacity factor 0.75, top-2; here "
            "0.9, top-1: 10 % or more) and where none are (2.0)",
            "86.5, 85.8 with the balance loss; 85.7 (15.6 % dropped), 85.9 without",
            "ST-MoE (arXiv:2202.08906), table 5",
            measured(
                "target",
                *(f"capacity_{factor}{loss}" for loss in ("", "_no_loss") for factor in FACTORS),
            ),
        ),
    ),
    base=BASE,
    sizes=SIZES,
    arms=(
        PRETRAINED_ARM,
        tuned("all", "no dropout", {}),
        *(
            tuned(f"dropout_{rate}", f"dropout {rate}", {"model.dropout_rate": rate})
            for rate in RATES
        ),
        tuned(
            "expert_0.4",
            "dropout 0.1, on experts 0.4",
            {"model.dropout_rate": 0.1, EXPERT_DROPOUT: 0.4},
        ),
        tuned("dropped_0.1", "experts dropped at 0.1", {"model.parts.moe.router.drop_rate": 0.1}),
        *(capacity(factor, weight) for factor in FACTORS for weight in (0.01, 0.0)),
    ),
    baseline=PRETRAINED,
    measures=("target", "others", "train", "dropped_fraction"),
    outcome=("target", "bits per byte of python"),
    measure=on_target,
    seeds=(0, 1, 2, 3, 4),
    expect=(
        Claim(
            "Dropout 0.1 with expert dropout 0.4 ends less than 0.03 bits above each of the plain "
            "dropouts 0.1, 0.2 and 0.3.",
            every(not_above("expert_0.4", plain, "target") for plain in PLAIN),
            settles="Dropout on experts costs less than 0.03 bits in fine-tuning.",
        ),
        Claim(
            "With the balance loss a capacity factor of 0.9, which drops a tenth of the tokens or "
            "more, ends above one of 2.0 by less than 0.03 bits.",
            not_above("capacity_0.9", "capacity_2.0", "target"),
            settles="Tokens that are dropped cost less than 0.03 bits in fine-tuning.",
        ),
        Claim(
            "At a capacity factor of 0.9 the balance loss ends above none by less than 0.03 bits.",
            not_above("capacity_0.9", "capacity_0.9_no_loss", "target"),
        ),
    ),
    notes="""\
* The data, the model and the pretrained arm are those of
  [finetuning_subsets](../finetuning_subsets/README.md).
* The published margins are half a point of GLUE and less: no direction is asked for, only that the
  recommended setting does no harm.
* Dropped tokens cost little, not nothing: the interval of the second claim excludes 0. Without the
  balance loss a factor of 0.9 ends 0.018 above one of 2.0, from 0.009 to 0.027.
* Before these runs, on 2026-11-29, the comparison with no dropout was taken out of the first claim,
  and 0.9 took the place of a factor of 0.75.
* Held-out text is scored without a capacity, so that training alone differs between the arms.
* The difference of held-out and training loss is not compared: dropout is on in training.
* Three rows lack versions: the packages were installed anew while these runs were going. Their
  processes had loaded the versions of the other rows before.""",
)
