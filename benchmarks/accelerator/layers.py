"""Whole MoE layers with routing against a dense FFN of equal active FLOPs in the same rounds.

These are the four shapes of `benchmarks.moe_layer` at accelerator sizes. Parameters are float32 and
tokens bfloat16, as in training; the gradient is with respect to tokens and parameters.
"""

import functools
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.accelerator.clock import bar, compiled, in_turn, spread
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.kernels import ragged, usable_kernels, with_kernel
from benchmarks.moe_layer import Shape, activation_of, moe_layer
from moe_jax.moe.block import moe_block
from moe_jax.moe.experts import FeedForward
from moe_jax.parameters import SAME_WEIGHTS, ffn_specs, init_parameters
from moe_jax.part import Call, Dims


class Layer(NamedTuple):
    """A layer and its input size.

    Attributes:
      shape: shape of the experts, as in `benchmarks.moe_layer`.
      model_dim: M.
      sequences: number of sequences.
      length: L, tokens per sequence, which share a capacity.
    """

    shape: Shape
    model_dim: int
    sequences: int = 8
    length: int = 2048


LAYERS = {
    "b": Layer(Shape(8, 2, 14_336, "relu"), 4096),
    "d": Layer(Shape(64, 8, 2048, "swiglu"), 7168, sequences=4),
    "a": Layer(Shape(8, 1, 8192, "relu"), 2048),
    "c": Layer(Shape(32, 2, 4096, "relu"), 4096),
}
TINY = {"tiny": Layer(Shape(4, 2, 32, "swiglu"), 16, sequences=2, length=16)}


def rows(dry: bool) -> list[Row]:
    """Every form on all shapes: the first kernel dropless, then slots, then other forms."""
    kernels = usable_kernels(dense=False)[: 1 if dry else None]  # a CPU interprets the others
    dropless = [("ragged", kernel, 0.0) for kernel in kernels]
    forms = [*dropless[:1], ("gather", "", 1.25), *dropless[1:],
             *(("ragged", kernel, 1.25) for kernel in kernels), ("einsum", "", 1.25)]  # fmt: skip
    return [
        Row(
            f"{name}/{ragged(kernel) if way == 'ragged' else way}, {factor or 'dropless'}",
            12,
            functools.partial(measure, layer, way, kernel, factor, dry),
            first=(way, kernel, factor) in forms[:2],
        )
        for way, kernel, factor in forms
        for name, layer in (TINY if dry else LAYERS).items()
    ]


def measure(layer: Layer, way: str, kernel: str, factor: float, dry: bool) -> dict[str, Any]:
    """Times a form, alternating with the dense FFN and the matmul."""
    shape, dims = layer.shape, Dims(layer.model_dim)
    moe = with_kernel(moe_layer(shape, way, factor), kernel)
    key = jax.random.key(0)
    size = (layer.sequences, layer.length, layer.model_dim)
    x_BLM = jax.random.normal(jax.random.fold_in(key, 1), size, jnp.bfloat16)
    active = shape.num_selected * shape.expert_dim
    experts = FeedForward(activation_of(shape))
    ffn = ffn_specs(layer.model_dim, active, "experts", gated=experts.activation.gated,
                    use_bias=False, init_scale=1.0)  # fmt: skip

    def dense(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return experts(x, params, SAME_WEIGHTS), jnp.zeros((), jnp.int32)

    def routed(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, aux = moe_block(params, x, moe, Call(capacity=factor))
        return y, jnp.sum(aux.sums["kept_KE"])

    programs = {
        "dense": gradient_program(dense, ffn, x_BLM),
        "own": gradient_program(routed, moe.specs(dims), x_BLM),
    }
    timed = {name: program.timed for name, program in programs.items()}
    matmul, matmul_flops = bar(dry)
    found = in_turn({"bar": matmul, **timed}, dry)
    products = 3 if experts.activation.gated else 2
    own = programs["own"].timed
    kept = int(own.wait(own.call())[-1])  # kept choices: dropped choices are no useful work
    flops = 6.0 * kept * products * layer.model_dim * shape.expert_dim
    over = [own / floor for own, floor in zip(found["own"], found["dense"], strict=True)]
    rate = flops / statistics.median(found["own"])
    return {
        **spread(found["own"]),
        "over_dense": statistics.median(over),
        "over_dense_low": min(over),
        "over_dense_high": max(over),
        "dense_ms": statistics.median(found["dense"]) * 1e3,
        "tflops": rate / 1e12,
        "kept": kept / (layer.sequences * layer.length * shape.num_selected),
        "share": rate / (matmul_flops / statistics.median(found["bar"])),
        **programs["own"].facts,
        "dense_program_mb": programs["dense"].facts.get("program_mb"),
    }


def gradient_program(function: Any, specs: Any, x_BLM: jax.Array) -> Any:
    """The compiled forward and backward pass of a layer, which also returns kept choices."""
    params = jax.jit(lambda key: init_parameters(key, specs))(jax.random.key(0))

    def run(params: Any, x: jax.Array) -> Any:
        y, vjp, kept = jax.vjp(function, params, x, has_aux=True)
        return y, vjp(jnp.sin(y)), kept

    return compiled(run, params, x_BLM)
