"""What experts specialise in: domain and token, by depth, and by what the balance loss is over."""

from collections.abc import Callable

from experiments.balance.study import RATES, loss_arm, times
from experiments.balance.study import STUDY as BALANCE
from experiments.results import Results, measured
from experiments.routing_measures import routing_of
from experiments.study import NO_EXPERTS, Arm, Published, Study
from experiments.verdict import Claim, Finding, every, in_every_seed
from moe_jax.analysis.paired import shared_seeds
from moe_jax.moe.bias import SignUpdate

SPECIALISES = "Experts specialise by domain or token."
RATE = RATES[1]
BALANCED = ("switch_global_0.1", f"loss_free_{RATE}")


def over_shuffled(name: str, arm: str, least: float) -> Callable[[Results], Finding]:
    """The claim that a category says so many times what it says of shuffled routing."""

    def judge(results: Results) -> Finding:
        own, shuffled = (results.values(arm, f"{name}_{of}") for of in ("bits", "shuffled"))
        ratios = {s: own[s] / max(shuffled[s], 1e-9) for s in shared_seeds([own, shuffled])}
        return in_every_seed(f"{name} bits of {arm} over shuffled", ratios, least=least)

    return judge


STUDY = Study(
    name="specialisation",
    question="Do experts specialise in domains or in tokens, at which depth, and what forbids it?",
    published=(
        Published(
            "same first choice of neighbouring tokens, by domain: layers 0, 15 and 31 (of 8 "
            "experts; 12.5 % at random)",
            "about 14, 27 and 23 %, much alike in all domains: no domain has experts of its own",
            "Mixtral (arXiv:2401.04088), table 5",
            measured("domain_bits", *BALANCED),
        ),
        Published(
            "perplexity with a balance loss over microbatches and over the global batch",
            "8.167, 8.038; experts of domains in the latter alone",
            "Qiu et al., global-batch balance (arXiv:2501.11873), table 1",
            measured("domain_bits", "switch_micro_0.1", "switch_global_0.1"),
        ),
    ),
    base=BALANCE.base,
    sizes=BALANCE.sizes,
    arms=(
        Arm("dense", "dense", NO_EXPERTS),
        Arm("none", "no balancing", {}),
        loss_arm("global", 0.1),
        loss_arm("microbatch", 0.1),
        Arm(
            f"loss_free_{RATE}",
            f"loss-free, rate {RATE}",
            {"model.parts.moe.bias": SignUpdate(rate=float(RATE))},
        ),
    ),
    baseline="dense",
    measures=(
        "domain_bits",
        "domain_shuffled",
        "domain_first",
        "domain_last",
        "token_bits",
        "token_shuffled",
        "token_first",
        "token_last",
    ),
    measure=routing_of,
    expect=(
        Claim(
            "Where the global batch is balanced, the domain of a token says three times as many "
            "bits of its expert as of shuffled routing, in every seed.",
            every(over_shuffled("domain", arm, 3.0) for arm in BALANCED),
            settles=SPECIALISES,
        ),
        Claim(
            "So does the id of a token.",
            every(over_shuffled("token", arm, 3.0) for arm in BALANCED),
            settles=SPECIALISES,
        ),
        Claim(
            "A balance loss over microbatches of one domain each forbids experts of domains: over "
            "the global batch the domain says twice as many bits, in every seed.",
            times("domain_bits", "switch_global_0.1", "switch_micro_0.1", least=2.0),
        ),
    ),
    notes="""\
* Arms and data are those of [balance](../balance/README.md). Bits are mutual information of a
  held-out choice with the domain of its sequence, and with the id of its token, of 16,384 tokens.
* Shuffled: the same routing dealt out to the tokens anew. It has the load of every expert and the
  size of every domain, and what a finite number of tokens shows by chance.
* First and last are the outermost MoE layers, less shuffled. No claim rests on depth: published
  findings differ.
* At `small` a token is a byte, whose id says much of what it can be.""",
)
