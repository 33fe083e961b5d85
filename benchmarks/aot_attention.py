"""Attention by every kernel of a platform, compiled for machines that are not available here.

    python -m benchmarks.aot_attention [--topologies=v5e:4x4,v5p:2x2x2,v6e:4x4] [--json=FILE]

One layer's queries, keys and values, in bfloat16, with packed documents; gradients of all three.
One sequence per device. Temporary memory and the number of score arrays, [.., L, L], are read from
the compiled program. Nothing is run. Needs libtpu, or for h100:8 the CUDA plugin with cuDNN.
"""

import argparse
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp

from moe_jax.config import MeshConfig
from moe_jax.config.json_text import json_text
from moe_jax.layers.attention_kernels import attend_by_rules
from moe_jax.layers.masks import Rules, Tokens
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.planning.topology import Topology, devices, parse_topology


@dataclasses.dataclass(frozen=True)
class Layer:
    """Attention of one layer on one device."""

    length: int
    heads: int
    kv_heads: int
    dims: tuple[int, int]  # dims of a key and of a value
    rules: Rules = Rules(causal=True)


LAYERS = {
    "grouped": Layer(4096, 16, 4, (128, 128)),
    "long": Layer(16384, 16, 4, (128, 128)),
    "window": Layer(4096, 16, 4, (128, 128), Rules(causal=True, window=1024)),
    "latent": Layer(4096, 16, 16, (192, 128)),
}
KERNELS = {"tpu": ("xla", "splash"), "gpu": ("xla", "cudnn", "triton")}


@dataclasses.dataclass(frozen=True)
class Row:
    """Memory and kernels of one program on a device.

    Attributes:
      topology: the machine.
      layer: name in `LAYERS`.
      kernel: the attention kernel.
      temporary_bytes: memory in addition to inputs and outputs.
      kernels: number of calls of kernels that XLA did not generate.
      scores: text of arrays [heads, .., L, L] in main memory.
      error: why there is no program.
    """

    topology: str
    layer: str
    kernel: str
    temporary_bytes: int = 0
    kernels: int = 0
    scores: tuple[str, ...] = ()
    error: str = ""


def measure(topology: Topology, name: str, kernel: str) -> Row:
    """Compiles one program."""
    layer = LAYERS[name]
    mesh = make_mesh(MeshConfig(data=-1).fill(topology.num_devices), devices(topology))
    shapes = [
        (topology.num_devices, layer.length, heads, dim)
        for heads, dim in (
            (layer.heads, layer.dims[0]),
            (layer.kv_heads, layer.dims[0]),
            (layer.kv_heads, layer.dims[1]),
        )
    ]
    placed = named_sharding(("batch", None, "heads", None), mesh)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in shapes]
    rows = named_sharding(("batch", None), mesh)
    numbers = jax.ShapeDtypeStruct(shapes[0][:2], jnp.int32, sharding=rows)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, *tokens: jax.Array) -> jax.Array:
        out_BLNV = attend_by_rules(
            q, k, v, layer.rules, Tokens(*tokens),
            kernel=kernel, contiguous=True, scale=layer.dims[0] ** -0.5,
        )  # fmt: skip
        return jnp.sum(out_BLNV.astype(jnp.float32))

    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        try:
            program = gradients.lower(*arrays, numbers, numbers).compile()
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            return Row(topology.name, name, kernel, error=str(error).splitlines()[0])
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None
    return Row(
        topology.name,
        name,
        kernel,
        memory.temp_size_in_bytes,
        len(re.findall(r'custom_call_target="(?:tpu_custom_call|__cudnn|triton|__gpu)', text)),
        scores_in(text, layer),
    )


def scores_in(text: str, layer: Layer) -> tuple[str, ...]:
    """The text of score arrays in a program; masks are excluded, since they have no heads."""
    square = rf"\w+\[((?:\d+,)*){layer.length},{layer.length}\]"
    found = {
        match[0]
        for match in re.finditer(square, text)
        if layer.kv_heads <= max([int(size) for size in match[1].split(",") if size], default=0)
    }
    return tuple(sorted(found))


def main() -> None:
    """Compiles the programs one by one and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", default="v5e:4x4,v5p:2x2x2,v6e:4x4")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--json", type=pathlib.Path, help="a file for the rows")
    arguments = parser.parse_args()
    rows = []
    print("| machine | layer | kernel | temporaries, MB | kernels | scores |")
    print("| --- | --- | --- | --- | --- | --- |")
    for topology in map(parse_topology, arguments.topologies.split(",")):
        for name in arguments.layers.split(","):
            for kernel in KERNELS[topology.chip.platform]:
                row = measure(topology, name, kernel)
                rows.append(dataclasses.asdict(row))
                done = f"{row.temporary_bytes / 1e6:,.0f} | {row.kernels} | {len(row.scores)}"
                start = f"| {row.topology} | {row.layer} | {row.kernel} | "
                print(start + (f"{row.error} |" if row.error else f"{done} |"), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json_text(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
