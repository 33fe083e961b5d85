"""Rows sorted by expert on one device: their buffer, and the FLOPs that kernels waste.

Legend of shapes: `moe_jax.moe`.
"""

import dataclasses
import math
from typing import Any

from moe_jax.costs import ffn_cost
from moe_jax.models.layer import Layer
from moe_jax.moe.costs import expert_rows, memory_rows, most_rows
from moe_jax.moe.run_experts import grouped_mosaic, grouped_triton
from moe_jax.moe.run_experts.plan import plan_experts
from moe_jax.moe.run_experts.tiles import LANES, tpu_row_tiles
from moe_jax.planning.flops import different_layers, module_layers
from moe_jax.planning.hlo import Program
from moe_jax.planning.parameters import shards_of
from moe_jax.planning.workload import Workload

ALIGNED = ("lax", "megablox")  # kernels whose tiles begin at multiples of their size


@dataclasses.dataclass(frozen=True)
class SortedRows:
    """The sorted rows of an MoE part, for one layer, device and microbatch.

    Attributes:
      part: its name.
      layers: number of layers that use it.
      kernel: a kernel of `moe.grouped_matmul`.
      num_experts: experts per device.
      filled: rows that hold a choice, if experts are equally loaded.
      buffer: rows that the buffer has room for.
      worst: rows that the worst routing fills.
      is_bounded: whether `buffer_factor` sets the buffer, not the worst routing.
      tile: rows per tile; 0 if the kernel has no tiles.
      row_bytes: bytes per row of the buffer.
      flops: forward FLOPs per row.
    """

    part: str
    layers: int
    kernel: str
    num_experts: int
    filled: float
    buffer: float
    worst: float
    is_bounded: bool
    tile: int
    row_bytes: int
    flops: float

    @property
    def computed(self) -> float:
        """Rows that are multiplied by a matrix: whole tiles, each once per expert in it.

        If tiles begin at multiples of their size, all experts except the first begin within one.
        Otherwise the last tile of every expert is half full. If dense, every row of the buffer
        meets every expert.
        """
        if self.kernel == "dense":
            return self.buffer * self.num_experts
        if self.kernel in ALIGNED:
            return self.filled + (self.num_experts - 1) * self.tile
        return self.filled + self.num_experts * self.tile / 2

    @property
    def factor(self) -> float:
        """Computed rows over filled ones."""
        return self.computed / self.filled


def sorted_rows(work: Workload, row_tiles: tuple[int, ...] = ()) -> list[SortedRows]:
    """The sorted rows of every part whose experts compute them.

    Args:
      work: the config on its mesh.
      row_tiles: tile sizes of a compiled program, used for kernel "lax" in place of the known one.
    """
    found, parts = [], work.model.part
    for (name, length), layers in layers_with_experts(work).items():
        moe: Any = parts[name]
        if moe.run_experts != "ragged" or moe.router.mixes:
            continue
        shards = shards_of("expert", work.mesh)
        own, tokens = moe.num_experts // shards, work.sequences * length
        with work.on_mesh():
            kernel, rows = plan_experts(moe).kernel, memory_rows(moe, length)
        filled = expert_rows(moe, length) * tokens
        tile = row_tile(kernel, filled, own, work, moe.expert_dim // work.mesh.tensor)
        gated = moe.activation.gated
        ffn = ffn_cost(work.model.model_dim, moe.expert_dim, gated=gated, itemsize=work.itemsize)
        found.append(
            SortedRows(
                part=name,
                layers=layers,
                kernel=kernel,
                num_experts=own,
                filled=filled,
                buffer=rows * tokens,
                worst=most_rows(moe, length, shards) * tokens,
                is_bounded=shards > 1 and moe.buffer_factor > 0,
                tile=row_tiles[-1] if row_tiles and kernel == "lax" else tile,
                row_bytes=work.model.model_dim * work.itemsize,
                flops=ffn.flops / work.mesh.tensor,
            )
        )
    return found


def layers_with_experts(work: Workload) -> dict[tuple[str, int], int]:
    """How many layers use each part that routes, by the part's name and the sequence length."""
    count = dict[tuple[str, int], int]()
    for placed in different_layers(work.model, work.lengths) + module_layers(
        work.model, work.lengths
    ):
        branches = placed.part.branches if isinstance(placed.part, Layer) else ()
        for name, part in branches:
            if part.routes:
                key = (name, placed.within.length)
                count[key] = count.get(key, 0) + placed.times
    return count


def row_tile(kernel: str, filled: float, num_experts: int, work: Workload, hidden: int) -> int:
    """Rows per tile of a kernel, by its own rule; for "lax", those of libtpu 0.0.42 to 0.0.51."""
    likely = math.ceil(filled)
    if kernel == "megablox":
        sizes = (likely, num_experts, work.model.model_dim, hidden)
        return tpu_row_tiles(*sizes, work.itemsize)[0]
    if kernel == "triton":
        return grouped_triton.row_tile(likely, num_experts)
    return {"lax": LANES, "mosaic_gpu": grouped_mosaic.TILES["block_m"]}.get(kernel, 0)


def of_step(work: Workload, rows: SortedRows, count: float) -> float:
    """FLOPs of a step with `count` rows per layer and microbatch."""
    times = rows.layers * work.products(batched=True) * work.config.training.num_microbatches
    return count * rows.flops * times


def flops_in_vain(work: Workload) -> float:
    """FLOPs of a step that are wasted on unfilled rows of tiles, or by dense products."""
    found = sorted_rows(work)
    return sum(of_step(work, rows, rows.computed - rows.filled) for rows in found)


def executed_flops(program: Program, work: Workload) -> float:
    """FLOPs of a compiled step, if experts are equally loaded.

    `Program.flops` counts whole buffers, but kernels skip empty tiles.
    """
    found = [
        (one, rows)
        for one in (work, *work.teachers)
        for rows in sorted_rows(one, program.row_tiles)
        if rows.kernel != "dense"
    ]
    whole = sum(of_step(one, rows, rows.buffer) for one, rows in found)
    if not whole:
        return program.flops
    filled = sum(of_step(one, rows, min(rows.computed, rows.buffer)) for one, rows in found)
    return program.flops - program.grouped_flops * (1 - filled / whole)


def share_in_kernels(program: Program, work: Workload) -> float | None:
    """Share of the products of sorted rows that kernels compute; None without such rows."""
    found = ((one, rows) for one in (work, *work.teachers) for rows in sorted_rows(one))
    whole = sum(of_step(one, rows, rows.buffer) for one, rows in found)
    return program.grouped_flops / whole if whole else None
