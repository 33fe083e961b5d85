"""One to eight experts per token at equal active FLOPs."""

from ml_collections import ConfigDict

from experiments.results import LOSS, measured
from experiments.study import NO_EXPERTS, Arm, Published, Study
from experiments.switch_against_dense.study import STUDY as SWITCH
from experiments.verdict import Claim, every, lower, not_above
from moe_jax.moe.routing.token_choice import TokenChoice

EXPERTS, CHOICES = (16, 32), (1, 2, 4, 8)
# Arms of equal parameters: one with more, narrower experts per token, and its counterpart.
EQUAL_PARAMETERS = {"top2_32": "top1_16", "top4_32": "top2_16", "top8_32": "top4_16"}


def choices(count: int, selected: int) -> Arm:
    """An arm with `selected` of `count` experts per token, narrower by the factor `selected`."""

    def width(config: ConfigDict) -> int:
        return config.model.parts.mlp.dim // selected

    return Arm(
        f"top{selected}_{count}",
        f"{selected} of {count} experts, 1/{selected} wide",
        {
            "model.parts.moe.num_experts": count,
            "model.parts.moe.num_selected_experts": selected,
            "model.parts.moe.expert_dim": width,
            "model.parts.moe.router": TokenChoice(renormalize=selected > 1),
        },
    )


STUDY = Study(
    file=__file__,
    question="How many experts should a token have, at equal active FLOPs?",
    published=(
        Published(
            "negative log perplexity at equal slots, factor 1.25, evaluated at 2.0: top-1, top-2 "
            "(published of whole experts, as many of both; here dropless, 16 whole and 32 halves)",
            "-1.373, -1.369",
            "ST-MoE (arXiv:2202.08906), table 8",
            measured(LOSS, "top1_16", "top2_32"),
        ),
        Published(
            "the same at factor 2.0, evaluated at 3.0: top-2, top-3 (here top-4 in place of top-3, "
            "of halves of the experts of top-2)",
            "-1.359, -1.356",
            "ST-MoE (arXiv:2202.08906), table 8",
            measured(LOSS, "top2_16", "top4_32"),
        ),
        Published(
            "experts of a token in released models: Switch, Mixtral, DeepSeek-V3 and OLMoE, Qwen3",
            "1, 2, 8, 8",
            "their papers",
            measured(LOSS, *(f"top{k}_32" for k in CHOICES)),
        ),
    ),
    base={
        **SWITCH.base,
        "model.parts.moe.group_size": 0,
        "model.parts.moe.capacity.train_factor": 0.0,
        "model.parts.moe.capacity.eval_factor": 0.0,
    },
    sizes={
        # Wide enough for the cost of a router of 32 outputs to be small.
        "smoke": SWITCH.sizes["smoke"] | {"model.parts.mlp.dim": 1024},
        "small": SWITCH.sizes["small"] | {"training.num_steps": 1200},
        "gpu": SWITCH.sizes["gpu"] | {"model.parts.moe.group_size": 0},
        "base": SWITCH.sizes["base"] | {"model.parts.moe.group_size": 0},
    },
    arms=(
        Arm("dense", "dense", NO_EXPERTS),
        *(choices(count, selected) for count in EXPERTS for selected in CHOICES),
    ),
    baseline="dense",
    seeds=(0, 1, 2, 3, 4),
    measures=("max_violation", "router_entropy"),
    expect=(
        Claim(
            "Every number of experts a token ends below the dense model.",
            every(lower(f"top{k}_{count}", "dense") for count in EXPERTS for k in CHOICES),
        ),
        Claim(
            "At equal parameters twice the experts a token, of half the width, are no worse, by "
            "0.03 bits or more: top-2 than top-1, 4 than 2, 8 than 4.",
            every(not_above(more, fewer) for more, fewer in EQUAL_PARAMETERS.items()),
            settles="Two experts a token are no worse than one, at the same cost.",
        ),
    ),
    notes="""\
* K experts of 1/K of the width: active FLOPs are equal but for the router. Of one number of
  experts more a token means fewer parameters; 32 experts with 2 K a token have those of 16 with K.
* Dropless, so that no capacity favours one K. ST-MoE's table holds slots equal instead: second
  choices get what first choices leave.
* Published differences between top-1, 2 and 3 are 0.003 to 0.006: no direction is asked for among
  them. [granularity](../granularity/README.md) asks for that of width at equal parameters.
* The gate of one expert is its probability; those of several sum to 1.""",
)
