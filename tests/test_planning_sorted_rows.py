"""Sorted rows in a plan, by hand: buffers, tiles, and products that no kernel computes."""

import numpy as np
import pytest

from moe_jax.config import DataConfig, ExperimentConfig, MeshConfig, TrainingConfig
from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts.buffer import most_received_rows
from moe_jax.moe.run_experts.plan import Plan as Experts
from moe_jax.planning import sorted_rows as planning
from moe_jax.planning.compiled import Compiled, CompilerMemory
from moe_jax.planning.flops import different_layers
from moe_jax.planning.hlo import Program
from moe_jax.planning.memory import dispatch_bytes
from moe_jax.planning.report import Plan, describe
from moe_jax.planning.roofline import computed_flops
from moe_jax.planning.sorted_rows import executed_flops, flops_in_vain, sorted_rows
from moe_jax.planning.text import plan_text
from moe_jax.planning.topology import parse_topology
from moe_jax.planning.workload import resolve
from tests.moe_oracle import rows_computed

# Two sequences of 1,024 tokens on each of four devices, with 8 of 32 experts each, top 2.
TOKENS, WIDTH, HIDDEN, LAYERS = 2 * 1024, 256, 512, 3
FFN = 2 * 3 * WIDTH * HIDDEN  # forward FLOPs per row


EXPERTS_SPLIT = MeshConfig(data=1, expert=4)


def work_of(platform="tpu", mesh=EXPERTS_SPLIT, remat="none", **moe):
    settings = {
        "num_experts": 32, "num_selected_experts": 2, "expert_dim": HIDDEN,
        "activation": SwiGLU(), "run_experts": "ragged", "grouped_matmul": "megablox",
        "capacity": Capacity(train_factor=0.0, eval_factor=0.0),
    } | moe  # fmt: skip
    model = LanguageModel(
        vocab_size=32, model_dim=WIDTH, compute_dtype="bfloat16", remat=remat,
        parts={"attention": Attention(num_heads=2, head_dim=128), "moe": MoE(**settings)},
        stack=StackLayout(repeats=LAYERS, allow_lookahead=True),
    )  # fmt: skip
    config = ExperimentConfig(
        model=model,
        data=DataConfig(sequence_length=1024),
        training=TrainingConfig(batch_size=8),
        mesh=mesh,
    )
    return resolve(config, 4, platform)


def only(work, *row_tiles):
    (rows,) = sorted_rows(work, row_tiles)
    return rows


# The buffer.


@pytest.mark.parametrize(
    ("moe", "room", "worst"),
    [
        # Both choices of every token on four devices may go to one device.
        ({}, 4 * TOKENS * 2, 4 * TOKENS * 2),
        ({"buffer_factor": 1.5}, 1.5 * TOKENS * 2, 4 * TOKENS * 2),
        ({"buffer_factor": 9.0}, 4 * TOKENS * 2, 4 * TOKENS * 2),
        # 64 slots per sequence for a mean of 64 choices: no more than the mean of 8 experts.
        ({"capacity": Capacity(train_factor=1.0)}, TOKENS * 2, TOKENS * 2),
        # One expert per device takes one choice per token.
        ({"num_experts": 4}, 4 * TOKENS, 4 * TOKENS),
        ({"gate_on_input": True}, 4 * TOKENS * 2, 4 * TOKENS * 2),
    ],
)
def test_the_room_is_that_of_the_program(moe, room, worst):
    work = work_of(**moe)
    rows = only(work)
    assert (rows.buffer, rows.worst, rows.layers) == (room, worst, LAYERS)
    part = work.model.moe_parts["moe"]
    by_program = most_received_rows(
        tokens=TOKENS * (2 if part.gate_on_input else 1),
        num_choices=1 if part.gate_on_input else 2,
        num_own=part.num_experts // 4,
        num_devices=4,
        slots=2 * part.options(1024, training=True).slots,
    )
    assert by_program == worst
    # Rows before and after the exchange, there and back.
    layer = 2 * (TOKENS * 2 + room) * WIDTH * 2
    extra = TOKENS * 2 * WIDTH * 2 if part.gate_on_input else 0  # one token per choice
    (placed,) = different_layers(work.model, work.lengths)
    assert dispatch_bytes(work, placed) == layer + extra


def test_where_experts_are_not_split_every_choice_has_its_row():
    rows = only(work_of(mesh=MeshConfig(data=4), buffer_factor=2.0))
    assert (rows.num_experts, rows.buffer, rows.is_bounded) == (32, TOKENS * 2, False)


@pytest.mark.parametrize("way", ["gather", "einsum"])
def test_slots_are_no_sorted_rows(way):
    work = work_of(run_experts=way, grouped_matmul="auto")
    assert sorted_rows(work) == [] and flops_in_vain(work) == 0
    assert "rows sorted" not in plan_text(Plan(work, parse_topology("v5e:2x2")))


# Tiles.


@pytest.mark.parametrize(
    ("platform", "kernel", "tile", "vain"),
    [
        # 4,096 rows for 8 experts: 512 each; a tile is an eighth of that, but at least 128 rows.
        ("tpu", "megablox", 128, 7 * 128),
        ("gpu", "triton", 128, 8 * 64),
        ("gpu", "mosaic_gpu", 64, 8 * 32),
        ("cpu", "loop", 0, 0),
        # Every row of the buffer meets every expert.
        ("tpu", "dense", 0, 8 * 4 * TOKENS * 2 - TOKENS * 2),
    ],
)
def test_rows_computed_in_vain(platform, kernel, tile, vain):
    work = work_of(platform, grouped_matmul=kernel)
    rows = only(work)
    assert (rows.kernel, rows.tile, rows.computed - rows.filled) == (kernel, tile, vain)
    assert flops_in_vain(work) == 3 * LAYERS * vain * FFN  # once forward, twice backward
    again = work_of(platform, grouped_matmul=kernel, remat="full")
    assert flops_in_vain(again) == 4 * LAYERS * vain * FFN
    slots = work_of(platform, run_experts="gather", grouped_matmul="auto",
                    capacity=Capacity(train_factor=1.0))  # fmt: skip
    needed = computed_flops(slots)["experts"]
    assert computed_flops(work)["experts"] == pytest.approx(needed + 3 * LAYERS * vain * FFN)


@pytest.mark.parametrize(("aligned", "kernel"), [(True, "megablox"), (False, "triton")])
def test_the_rule_is_that_of_random_loads(aligned, kernel):
    rows = only(work_of("tpu" if aligned else "gpu", grouped_matmul=kernel))
    random = np.random.default_rng(0)
    sizes = [random.multinomial(rows.filled, np.full(8, 1 / 8)) for _ in range(200)]
    mean = np.mean([rows_computed(one, rows.tile, aligned) for one in sizes])
    assert rows.computed == pytest.approx(mean, rel=0.02)


def test_the_plan_says_what_is_computed_in_vain():
    bounded = plan_text(Plan(work_of(buffer_factor=1.5), parse_topology("v5e:2x2")))
    assert "moe: 4,096 rows for 8 experts" in bounded
    assert "room for 6,144 rows, 0.003 GiB a copy: 1.50 times as many (buffer_factor; the worst " \
        "case is 16,384)" in bounded  # fmt: skip
    assert "kernel megablox, tiles of 128 rows: 1.22 times the rows are computed" in bounded
    dense = plan_text(Plan(work_of(grouped_matmul="dense"), parse_topology("v5e:2x2")))
    assert "4.00 times as many (any load)" in dense
    assert "kernel dense: every row that there is room for meets every expert, 32.00 times" in dense


# A compiled program.


def compiled(flops, grouped_flops, row_tiles=()):
    memory = CompilerMemory(1, 0, 0, 0, 0)
    program = Program(flops, {}, (), {}, (), grouped_flops, row_tiles)
    return Compiled(memory, program, 1.0, 1.0)


def test_a_compiled_program_is_held_against_the_tiles_that_are_filled():
    work = work_of()
    whole = 3 * LAYERS * 4 * TOKENS * 2 * FFN  # of the whole buffer
    plan = Plan(work, parse_topology("v5e:2x2"), compiled(whole + 10**9, whole))
    filled = whole * (TOKENS * 2 + 7 * 128) // (4 * TOKENS * 2)
    assert executed_flops(plan.step.program, work) == pytest.approx(filled + 10**9)
    said = describe(plan)["compiled_step"]
    assert said["share_of_rows_in_kernels"] == 1 and said["flops"] == whole + 10**9
    assert said["flops_of_filled_tiles"] == pytest.approx(filled + 10**9)
    text = plan_text(plan)
    assert "with whole buffers" in text and "kernels compute" not in text


def test_a_gradient_of_weights_without_a_kernel_is_named():
    """As in libtpu 0.0.42.1: two of three products are kernels; the third is 8 times as large."""
    work = work_of()
    kernels = 2 * LAYERS * 4 * TOKENS * 2 * FFN
    plan = Plan(work, parse_topology("v5e:2x2"), compiled(5 * kernels, kernels))
    text = plan_text(plan)
    assert "kernels compute 67% of the products of sorted rows: the others, such as grad" in text


def test_the_compilers_tiles_take_the_place_of_the_assumed(monkeypatch):
    work = work_of()
    lax = Experts("ragged", "explicit", kernel="lax")
    monkeypatch.setattr(planning, "plan_experts", lambda moe: lax)
    assert (only(work).tile, only(work, 256).tile) == (128, 256)
    monkeypatch.undo()
    assert only(work, 256).tile == 128  # megablox has its own tiles
