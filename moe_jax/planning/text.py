"""A plan as text."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from moe_jax.planning.communication import collectives
from moe_jax.planning.compiled import Compiled
from moe_jax.planning.flops import count_flops
from moe_jax.planning.gpu_targets import cudnn_text
from moe_jax.planning.hlo import Program
from moe_jax.planning.memory import estimate_memory, kv_cache_bytes
from moe_jax.planning.parameters import count_parameters
from moe_jax.planning.remedies import (
    MOST_DEVICES,
    largest,
    more_devices,
    remedies,
    together,
)
from moe_jax.planning.report import Plan, collective_rows, compiled_roofline
from moe_jax.planning.roofline import (
    Roofline,
    computed_flops,
    estimate,
    estimate_by_kind,
    model_flops,
)
from moe_jax.planning.sorted_rows import executed_flops, share_in_kernels, sorted_rows
from moe_jax.planning.topology import Topology
from moe_jax.planning.traffic import hbm_traffic, traffic_by_scope

MAX_REMEDIES = 6
# If no product of sorted rows is dense, kernels compute at least this share; remat may save some.
WHOLE = 0.9
# Above this share of the memory, arithmetic does not show that a step fits: DeepSeek-V3 needed a
# third more when compiled (docs/planning.md).
NEAR = 0.75
UNNAMED = "does not say how much it needs"  # if the compiler names no sizes
COMPILE = "Compiled steps have needed up to a third more: compile before you rent"
RESOURCES = ("FLOPs", "HBM", "interconnect", "network", "bound")


def plan_text(plan: Plan) -> str:
    """All sections of a plan."""
    sections = [header(plan), parameters_text(plan), flops_text(plan), memory_text(plan)]
    sections += rows_text(plan)
    sections.append(collectives_text(plan))
    if plan.topology is not None:
        sections.append(estimate_text(plan))
    if plan.step is not None:
        sections.append(compiled_text("training step, compiled", plan.step, plan, is_step=True))
    if plan.forward is not None:
        sections.append(compiled_text("forward pass, compiled", plan.forward, plan, is_step=False))
    if plan.topology is not None:
        sections.append(verdict(plan))
    return "\n\n".join(sections)


def header(plan: Plan) -> str:
    """The config, its mesh and its machine."""
    work = plan.work
    training, model = work.config.training, work.model
    ways = ", ".join(dict.fromkeys(work.run_experts.values()))
    mesh = ", ".join(
        f"{name} {size}"
        for name, size in dataclasses.asdict(work.mesh).items()
        if not isinstance(size, bool) and size > 1
    )
    lines = [
        f"{work.config.name}: {training.batch_size * work.length:,} tokens a step on "
        f"{work.mesh.num_devices:,} devices ({mesh or 'one'})",
        f"  {work.tokens:,.0f} tokens a device and microbatch, {training.num_microbatches} "
        f"microbatches, run_experts {ways or '-'}, remat {model.remat}, {model.compute_dtype}",
    ]
    if plan.topology is not None:
        chip, share = plan.topology.chip, plan.topology.chip.devices
        lines.append(
            f"  {plan.topology.name}{nodes_of(plan.topology)}: a device has "
            f"{chip.flops / share / 1e12:,.1f} TFLOP/s, "
            f"{_gib(chip.hbm_bytes / share)} ({_gib(plan.available)} usable) at "
            f"{chip.hbm_bandwidth / share / 1e9:,.0f} GB/s, interconnect "
            f"{chip.interconnect / share / 1e9:,.0f} GB/s, network "
            f"{chip.network / share / 1e9:,.2f} GB/s"
        )
        lines.append(f"  source: {chip.source}")
        lines.append(f"  assumed: {chip.assumed}")
        if chip.platform == "gpu":
            lines.append(f"  {cudnn_text()}")
    return "\n".join(lines)


def nodes_of(topology: Topology) -> str:
    """Such as ", 8 nodes of 4 GPUs"; "" for TPU slices."""
    if topology.chip.platform != "gpu":
        return ""
    nodes, gpus = topology.shape
    return f", {nodes:,} node{'s' * (nodes > 1)} of {gpus} GPU{'s' * (gpus > 1)}"


def parameters_text(plan: Plan) -> str:
    """Parameters by component and convention."""
    count = count_parameters(plan.work.model, plan.work.lengths)
    parts = [(n, f"{v:,}") for n, v in dataclasses.asdict(count).items() if v]
    conventions = [
        (name, f"{total:,}", f"{active:,}")
        for name, (total, active) in count.by_convention().items()
    ]
    return "\n".join(
        [
            "parameters",
            *table(parts),
            *table([("", "total", "active"), *conventions]),
        ]
    )


def flops_text(plan: Plan) -> str:
    """FLOPs per token and per step."""
    work = plan.work
    count = count_flops(work.model, work.lengths)
    parts = [
        (name, f"{value / 1e6:,.3f}") for name, value in dataclasses.asdict(count).items() if value
    ]
    needed, computed = model_flops(work), sum(computed_flops(work).values())
    return "\n".join(
        [
            "forward pass, MFLOP a token",
            *table([*parts, ("needed by the model", f"{count.model / 1e6:,.3f}")]),
            f"a training step on one device: {needed / 1e12:,.3f} TFLOP needed, "
            f"{computed / 1e12:,.3f} computed (padding, dispatch, remat, teacher)",
        ]
    )


def memory_text(plan: Plan) -> str:
    """Memory by arithmetic."""
    work, memory = plan.work, plan.memory
    sizes = dataclasses.asdict(memory)
    parts = [(name.replace("_", " "), _gib(size)) for name, size in sizes.items() if size]
    training = work.config.training
    cache = kv_cache_bytes(work, training.batch_size, work.lengths.decoder)
    return "\n".join(
        [
            "memory of one device, estimated",
            *table([*parts, ("at the peak", _gib(memory.total))]),
            f"keys and values while it generates {training.batch_size:,} sequences of "
            f"{work.lengths.decoder:,}: {_gib(cache)}",
        ]
    )


def rows_text(plan: Plan) -> list[str]:
    """The sorted rows of every part that has them: their buffer, and the wasted computation."""
    program = None if plan.step is None else plan.step.program
    found = sorted_rows(plan.work, () if program is None else program.row_tiles)
    if not found:
        return []
    lines = ["rows sorted by expert, of one device, layer and microbatch, if equally loaded"]
    for rows in found:
        lines.append(f"  {rows.part}: {rows.filled:,.0f} rows for {rows.num_experts} experts")
        size = f"{rows.buffer:,.0f} rows, {_gib(rows.buffer * rows.row_bytes)} a copy"
        times = f"{rows.buffer / rows.filled:.2f} times as many"
        of = (
            f"buffer_factor; the worst case is {rows.worst:,.0f}" if rows.is_bounded else "any load"
        )
        lines.append(f"    room for {size}: {times} ({of})")
        if rows.kernel == "dense":
            lines.append(
                f"    kernel dense: every row that there is room for meets every expert, "
                f"{rows.factor:.2f} times the FLOPs, in the gradient of the weights too"
            )
        elif rows.tile:
            lines.append(
                f"    kernel {rows.kernel}, tiles of {rows.tile} rows: {rows.factor:.2f} times the "
                "rows are computed"
            )
        else:
            lines.append(f"    kernel {rows.kernel}")
    return ["\n".join(lines)]


def collectives_text(plan: Plan) -> str:
    """The collectives, with the fewest bytes that the mesh allows."""
    rows = [
        (
            one.name,
            one.operation,
            "+".join(one.axes),
            str(one.group_size),
            f"{one.wire_bytes / 1e9:,.3f}",
        )
        for one in collectives(plan.work)
    ]
    if not rows:
        return "no collectives: one device"
    total = sum(one.wire_bytes for one in collectives(plan.work)) / 1e9
    head = ("collectives, fewest bytes", "kind", "over", "n", "GB sent")
    return "\n".join(table([head, *rows, ("all", "", "", "", f"{total:,.3f}")], indent=0))


def estimate_text(plan: Plan) -> str:
    """The roofline by kind of layer, from arithmetic."""
    assert plan.topology is not None
    by_kind = estimate_by_kind(plan.work, plan.topology)
    head = ("milliseconds a step, estimated", *RESOURCES)
    rows = [_times(kind, times) for kind, times in by_kind.items() if times.seconds > 0]
    whole = estimate(plan.work, plan.topology)
    return "\n".join([*table([head, *rows, _times("all", whole)], indent=0), _mfu(whole, plan)])


def compiled_text(title: str, compiled: Compiled, plan: Plan, *, is_step: bool) -> str:
    """Memory and work of the compiled program."""
    assert plan.topology is not None
    lines = [f"{title} in {compiled.seconds:,.1f} s ({compiled.cpu_seconds:,.1f} s of CPU)"]
    if compiled.memory is None or compiled.program is None:
        needed, available = compiled.refused or (math.nan, math.nan)
        sizes = f"needs {_gib(needed)} of {_gib(available)}"
        unnamed = f"the compiler {UNNAMED}"
        lines.append(f"  refused: {unnamed if math.isnan(needed) else sizes}")
        return "\n".join(lines)
    program, memory = compiled.program, compiled.memory
    parts = [(name.replace("_", " "), _gib(v)) for name, v in dataclasses.asdict(memory).items()]
    lines += table([*parts, ("at the peak", _gib(memory.total))])
    rows = collective_rows(program.collectives, plan.work.mesh, plan.topology.devices_per_island)
    cells = [
        (row.operation, "+".join(row.axes), str(row.group_size), f"{row.count:,}",
         f"{row.array_bytes / 1e9:,.3f}", f"{row.wire_bytes / 1e9:,.3f}")
        for row in rows
    ]  # fmt: skip
    if cells:
        lines += table([("collective", "over", "n", "times", "GB", "GB sent"), *cells])
    lines += [f"  {line}" for line in _work(compiled, program, plan if is_step else None)]
    lines += _traffic(program, plan)
    times = compiled_roofline(compiled, plan.work, plan.topology)
    lines += table([("least milliseconds", *RESOURCES), _times("compiled", times)])
    if is_step:
        lines.append("  " + _mfu(times, plan))
    return "\n".join(lines)


def _work(compiled: Compiled, program: Program, step: Plan | None) -> Iterator[str]:
    """FLOPs and memory traffic of a program; for a training step also relative to arithmetic."""
    flops = f"{program.flops / 1e12:,.3f} TFLOP"
    traffic = f"{program.hbm_bytes / 1e9:,.3f} GB to and from memory"
    if step is not None:
        expected, executed = (
            sum(computed_flops(step.work).values()),
            executed_flops(program, step.work),
        )
        if executed < program.flops:
            flops += f" with whole buffers, {executed / 1e12:,.3f} with the tiles that are filled"
        share = f"{executed / expected:.3f} of the arithmetic's {expected / 1e12:,.3f}"
        flops = f"{flops}, {share}{_cost_analysis(compiled)}"
        moved = sum(hbm_traffic(step.work).values())
        traffic += f", {program.hbm_bytes / moved:.2f} of the arithmetic's {moved / 1e9:,.3f}"
    yield flops
    yield traffic
    share_of_rows = None if step is None else share_in_kernels(program, step.work)
    if share_of_rows is not None and share_of_rows < WHOLE:
        yield (
            f"kernels compute {share_of_rows:.0%} of the products of sorted rows: the others, such "
            "as gradients of weights, are dense, of every row with every expert of the device"
        )
    if program.uncounted:
        named = ", ".join(f"{name} x{count:,}" for name, count in program.uncounted.items())
        yield f"no FLOPs are known of calls of: {named}"
    if program.unknown_loops:
        yield f"counted once, their length is not known: {list(program.unknown_loops)}"


def _traffic(program: Program, plan: Plan) -> list[str]:
    """Memory traffic by scope, if there is any: those of at least 1 %."""
    by_scope = traffic_by_scope(program, plan.work.model)
    large = {name: size for name, size in by_scope.items() if size >= program.hbm_bytes / 100 > 0}
    if not large:
        return []
    large["smaller ones"] = program.hbm_bytes - sum(large.values())
    rows = [
        (name, f"{size / 1e9:,.3f}", f"{size / program.hbm_bytes:.0%}")
        for name, size in large.items()
    ]
    return table([("memory traffic in", "GB", ""), *rows])


def _cost_analysis(compiled: Compiled) -> str:
    flops = compiled.cost_analysis_flops
    if flops is None:
        return "; the compiler gives no cost analysis"
    return f"; its own cost analysis says {flops / 1e12:,.3f}: it counts the body of a loop once"


def verdict(plan: Plan) -> str:
    """Whether the step fits; if not, why and what to change."""
    share = plan.needed / plan.available
    if plan.fits:
        left = plan.available - plan.needed
        compiled = plan.step is not None
        warning = "" if compiled or share <= NEAR else f". {COMPILE}"
        return (
            f"fits{'' if compiled else ' by arithmetic'}: {_gib(plan.needed)} of "
            f"{_gib(plan.available)} ({share:.0%}), {_gib(left)} left{warning}"
        )
    parts = [(name.replace("_", " "), _gib(size)) for name, size in largest(plan.memory) if size]
    sizes = f"{_gib(plan.needed)} of {_gib(plan.available)} ({share:.0%})"
    refused = f"the compiler refuses it, and {UNNAMED}"
    lines = [
        f"does not fit: {refused if math.isnan(plan.needed) else sizes}",
        "what takes the memory, estimated",
        *table(parts),
    ]
    found = remedies(plan.work)[:MAX_REMEDIES]
    path = together(plan.work, plan.room)
    if not path and all(one.total_bytes > plan.room for one in found):
        best = f": the best below needs {_gib(found[0].total_bytes)}" if found else ""
        lines += [f"no change of settings is enough{best}", enough_text(plan)]
    if found:
        lines.append("change one of these (memory by arithmetic; the price in words)")
        lines += table(
            [(one.change, _gib(one.total_bytes), one.costs) for one in found], left={0, 2}
        )
    if len(path) > 1:
        lines.append("these together fit, by arithmetic: " + " ".join(one.change for one in path))
    return "\n".join(lines)


def enough_text(plan: Plan) -> str:
    """How many chips of this kind would be enough."""
    assert plan.topology is not None
    enough, per_chip = more_devices(plan.work, plan.room), plan.topology.chip.devices
    if enough is None:
        return (
            f"more chips do not help: on no mesh of up to {MOST_DEVICES // per_chip:,}, with fsdp "
            "and expert times powers of two, do the arrays and the batch split evenly and fit"
        )
    mesh = enough.mesh
    return (
        f"{mesh.num_devices // per_chip:,} {plan.topology.chip.name} chips would do by arithmetic: "
        f"{_gib(estimate_memory(enough).total)} with --config.mesh.fsdp={mesh.fsdp} "
        f"--config.mesh.expert={mesh.expert}"
    )


def _times(name: str, times: Roofline) -> tuple[str, ...]:
    cells = (f"{1e3 * seconds:,.3f}" for seconds in dataclasses.astuple(times))
    return (name.replace("_", " "), *cells, times.bound)


def _mfu(times: Roofline, plan: Plan) -> str:
    assert plan.topology is not None
    chip = plan.topology.chip
    mfu = times.mfu(model_flops(plan.work), chip.flops / chip.devices)
    in_turn = mfu * times.seconds / times.seconds_in_turn
    return (
        f"at best {times.seconds:,.4f} s a step if all overlaps, MFU {mfu:.1%}; "
        f"{times.seconds_in_turn:,.4f} s if nothing does, MFU {in_turn:.1%}"
    )


def table(rows: Iterable[Sequence[str]], indent: int = 2, left: Iterable[int] = (0,)) -> list[str]:
    """Rows of cells in columns: the columns `left` are left-aligned, the others right-aligned."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = set(left)
    return [
        " " * indent
        + "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gib(size: float) -> str:
    return f"{size / 1024**3:,.3f} GiB"
