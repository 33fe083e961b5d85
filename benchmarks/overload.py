"""The fraction of choices that a decode step drops, by batch and capacity factor.

    python -m benchmarks.overload --workdir=DIR [--steps=2000] [--tokens=50000]

A decode step of B texts routes B tokens, which share the slots of every expert. Here these are B
random tokens of held-out text: from all domains, or all from one domain, as if all users asked the
same. "uniform" instead draws K distinct experts for every token, all equally likely.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from moe_jax.analysis.routed import Routed, route_batches
from moe_jax.data import heldout_batches, open_data
from moe_jax.moe.part import MoE
from moe_jax.training.saved import load_run

BATCHES = (1, 4, 16, 64, 256)
FACTORS = (1.0, 1.25, 2.0)


def dropped_share(expert_NSK: np.ndarray, num_experts: int, num_slots: int) -> float:
    """The fraction of choices that exceed the slots of their expert, over N steps of S tokens.

    An expert with n choices and C slots drops max(n - C, 0) of them, in any queue order.

    Args:
      expert_NSK: integers in [0, E), or -1 for no choice.
      num_experts: E.
      num_slots: C.
    """
    steps = len(expert_NSK)
    is_choice = expert_NSK >= 0
    flat = np.arange(steps)[:, None, None] * num_experts + expert_NSK
    load_NE = np.bincount(flat[is_choice], minlength=steps * num_experts)
    return float(np.maximum(load_NE - num_slots, 0).sum() / is_choice.sum())


def of_all(routed: Routed, batch: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Choices [X, N, S, K] of S = `batch` random tokens of any domain, for N = `steps` steps."""
    return routed.expert_XJK[:, rng.integers(len(routed.token_J), size=(steps, batch))]


def of_one_domain(routed: Routed, batch: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """The same as `of_all`, with tokens of one domain per step; domains take turns."""
    places = [np.flatnonzero(routed.domain_J == d) for d in np.unique(routed.domain_J)]
    drawn = [rng.choice(places[step % len(places)], batch) for step in range(steps)]
    return routed.expert_XJK[:, np.array(drawn)]


def uniform(num_experts: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """K distinct experts of E for every token, all equally likely: [..., K]."""
    scores = rng.random((*shape[:-1], num_experts))
    return np.argsort(scores, axis=-1)[..., : shape[-1]]


def table(routed: Routed, moe: MoE, steps: int) -> Iterator[str]:
    """The lines of the table."""
    num_experts, num_selected = moe.num_experts, routed.expert_XJK.shape[-1]
    yield "| batch | factor | slots | trained | trained, one domain | uniform |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    rng = np.random.default_rng(0)
    for batch in BATCHES:
        mixed, alike = (draw(routed, batch, steps, rng) for draw in (of_all, of_one_domain))
        random = uniform(num_experts, mixed.shape, rng)
        for factor in FACTORS:
            slots = moe.capacity.num_slots(batch, num_experts, num_selected, factor)
            shares = (
                np.mean([dropped_share(layer, num_experts, slots) for layer in choices])
                for choices in (mixed, alike, random)
            )
            cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
            yield f"| {batch} | {factor:g} | {slots} | {cells} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="of a run with one kind of MoE layers")
    parser.add_argument("--steps", type=int, default=2000, help="decode steps of a row")
    parser.add_argument("--tokens", type=int, default=50_000, help="held-out tokens drawn from")
    arguments = parser.parse_args()
    config, state = load_run(arguments.workdir)
    [moe] = config.model.moe_parts.values()
    batches = heldout_batches(open_data(config.data), batch_size=config.training.batch_size)
    routed = route_batches(state, config.model, batches, arguments.tokens)
    fullest = np.mean([
        np.bincount(layer.ravel(), minlength=moe.num_experts).max() * moe.num_experts / layer.size
        for layer in routed.expert_XJK
    ])  # fmt: skip
    print(f"step {int(state.step)}: {len(routed.token_J):,} tokens, "
          f"{moe.num_experts} experts, {routed.expert_XJK.shape[-1]} a token; "
          f"the fullest expert of a layer has {fullest:.2f} times the mean\n")  # fmt: skip
    for line in table(routed, moe, arguments.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
