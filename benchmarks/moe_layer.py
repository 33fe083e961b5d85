"""The MoE layer of every dispatcher against a dense FFN of equal active FLOPs.

    python -m benchmarks.moe_layer [--shape=a] [--peers]

Prints, for forward and forward+backward, the time over that of the dense FFN (M -> K * H -> M) in
the same interleaved run, median of the rounds with their range, and the peak temporary memory of
forward+backward as the compiler states it. Routing is part of an MoE layer's time; the gradient is
with respect to input, router and experts. `--peers` adds layers of other systems that are installed
(transformers' grouped_mm experts, st-moe-pytorch); without a GLU of equal size, transformers' runs
with two thirds of H, which costs the same.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.config import BalanceConfig, CapacityConfig, MoEConfig
from moe_jax.moe.block import moe_block
from moe_jax.moe.experts import Shared, ffn
from moe_jax.moe.parameters import ffn_specs, init_parameters, moe_specs

SEQUENCES, LENGTH, MODEL_DIM = 8, 512, 256


@dataclasses.dataclass(frozen=True)
class Shape:
    """An MoE layer to time; 8 sequences of 512 tokens, model dim 256."""

    num_experts: int
    num_selected: int
    expert_dim: int
    activation: str


SHAPES = {
    "a": Shape(8, 1, 1024, "relu"),
    "b": Shape(8, 2, 1024, "relu"),
    "c": Shape(32, 2, 1024, "relu"),
    "d": Shape(64, 8, 256, "swiglu"),
}
# name: (dispatcher, capacity factor)
FORMS = {
    "einsum, factor 1.25": ("einsum", 1.25),
    "gather, factor 1.25": ("gather", 1.25),
    "ragged, factor 1.25": ("ragged", 1.25),
    "ragged, dropless": ("ragged", 0.0),
}

Run = Callable[[], None]


@dataclasses.dataclass
class Candidate:
    """A layer to time: its two programs and the temporary memory of the second, in MB."""

    forward: Run
    forward_backward: Run
    megabytes: float | None = None


def jax_candidate(function: Callable[..., jax.Array], *operands: object) -> Candidate:
    """Compiles a function and its gradient with respect to all operands."""
    forward = jax.jit(function).lower(*operands).compile()

    def loss(*arguments: object) -> jax.Array:
        return jnp.sum(jnp.sin(function(*arguments)))

    positions = tuple(range(len(operands)))
    backward = jax.jit(jax.grad(loss, positions)).lower(*operands).compile()
    megabytes = backward.memory_analysis().temp_size_in_bytes / 1e6
    return Candidate(
        lambda: jax.block_until_ready(forward(*operands)),
        lambda: jax.block_until_ready(backward(*operands)),
        megabytes,
    )


def moe_config(shape: Shape, dispatch: str, factor: float) -> MoEConfig:
    """The layer's settings; balance losses are left out, as in the peers' layers."""
    return MoEConfig(
        num_experts=shape.num_experts,
        num_selected_experts=shape.num_selected,
        expert_dim=shape.expert_dim,
        activation=shape.activation,
        dispatch=dispatch,
        capacity=CapacityConfig(train_factor=factor),
        balance=BalanceConfig(load_balance_weight=0.0),
    )


def candidates(shape: Shape) -> dict[str, Candidate]:
    """The dense floor first, then our dispatchers and perfectly balanced experts alone."""
    key = jax.random.key(0)
    x_BLM = jax.random.normal(jax.random.fold_in(key, 1), (SEQUENCES, LENGTH, MODEL_DIM))
    gated = shape.activation == "swiglu"

    def dense_params(num_experts: int | None, hidden: int) -> dict[str, jax.Array]:
        specs = ffn_specs(
            MODEL_DIM, hidden, gated=gated, use_bias=False, init_scale=1.0, num_experts=num_experts
        )
        return init_parameters(key, specs)

    def dense(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return ffn(x, params, shape.activation, Shared())

    def balanced(params: dict[str, jax.Array], x_EJM: jax.Array) -> jax.Array:
        return jax.vmap(lambda p, x: ffn(x, p, shape.activation, Shared()))(params, x_EJM)

    made = {
        "dense FFN": jax_candidate(
            dense, dense_params(None, shape.num_selected * shape.expert_dim), x_BLM
        )
    }
    rows = SEQUENCES * LENGTH * shape.num_selected // shape.num_experts
    x_EJM = jax.random.normal(key, (shape.num_experts, rows, MODEL_DIM))
    params = dense_params(shape.num_experts, shape.expert_dim)
    made["balanced experts alone"] = jax_candidate(balanced, params, x_EJM)
    for name, (dispatch, factor) in FORMS.items():
        config = moe_config(shape, dispatch, factor)
        params = init_parameters(key, moe_specs(config, MODEL_DIM))

        def layer(p: dict[str, jax.Array], x: jax.Array, c: MoEConfig = config) -> jax.Array:
            return moe_block(p, x, c)[0]

        made[name] = jax_candidate(layer, params, x_BLM)
    return made


def ratios(made: dict[str, Candidate], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Times every candidate right after the dense floor, in turn, and divides."""
    names = list(made)
    result: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for program in (0, 1):

        def seconds(name: str, program: int = program) -> float:
            run = made[name].forward_backward if program else made[name].forward
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        for name in names:
            seconds(name)
        for _ in range(rounds):
            for name in names:
                before = seconds(names[0])
                taken = seconds(name)
                floor = (before + seconds(names[0])) / 2
                result[name][program].append(taken / floor)
    return result


def show(title: str, made: dict[str, Candidate], rounds: int) -> None:
    """Prints the table of one shape."""
    print(f"\n{title}")
    print(f"{'form':<28}{'forward':>22}{'forward+backward':>22}{'temp MB':>10}")
    for name, programs in ratios(made, rounds).items():
        cells = [f"{statistics.median(r):.2f} [{min(r):.2f}, {max(r):.2f}]" for r in programs]
        megabytes = made[name].megabytes
        memory = "" if megabytes is None else f"{megabytes:.0f}"
        print(f"{name:<28}{cells[0]:>22}{cells[1]:>22}{memory:>10}", flush=True)


def main() -> None:
    """Times the shapes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="one shape only")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", action="store_true", help="layers of other installed systems")
    arguments = parser.parse_args()
    for name in [arguments.shape] if arguments.shape else sorted(SHAPES):
        made = candidates(SHAPES[name])
        if arguments.peers:
            from benchmarks.moe_layer_peers import peer_candidates

            peers = peer_candidates(SHAPES[name], SEQUENCES, LENGTH, MODEL_DIM)
            made |= {key: Candidate(*programs) for key, programs in peers.items()}
        show(f"({name}) {SHAPES[name]}", made, arguments.rounds)


if __name__ == "__main__":
    main()
