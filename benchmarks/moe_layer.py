"""The MoE layer with every way to run experts, against a dense FFN of equal active FLOPs.

    python -m benchmarks.moe_layer [--shape=a] [--peers] [--against=DIR]

Prints, for forward and forward+backward, the time over that of the dense FFN (M -> K * H -> M) in
the same interleaved run, as the median of the rounds with their range, and the compiler's peak
temporary memory of forward+backward. Routing is part of an MoE layer's time; the gradient is with
respect to input, router and experts. `--peers` adds installed layers of other systems
(transformers' grouped_mm experts, st-moe-pytorch). Where our experts have no GLU, transformers'
have two thirds of H, which costs the same. `--against` also prints the time of every form over that
of the same form in another checkout of this repository, measured in the same way.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import Checkout, Run, cell, ratios
from moe_jax.config.kinds import load_kind
from moe_jax.moe.activations import Activation
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.part import MoE
from moe_jax.parameters import SAME_WEIGHTS, ffn_specs, init_parameters
from moe_jax.part import Call, Dims

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
# name: (way to run experts, capacity factor)
FORMS = {
    "einsum, factor 1.25": ("einsum", 1.25),
    "gather, factor 1.25": ("gather", 1.25),
    "ragged, factor 1.25": ("ragged", 1.25),
    "ragged, dropless": ("ragged", 0.0),
}

PROGRAMS = ("forward", "forward_backward")
OTHER_PROGRAMS = """
from benchmarks.moe_layer import SHAPES, candidates
programs = {{
    f"{{name}}/{{program}}": getattr(candidate, program)
    for name, candidate in candidates(SHAPES[{shape!r}]).items()
    for program in {programs}
}}
"""


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
    memory = backward.memory_analysis()
    assert memory is not None
    return Candidate(
        lambda: jax.block_until_ready(forward(*operands)),
        lambda: jax.block_until_ready(backward(*operands)),
        memory.temp_size_in_bytes / 1e6,
    )


def activation_of(shape: Shape) -> Activation:
    """The activation of the shape."""
    activation = load_kind("activation", shape.activation)()
    assert isinstance(activation, Activation)
    return activation


def moe_layer(shape: Shape, run_experts: str, factor: float) -> MoE:
    """The layer's settings, without balance losses, as in the peers' layers."""
    return MoE(
        num_experts=shape.num_experts,
        num_selected_experts=shape.num_selected,
        expert_dim=shape.expert_dim,
        activation=activation_of(shape),
        run_experts=run_experts,
        capacity=Capacity(train_factor=factor),
        losses=(),
    )


def candidates(shape: Shape) -> dict[str, Candidate]:
    """The dense floor, our forms, and perfectly balanced experts without routing."""
    key = jax.random.key(0)
    x_BLM = jax.random.normal(jax.random.fold_in(key, 1), (SEQUENCES, LENGTH, MODEL_DIM))
    experts = FeedForward(activation_of(shape))

    def dense_params(num_experts: int | None, hidden: int) -> Any:
        specs = ffn_specs(
            MODEL_DIM, hidden, "experts", gated=experts.activation.gated, use_bias=False,
            init_scale=1.0, num_experts=num_experts,
        )  # fmt: skip
        return init_parameters(key, specs)

    def dense(params: Any, x: jax.Array) -> jax.Array:
        return experts(x, params, SAME_WEIGHTS)

    def balanced(params: Any, x_EJM: jax.Array) -> jax.Array:
        return jax.vmap(dense)(params, x_EJM)

    made = {
        "dense FFN": jax_candidate(
            dense, dense_params(None, shape.num_selected * shape.expert_dim), x_BLM
        )
    }
    rows = SEQUENCES * LENGTH * shape.num_selected // shape.num_experts
    x_EJM = jax.random.normal(key, (shape.num_experts, rows, MODEL_DIM))
    params = dense_params(shape.num_experts, shape.expert_dim)
    made["balanced experts alone"] = jax_candidate(balanced, params, x_EJM)
    for name, (run_experts, factor) in FORMS.items():
        moe = moe_layer(shape, run_experts, factor)
        params = init_parameters(key, moe.specs(Dims(MODEL_DIM)))

        def layer(p: Any, x: jax.Array, moe: MoE = moe, factor: float = factor) -> jax.Array:
            return moe_block(p, x, moe, Call(capacity=factor))[0]

        made[name] = jax_candidate(layer, params, x_BLM)
    return made


def show(title: str, made: dict[str, Candidate], rounds: int) -> None:
    """Prints the table of one shape."""
    print(f"\n{title}")
    print(f"{'form':<28}{'forward':>22}{'forward+backward':>22}{'temp MB':>10}")
    floor = next(iter(made.values()))
    forward = ratios({name: (c.forward, floor.forward) for name, c in made.items()}, rounds)
    backward = ratios(
        {name: (c.forward_backward, floor.forward_backward) for name, c in made.items()}, rounds
    )
    for name, candidate in made.items():
        memory = "" if candidate.megabytes is None else f"{candidate.megabytes:.0f}"
        cells = f"{cell(forward[name]):>22}{cell(backward[name]):>22}"
        print(f"{name:<28}{cells}{memory:>10}", flush=True)


def show_against(directory: str, shape: str, made: dict[str, Candidate], rounds: int) -> None:
    """Prints the time of every form over its time in another checkout."""
    other = Checkout(directory, OTHER_PROGRAMS.format(shape=shape, programs=PROGRAMS))

    def pair(name: str, program: str) -> tuple[Run, Run]:
        return getattr(made[name], program), lambda: other.run(f"{name}/{program}")

    tables = [ratios({name: pair(name, program) for name in made}, rounds) for program in PROGRAMS]
    other.close()
    print(f"over {directory}")
    for name in made:
        print(f"{name:<28}" + "".join(f"{cell(table[name]):>22}" for table in tables), flush=True)


def main() -> None:
    """Times the requested shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="one shape only")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", action="store_true", help="layers of other installed systems")
    parser.add_argument("--against", help="directory of another checkout, timed in the same run")
    arguments = parser.parse_args()
    for name in [arguments.shape] if arguments.shape else sorted(SHAPES):
        made = candidates(SHAPES[name])
        ours = dict(made)
        if arguments.peers:
            from benchmarks.moe_layer_peers import peer_candidates

            peers = peer_candidates(SHAPES[name], SEQUENCES, LENGTH, MODEL_DIM)
            made |= {key: Candidate(*programs) for key, programs in peers.items()}
        show(f"({name}) {SHAPES[name]}", made, arguments.rounds)
        if arguments.against:
            show_against(arguments.against, name, ours, arguments.rounds)


if __name__ == "__main__":
    main()
