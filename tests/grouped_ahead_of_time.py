"""Compiles the experts of one device, with all gradients, for an absent machine.

    python -m tests.grouped_ahead_of_time TOPOLOGY KERNEL

Prints JSON: FLOPs relative to those of the rows, kernel calls, bytes of temporaries. "auto" is
the kernel that the machine gets.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.run_experts.grouped_matmul import (
    choose_kernel,
    says_how_it_varies,
    target_in_use,
)
from moe_jax.moe.run_experts.rows import SortedRows
from moe_jax.planning.topology import devices, parse_topology

EXPERTS, ROWS, MODEL_DIM, HIDDEN = 8, 8192, 2048, 1024
# A kernel call in a compiled program, with the name of its instruction.
CALLS = r'%ragged-dot-none[.\d]* = |%t?gmm[.\d]* = |custom_call_target="__gpu\$xla.gpu.triton"'


def compile_experts(topology, name):
    """The kernel, and the compiled forward and backward pass of SwiGLU experts in bfloat16."""
    found = devices(parse_topology(topology))
    mesh = jax.make_mesh(
        (len(found),), ("expert",), devices=found, axis_types=(jax.sharding.AxisType.Auto,)
    )
    split = PartitionSpec("expert")

    def array(*shape, dtype=jnp.bfloat16):
        shape = (shape[0] * len(found), *shape[1:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, split))

    def experts(x, weights, sizes, dy):
        layout = SortedRows(None, sizes, len(x), kernel)
        y, vjp = jax.vjp(lambda x, weights: FeedForward(SwiGLU())(x, weights, layout), x, weights)
        return y, vjp(dy)

    rows = array(ROWS, MODEL_DIM)
    weights = {
        "wi": array(EXPERTS, MODEL_DIM, HIDDEN),
        "wg": array(EXPERTS, MODEL_DIM, HIDDEN),
        "wo": array(EXPERTS, HIDDEN, MODEL_DIM),
    }
    with jax.set_mesh(mesh):
        kernel = choose_kernel(name, target_in_use())
        program = jax.shard_map(
            experts, mesh=mesh, in_specs=(split,) * 4, out_specs=split,
            check_vma=says_how_it_varies(kernel),
        )  # fmt: skip
        sizes = array(EXPERTS, dtype=jnp.int32)
        return kernel, jax.jit(program).lower(rows, weights, sizes, rows).compile()


def main():
    kernel, compiled = compile_experts(*sys.argv[1:])
    ideal = 3 * 3 * 2 * ROWS * MODEL_DIM * HIDDEN
    flops = (compiled.cost_analysis() or {}).get("flops", 0)  # unknown for absent GPUs
    calls = len(re.findall(CALLS, compiled.as_text()))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"kernel": kernel, "flops": flops / ideal, "calls": calls, "temp": temporary}))


if __name__ == "__main__":
    main()
