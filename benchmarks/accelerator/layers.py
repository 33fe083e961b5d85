"""Whole MoE layers, routing included, against a dense FFN of equal active FLOPs in the same rounds.

The four shapes of `benchmarks.moe_layer` at sizes of accelerators. Parameters are float32 and
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
from moe_jax.moe.experts import Experts
from moe_jax.parameters import SHARED, ffn_specs, init_parameters
from moe_jax.part import Call, Dims


class Layer(NamedTuple):
    """A layer and what it is run on.

    Attributes:
      shape: experts, of `benchmarks.moe_layer`.
      model_dim: M.
      sequences: of `length` tokens.
      length: L, also the tokens that share a capacity.
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
    """The forms of every shape."""
    kernels = usable_kernels(dense=False)[: 1 if dry else None]  # a CPU interprets the others
    forms = [
        *(("ragged", kernel, factor) for kernel in kernels for factor in (0.0, 1.25)),
        ("gather", "", 1.25),
        ("einsum", "", 1.25),
    ]
    return [
        Row(
            f"{name}/{ragged(kernel) if way == 'ragged' else way}, {factor or 'dropless'}",
            16,
            functools.partial(measure, layer, way, kernel, factor, dry),
        )
        for name, layer in (TINY if dry else LAYERS).items()
        for way, kernel, factor in forms
    ]


def measure(layer: Layer, way: str, kernel: str, factor: float, dry: bool) -> dict[str, Any]:
    """Times a form in turn with the dense FFN and with the matmul."""
    shape, dims = layer.shape, Dims(layer.model_dim)
    moe = with_kernel(moe_layer(shape, way, factor), kernel)
    key = jax.random.key(0)
    size = (layer.sequences, layer.length, layer.model_dim)
    x_BLM = jax.random.normal(jax.random.fold_in(key, 1), size, jnp.bfloat16)
    active = shape.num_selected * shape.expert_dim
    experts = Experts(activation_of(shape))
    ffn = ffn_specs(layer.model_dim, active, "experts", gated=experts.activation.gated,
                    use_bias=False, init_scale=1.0)  # fmt: skip

    def dense(params: Any, x: jax.Array) -> jax.Array:
        return experts(x, params, SHARED)

    def routed(params: Any, x: jax.Array) -> jax.Array:
        return moe_block(params, x, moe, Call(capacity=factor))[0]

    programs = {
        "dense": gradient_program(dense, ffn, x_BLM),
        "own": gradient_program(routed, moe.specs(dims), x_BLM),
    }
    timed = {name: program.timed for name, program in programs.items()}
    matmul, matmul_flops = bar(dry)
    found = in_turn({"bar": matmul, **timed}, dry)
    products = 3 if experts.activation.gated else 2
    flops = 6.0 * x_BLM.shape[0] * x_BLM.shape[1] * products * layer.model_dim * active
    over = [own / floor for own, floor in zip(found["own"], found["dense"], strict=True)]
    rate = flops / statistics.median(found["own"])
    return {
        **spread(found["own"]),
        "over_dense": statistics.median(over),
        "over_dense_low": min(over),
        "over_dense_high": max(over),
        "dense_ms": statistics.median(found["dense"]) * 1e3,
        "tflops": rate / 1e12,
        "share": rate / (matmul_flops / statistics.median(found["bar"])),
        **programs["own"].facts,
        "dense_temporary_mb": programs["dense"].facts.get("temporary_mb"),
    }


def gradient_program(function: Any, specs: Any, x_BLM: jax.Array) -> Any:
    """Forward and backward of a layer with these parameters, compiled."""
    params = jax.jit(lambda key: init_parameters(key, specs))(jax.random.key(0))

    def run(params: Any, x: jax.Array) -> Any:
        y, vjp = jax.vjp(function, params, x)
        return y, vjp(jnp.sin(y))

    return compiled(run, params, x_BLM)
