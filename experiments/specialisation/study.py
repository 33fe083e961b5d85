"""What experts specialise in: domains or tokens, by depth and by scope of the balance loss."""

import pathlib
from collections.abc import Callable

from experiments.balance.study import RATES, loads, loss_arm, times
from experiments.balance.study import STUDY as BALANCE
from experiments.results import Results, measured
from experiments.routing_measures import routing_of
from experiments.study import NO_EXPERTS, Arm, Published, Study
from experiments.verdict import Claim, Finding, every, in_every_seed, ratio, seed_by_seed
from moe_jax.moe.bias import SignUpdate

SPECIALISES = "Experts specialise by domain or token."
RATE = RATES[1]
BALANCED = ("switch_global_0.1", f"loss_free_{RATE}")


def over(name: str, baseline: str, arm: str, least: float) -> Callable[[Results], Finding]:
    """The claim that the bits of a category are at least `least` times a baseline's."""
    both = [(arm, f"{name}_{of}") for of in ("bits", baseline)]
    what = f"{name} bits of {arm} over {baseline.replace('_', ' ')}"
    return lambda results: in_every_seed(what, seed_by_seed(results, ratio, *both), least=least)


def load_and_routing(workdir: pathlib.Path) -> dict[str, float]:
    """Balance measures on the whole held-out split, and routing measures on a part of it."""
    return loads(workdir) | routing_of(workdir)


STUDY = Study(
    file=__file__,
    question="Do experts specialise in domains or in tokens, at which depth, and what forbids it?",
    published=(
        Published(
            "same first choice of neighbouring tokens, by domain: layers 0, 15 and 31 (of 8 "
            "experts; 12.5 % at random)",
            "about 14, 26 and 23 %, much alike in all domains: no domain has experts of its own",
            "Mixtral (arXiv:2401.04088), table 5",
            measured("domain_bits", *BALANCED),
        ),
        Published(
            "perplexity with a balance loss over microbatches and over the global batch",
            "8.167, 8.038; experts of domains in the latter alone",
            "Qiu et al., global-batch balance (arXiv:2501.11873), table 1",
            measured("domain_information", "switch_micro_0.1", "switch_global_0.1"),
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
        "domain_by_ids",
        "domain_shuffled",
        "domain_information",
        "domain_first",
        "domain_last",
        "token_bits",
        "token_shuffled",
        "token_first",
        "token_last",
    ),
    measure=load_and_routing,
    expect=(
        Claim(
            "Where the global batch is balanced, the domain of a token says half as many bits "
            "again of its expert as the ids of tokens explain, in every seed.",
            every(over("domain", "by_ids", arm, 1.5) for arm in BALANCED),
            settles=SPECIALISES,
        ),
        Claim(
            "The id of a token says three times as many bits of its expert as of shuffled routing, "
            "in every seed.",
            every(over("token", "shuffled", arm, 3.0) for arm in BALANCED),
        ),
        Claim(
            "A balance loss over microbatches of one domain each forbids experts of domains: over "
            "the global batch the domain says twice as many bits, in every seed.",
            times("domain_information", "switch_global_0.1", "switch_micro_0.1", least=2.0),
        ),
    ),
    notes="""\
* Arms and data are those of [balance](../balance/README.md). Bits are mutual information of a
  held-out choice with the domain of its sequence, and with the id of its token, of 262,144 tokens;
  "domain information" is of the whole held-out split.
* Shuffled: the same routing dealt out to the tokens anew. It has the load of every expert and the
  size of every domain, and what a finite number of tokens shows by chance. By ids: dealt out among
  tokens of the same id. A router that reads nothing but the byte has all of its domain bits so.
* The first criterion was three times the shuffled bits, of 16,384 tokens. A router by a hash of the
  byte, which learns nothing, would have passed it. It was changed before any run was measured.
* The second claim stayed, and that router would meet it: 400 times the shuffled bits were measured,
  and 300 without balancing. It decides nothing on the top page.
* The first claim is not Mixtral's measure: the domain tells more of the expert than ids do, 0.2 to
  0.3 of the 3 bits of two in 16 experts, and no domain has experts of its own. The losses
  under the two balance losses cannot be told apart: global less micro, -0.012, from -0.034 to
  +0.009 bits a byte.
* First and last are the outermost MoE layers, less shuffled. No claim rests on depth: published
  findings differ.
* At `small` a token is a byte, whose id says much of what it can be.""",
)
