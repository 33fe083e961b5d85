"""The MoE layer by every way to run experts, compiled for TPUs that are not available here.

    python -m benchmarks.aot_tpu [--topologies=v5e:4x4,v5p:4x4x4] [--json=FILE] [--hlo=FOLDER]

Forward and forward+backward of `moe_block` in bfloat16, with float32 parameters, for a layer like
Switch-Base's and one like Mixtral's. The work of the compiled program on one device is read from
its text (`planning.hlo`) and divided by the least work of the layer (`fewest`). Nothing is run: the
last column is the time at the chip's published rates, not a measurement. Needs libtpu.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import math
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import MeshConfig
from moe_jax.config.json_text import json_text
from moe_jax.moe.activations import Relu, SwiGLU
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding, num_shards
from moe_jax.parameters import ParameterSpec
from moe_jax.part import Call, Dims
from moe_jax.planning.hlo import Program, read_program
from moe_jax.planning.report import collective_rows
from moe_jax.planning.roofline import roofline
from moe_jax.planning.topology import Topology, devices, parse_topology

SEQUENCE_LENGTH = 1024  # tokens of a sequence, and of a group
BFLOAT16, FLOAT32 = 2, 4  # bytes


@dataclasses.dataclass(frozen=True)
class Layer:
    """An MoE layer and the number of input tokens per device."""

    moe: MoE
    model_dim: int
    tokens: int


LAYERS = {
    "switch": Layer(
        MoE(num_experts=128, num_selected_experts=1, expert_dim=3072, activation=Relu()),
        model_dim=768,
        tokens=8192,
    ),
    "mixtral": Layer(
        MoE(num_experts=8, num_selected_experts=2, expert_dim=14336, activation=SwiGLU()),
        model_dim=4096,
        tokens=4096,
    ),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to run experts: settings of `MoE`, and the capacity factor (0: dropless).

    `buffer` is the buffer for received rows over their mean number, 0 for the worst case.
    """

    run_experts: str
    exchange: str
    factor: float = 1.25
    chunks: int = 1
    buffer: float = 0.0

    def __str__(self) -> str:
        capacity = f"{self.factor:g}" if self.factor else "dropless"
        capacity += f", buffer {self.buffer:g}" if self.buffer else ""
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.run_experts} {self.exchange}, {capacity}{chunks}"


FORMS = (
    Form("einsum", "compiler"),
    Form("gather", "compiler"),
    Form("einsum", "explicit"),
    Form("gather", "explicit"),
    Form("gather", "explicit", chunks=2),
    Form("ragged", "explicit"),
    Form("gather", "compiler", factor=0.0),
    Form("ragged", "explicit", factor=0.0),
    Form("ragged", "explicit", factor=0.0, buffer=1.25),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one execution on one device.

    Attributes:
      flops: FLOPs; a multiply-add counts as two.
      hbm_bytes: bytes read from and written to main memory.
      wire_bytes: bytes sent to other devices.
    """

    flops: float
    hbm_bytes: float
    wire_bytes: float


def mesh_for(moe: MoE, num_devices: int) -> MeshConfig:
    """Splits experts over the most devices that divide their number, and fsdp over the rest.

    Then no gradient of an expert is summed over replicas, and no device holds more than its share
    of the parameters.
    """
    expert = math.gcd(moe.num_experts, num_devices)
    return MeshConfig(data=1, fsdp=num_devices // expert, expert=expert)


def fewest(layer: Layer, mesh: MeshConfig, gradient: bool) -> Work:
    """The least work that the mathematics and the mesh allow, with equal loads of all experts.

    FLOPs: router and the K experts of every token; three times that with the gradient.

    Wire: every choice is sent to its expert's device in bfloat16 (a fraction 1/n is already there)
    and its output is sent back; with the gradient twice that. Matrices split over fsdp are gathered
    once in bfloat16, and their gradients scattered once. The router's gradient is all-reduced in
    float32.

    Memory: inputs are read once and outputs written once: parameters and their gradients in
    float32, tokens and their gradients in bfloat16. Gathered matrices, and their gradients before
    the scatter, are written and read once in bfloat16. Hidden units and slots never leave the chip;
    no program achieves this if they do not fit on the chip.
    """
    specs = layer.moe.specs(Dims(layer.model_dim))
    d, e, matrices = layer.model_dim, layer.moe.num_experts, 3 if layer.moe.activation.gated else 2
    choices = layer.tokens * layer.moe.num_selected_experts
    flops = 2 * (choices * matrices * d * layer.moe.expert_dim + layer.tokens * d * e)

    all_experts = sum(spec.size for spec in specs["experts"].values())
    used = all_experts / mesh.expert  # parameters of one device's experts, gathered over fsdp
    held = used / mesh.fsdp
    tokens_sent = choices * d * BFLOAT16 * (1 - 1 / mesh.expert)
    weights_sent = used * BFLOAT16 * (1 - 1 / mesh.fsdp)
    router_sent = d * e * FLOAT32 * 2 * (1 - 1 / mesh.num_devices)
    token_bytes = layer.tokens * d * BFLOAT16
    weight_bytes = (held + d * e / mesh.fsdp) * FLOAT32
    if mesh.fsdp > 1:
        weight_bytes += 2 * used * BFLOAT16
    if not gradient:
        return Work(flops, 2 * token_bytes + weight_bytes, 2 * tokens_sent + weights_sent)
    return Work(
        3 * flops,
        4 * token_bytes + 2 * weight_bytes,
        4 * tokens_sent + 2 * weights_sent + router_sent,
    )


def work_of(program: Program, layer: Layer, chunks: int) -> Work:
    """The work of a compiled program; a ragged all-to-all counts the rows of equal loads."""
    choices = layer.tokens * layer.moe.num_selected_experts
    rows = choices * layer.model_dim * BFLOAT16 / chunks
    wire = 0.0
    for one in program.collectives:
        size = one.wire_bytes
        if one.operation == "ragged-all-to-all":
            size = min(one.bytes, rows) * (1 - 1 / one.group_size)
        wire += one.count * size
    return Work(program.flops, program.hbm_bytes, wire)


def compile_layer(
    layer: Layer, form: Form, mesh: jax.sharding.Mesh, gradient: bool
) -> jax.stages.Compiled:
    """Compiles `moe_block` on a mesh, optionally with the gradient by tokens and parameters."""
    moe = dataclasses.replace(
        layer.moe,
        run_experts=form.run_experts,
        exchange=form.exchange,
        exchange_chunks=form.chunks,
        eval_buffer_factor=form.buffer,
        capacity=Capacity(eval_factor=form.factor),
        losses=(),
    )

    def forward(params: Any, x_BLM: jax.Array) -> jax.Array:
        return moe_block(params, x_BLM, moe, Call())[0]

    def forward_backward(params: Any, x_BLM: jax.Array, dy_BLM: jax.Array) -> Any:
        y_BLM, vjp = jax.vjp(forward, params, x_BLM)
        return y_BLM, vjp(dy_BLM)

    def abstract(spec: ParameterSpec) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(spec.axes, mesh)
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding)

    sequences = layer.tokens * num_shards("batch", mesh) // SEQUENCE_LENGTH
    tokens = named_sharding(("batch", None, None), mesh)
    shape = (sequences, SEQUENCE_LENGTH, layer.model_dim)
    x_BLM = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=tokens)
    params = jax.tree.map(abstract, moe.specs(Dims(layer.model_dim)))
    placed = jax.tree.map(lambda value: value.sharding, params)
    with jax.set_mesh(mesh):
        if gradient:
            program = jax.jit(forward_backward, out_shardings=(tokens, (placed, tokens)))
            return program.lower(params, x_BLM, x_BLM).compile()
        return jax.jit(forward, out_shardings=tokens).lower(params, x_BLM).compile()


@dataclasses.dataclass(frozen=True)
class Row:
    """A compiled layer, on one device.

    Attributes:
      layer: name in `LAYERS`.
      topology: the machine.
      form: the way to run experts.
      gradient: forward+backward, or forward only.
      work: work of the program.
      least: the least work of the layer.
      temporary_bytes: memory in addition to arguments and results.
      milliseconds: time at the published rates by resource, each on its own.
      collectives: number of executions, and total bytes of their arrays, by kind and mesh axes; a
        ragged all-to-all counts its whole buffer.
      grouped_matmuls: number of hand-written kernels for rows sorted by expert.
      error: why there is no program; "" if there is one.
    """

    layer: str
    topology: str
    form: str
    gradient: bool
    work: Work | None = None
    least: Work | None = None
    temporary_bytes: int = 0
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    grouped_matmuls: int = 0
    error: str = ""

    @property
    def ratios(self) -> tuple[float, float, float]:
        """FLOPs, memory traffic and bytes sent, each over the least."""
        assert self.work is not None and self.least is not None
        done, least = dataclasses.astuple(self.work), dataclasses.astuple(self.least)
        return tuple(a / b for a, b in zip(done, least, strict=True))


def measure(
    name: str, topology: Topology, form: Form, gradient: bool, folder: pathlib.Path | None = None
) -> Row:
    """Compiles and reads one program; the row records any error."""
    layer = LAYERS[name]
    empty = Row(name, topology.name, str(form), gradient)
    config = mesh_for(layer.moe, topology.num_devices)
    mesh = make_mesh(config, devices(topology))
    try:
        compiled = compile_layer(layer, form, mesh, gradient)
    except Exception as error:  # the other rows are still useful
        return dataclasses.replace(empty, error=f"{type(error).__name__}: {error}"[:300])
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    if folder is not None:
        file = f"{name}_{topology.name}_{form}_{'gradient' if gradient else 'forward'}.txt"
        (folder / re.sub(r"[^\w.]+", "_", file)).write_text(text)
    program = read_program(text)
    work = work_of(program, layer, form.chunks)
    times = roofline(topology, work.flops, work.hbm_bytes, work.wire_bytes, 0.0)
    seconds = {"compute": times.compute, "memory": times.memory, "wire": times.interconnect}
    return dataclasses.replace(
        empty,
        work=work,
        least=fewest(layer, config, gradient),
        temporary_bytes=memory.temp_size_in_bytes,
        milliseconds={key: 1e3 * value for key, value in seconds.items()},
        collectives={
            f"{one.operation} {'+'.join(one.axes)}": (one.count, one.array_bytes)
            for one in collective_rows(program.collectives, config, topology.devices_per_island)
        },
        grouped_matmuls=len(re.findall(r"%(?:ragged-dot-none|t?gmm)[.\d]* = ", text)),
    )


HEADER = (
    f"{'form':<34}{'pass':>5}{'FLOPs':>7}{'memory':>8}{'wire':>6}{'temp MB':>9}"
    f"{'compute':>9}{'memory':>8}{'wire':>7}  collectives: how many, which, over which axes, MB"
)


def line(row: Row) -> str:
    """A row of the table."""
    start = f"{row.form:<34}{'f+b' if row.gradient else 'f':>5}"
    if row.error:
        return f"{start}  FAILED: {row.error}"
    flops, memory, wire = row.ratios
    ms = row.milliseconds
    bound = max(ms, key=lambda key: ms[key])
    times = "".join(
        f"{value:.2f}{'*' if key == bound else ' '}".rjust(width)
        for (key, value), width in zip(ms.items(), (10, 8, 7), strict=True)
    )
    sent = ", ".join(
        f"{count} {kind} {size / 1e6:.1f}" for kind, (count, size) in row.collectives.items()
    )
    kernels = f", {row.grouped_matmuls} grouped matmul kernels" if row.grouped_matmuls else ""
    numbers = f"{flops:>7.2f}{memory:>8.2f}{wire:>6.2f}{row.temporary_bytes / 1e6:>9,.0f}"
    return f"{start}{numbers}{times} {sent}{kernels}"


def main() -> None:
    """Compiles the programs one by one and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", default="v5e:4x4,v5p:4x4x4")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--json", type=pathlib.Path, help="a file for the rows")
    parser.add_argument("--hlo", type=pathlib.Path, help="a folder for the compiled programs")
    arguments = parser.parse_args()
    try:
        topologies = [parse_topology(name) for name in arguments.topologies.split(",")]
    except ValueError as error:
        parser.error(str(error))
    unknown = sorted(set(arguments.layers.split(",")) - set(LAYERS))
    if unknown:
        parser.error(f"the layers are {sorted(LAYERS)}: got {unknown}. Correct --layers.")
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("Nothing compiled: this needs libtpu. pip install -e '.[tpu]' (no TPU needed).")
    if arguments.hlo is not None:
        arguments.hlo.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for topology, name in itertools.product(topologies, arguments.layers.split(",")):
        layer = LAYERS[name]
        config = mesh_for(layer.moe, topology.num_devices)
        print(f"\n{name} on {topology.name}: expert={config.expert} fsdp={config.fsdp}, "
              f"{layer.tokens} tokens a device; ratios to the fewest, ms at published rates (* the "
              f"most)\n{HEADER}", flush=True)  # fmt: skip
        for form, gradient in itertools.product(FORMS, (False, True)):
            rows.append(measure(name, topology, form, gradient, arguments.hlo))
            print(line(rows[-1]), flush=True)
            if arguments.json is not None:
                found = [dataclasses.asdict(row) for row in rows]
                arguments.json.write_text(json_text(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
