"""Seconds at published rates, the bound, what does not fit and what would, and mesh sweeps."""

import dataclasses
import json
import math
import re
from unittest import mock

import jax
import pytest

from moe_jax.config import DataConfig, ExperimentConfig, MeshConfig, TrainingConfig
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.planning import sweep as sweeping
from moe_jax.planning.compiled import Compiled, CompilerMemory, out_of_memory
from moe_jax.planning.figures import memory_parts, write_figures
from moe_jax.planning.flops import KINDS, count_flops
from moe_jax.planning.hlo import Collective, Program
from moe_jax.planning.memory import estimate_memory
from moe_jax.planning.remedies import more_devices, remedies, together
from moe_jax.planning.report import Plan, describe
from moe_jax.planning.roofline import (
    Roofline,
    computed_flops,
    estimate,
    estimate_by_kind,
    model_flops,
    roofline,
)
from moe_jax.planning.sweep import describe_sweep, meshes, sweep, sweep_text
from moe_jax.planning.text import plan_text, table, verdict
from moe_jax.planning.topology import parse_topology
from moe_jax.planning.traffic import traffic_by_scope
from moe_jax.planning.workload import resolve
from moe_jax.training.state import abstract_batch, abstract_state
from moe_jax.training.step import make_train_step
from tests.tiny_run import tiny_config

GIB = 1024**3
V5P = parse_topology("v5p:2x2x1")
CONFIG = ExperimentConfig(
    model=LanguageModel(
        vocab_size=1024, model_dim=256, tie_embeddings=False, compute_dtype="bfloat16",
        parts={
            "attention": Attention(num_heads=4, head_dim=64),
            "mlp": Mlp(dim=512, activation=SwiGLU()),
            "moe": MoE(
                num_experts=8, num_selected_experts=2, expert_dim=128, run_experts="gather",
                capacity=Capacity(train_factor=1.0),
            ),
        },
        stack=StackLayout(first=(("attention", "mlp"),), repeats=2),
    ),
    data=DataConfig(sequence_length=128),
    training=TrainingConfig(batch_size=32),
    mesh=MeshConfig(data=2, expert=2),
)  # fmt: skip
# Chips of 16 GiB; 3.3 G parameters of 16 bytes each do not fit on each of four chips.
LARGE = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
        CONFIG.model,
        model_dim=2048,
        parts=CONFIG.model.part | {
            "mlp": Mlp(dim=4096, activation=SwiGLU()),
            "moe": dataclasses.replace(
                CONFIG.model.part["moe"], expert_dim=8192, capacity=Capacity()
            ),
        },
        stack=dataclasses.replace(CONFIG.model.stack, repeats=12),
    ),
    mesh=MeshConfig(data=4),
)  # fmt: skip


def test_seconds_are_work_over_published_rates():
    """A v5p does 459 TFLOP/s, moves 2,765 GB/s, sends 600 GB/s, and 6.25 GB/s to other slices."""
    inside, outside = 3 * 600e9, 4 * 6.25e9
    times = roofline(V5P, 459e12, 2 * 2765e9, inside + outside, outside)
    assert times == Roofline(1.0, 2.0, 3.0, 4.0)
    assert (times.seconds, times.seconds_in_turn, times.bound) == (4.0, 10.0, "network")
    assert times.mfu(459e12, 459e12) == 1 / 4


def test_a_chip_of_two_devices_shares_its_rates():
    times = roofline(parse_topology("tpu7x:2x2x1"), 2307e12 / 2, 7380e9 / 2, 0, 0)
    assert times == Roofline(1.0, 1.0, 0.0, 0.0)


def test_model_flops_leave_out_what_the_mathematics_does_not_need():
    work = resolve(CONFIG, 4)
    tokens = 32 * 128 / 4
    count = count_flops(CONFIG.model, 128)
    assert model_flops(work) == 3 * count.model * tokens
    assert sum(computed_flops(work).values()) == 3 * count.computed * tokens
    full = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="full"))
    assert model_flops(resolve(full, 4)) == model_flops(work)
    assert sum(computed_flops(resolve(full, 4)).values()) > model_flops(work)


def test_the_step_is_the_sum_of_its_kinds_of_layers():
    work = resolve(CONFIG, 4)
    by_kind = estimate_by_kind(work, V5P)
    assert set(by_kind) == {*KINDS, "teacher", "optimizer"}
    whole = estimate(work, V5P)
    assert whole.compute == pytest.approx(sum(computed_flops(work).values()) / 459e12)
    assert whole.memory == pytest.approx(sum(times.memory for times in by_kind.values()))
    assert by_kind["routing"].interconnect > 0, "dispatch over expert 2"
    assert whole.network == 0, "one slice"


def test_what_crosses_slices_or_nodes_takes_the_network():
    slices = dataclasses.replace(CONFIG, mesh=MeshConfig(slices=2, data=2, expert=2))
    assert estimate(resolve(slices, 8), parse_topology("2*v5p:2x2x1")).network > 0
    node, nodes = parse_topology("h100:4"), parse_topology("h100:2x2")
    assert estimate(resolve(CONFIG, 4), node).network == 0
    assert estimate(resolve(CONFIG, 4), nodes).network > 0
    # In nodes of one GPU nothing is sent inside.
    alone = estimate(resolve(CONFIG, 4), parse_topology("h100:4x1"))
    assert alone.interconnect == pytest.approx(0, abs=1e-12) and alone.network > 0


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (96.12G) exceeds available HBM (15.75G).",
            (96.12, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
            " hbm. Used 24.40G of 15.75G hbm. Exceeded hbm capacity by 8.65G.",
            (24.40, 15.75),
        ),
    ],
)
def test_a_refusal_of_the_compiler_is_read(message, said):
    assert out_of_memory(message) == pytest.approx([size * GIB for size in said])


def test_other_errors_are_not_refusals_and_unknown_ones_have_no_numbers():
    assert out_of_memory("INVALID_ARGUMENT: 3G of 2G hbm") is None
    needed, available = out_of_memory("RESOURCE_EXHAUSTED: in words only")
    assert math.isnan(needed) and math.isnan(available)


def test_what_does_not_fit_is_said_with_what_takes_the_memory_and_what_to_change():
    machine = parse_topology("v5e:2x2")
    plan = Plan(resolve(LARGE, 4, "tpu"), machine)
    assert not plan.fits and plan.needed > plan.available == 15.75 * GIB
    text = plan_text(plan)
    assert "does not fit" in text
    found = remedies(plan.work)
    assert [one.total_bytes for one in found] == sorted(one.total_bytes for one in found)
    by_change = {one.change: one for one in found}
    sharded = by_change["--config.mesh.data=1 --config.mesh.fsdp=4"]
    changed = dataclasses.replace(LARGE, mesh=MeshConfig(data=1, fsdp=4))
    assert sharded.total_bytes == estimate_memory(resolve(changed, 4, "tpu")).total
    assert sharded.saved_bytes == estimate_memory(plan.work).total - sharded.total_bytes
    assert "--config.mesh.data=1 --config.mesh.fsdp=4" in text
    assert not any("remat" in change and "none" in change for change in by_change)
    assert describe(plan)["fits"] is False and describe(plan)["remedies"]


def test_a_part_says_which_of_its_settings_would_need_less():
    def with_moe(**changes):
        moe = dataclasses.replace(CONFIG.model.part["moe"], **changes)
        model = dataclasses.replace(CONFIG.model, parts=CONFIG.model.part | {"moe": moe})
        return resolve(dataclasses.replace(CONFIG, model=model), 4)

    many = Capacity(train_factor=4.0)
    found = {one.change: one for one in remedies(with_moe(run_experts="einsum", capacity=many))}
    fewer = found["--config.model.parts.moe.capacity.train_factor=1.0"]
    assert fewer.total_bytes == estimate_memory(with_moe(run_experts="einsum")).total
    by_index = found["--config.model.parts.moe.run_experts=gather"]
    assert by_index.total_bytes == estimate_memory(with_moe(capacity=many)).total
    assert by_index.keeps_result and not fewer.keeps_result


def test_a_smaller_buffer_of_sorted_rows_is_offered_with_the_stop_that_keeps_the_result():
    def sorted_rows(**changes):
        changes |= {"run_experts": "ragged", "capacity": Capacity(train_factor=0.0)}
        moe = dataclasses.replace(LARGE.model.part["moe"], **changes)
        model = dataclasses.replace(LARGE.model, parts=LARGE.model.part | {"moe": moe})
        mesh = MeshConfig(data=1, expert=4)
        return resolve(dataclasses.replace(LARGE, model=model, mesh=mesh), 4)

    found = {one.change: one for one in remedies(sorted_rows())}
    bounded = found[
        "--config.model.parts.moe.buffer_factor=1.5 --config.model.parts.moe.stop_at_overflow=True"
    ]
    smaller = sorted_rows(buffer_factor=1.5, stop_at_overflow=True)
    assert bounded.total_bytes == estimate_memory(smaller).total and bounded.keeps_result


@pytest.mark.parametrize(("scope", "keeps"), [("global", True), ("microbatch", False)])
def test_more_microbatches_keep_the_result_unless_a_loss_is_of_one(scope, keeps):
    losses = (LoadBalance(weight=0.01, scope=scope),)
    moe = dataclasses.replace(LARGE.model.part["moe"], losses=losses)
    model = dataclasses.replace(LARGE.model, parts=LARGE.model.part | {"moe": moe})
    training = dataclasses.replace(LARGE.training, batch_size=1024)
    found = remedies(resolve(dataclasses.replace(LARGE, model=model, training=training), 4))
    cut = [one.keeps_result for one in found if "num_microbatches" in one.change]
    assert cut and set(cut) == {keeps}


def test_changes_are_put_together_until_it_fits():
    config = dataclasses.replace(
        LARGE, model=dataclasses.replace(LARGE.model, remat="none"), mesh=MeshConfig(data=4)
    )
    work = resolve(config, 4)
    available = 14 * GIB
    path = together(work, available)
    assert len(path) > 1 and path[-1].total_bytes <= available
    assert all(one.total_bytes > available for one in path[:-1])
    assert all(one.keeps_result for one in path)
    assert together(work, 1 * GIB) == [], "nothing helps"


def with_mesh(config, **sizes):
    return resolve(dataclasses.replace(config, mesh=MeshConfig(**sizes)))


def test_the_fewest_devices_that_are_enough_are_found():
    """State is 16 bytes for each of 3.3 G parameters: with two devices, more than a chip holds."""
    work = with_mesh(LARGE, data=1, fsdp=2)
    assert more_devices(work, 15.75 * GIB).mesh == MeshConfig(data=1, fsdp=2, expert=2)
    needed = {
        sizes: estimate_memory(with_mesh(LARGE, data=1, fsdp=sizes[0], expert=sizes[1])).total
        for sizes in ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4))
    }
    assert needed[2, 1] > 15.75 * GIB
    assert min((4, 1), (2, 2), (1, 4), key=needed.get) == (2, 2)
    # 32 sequences are split over at most 32 devices, 8 experts over at most 8.
    assert more_devices(work, 2.1 * GIB).mesh == MeshConfig(data=1, fsdp=4, expert=8)
    assert more_devices(work, 1.5 * GIB) is None


def test_remedies_that_are_not_enough_are_said_to_be_so_before_they_are_listed():
    huge = dataclasses.replace(LARGE, model=dataclasses.replace(LARGE.model, vocab_size=2**23))
    for config, said in (
        (LARGE, "\n4 v5e chips would do by arithmetic: "),
        (huge, "more chips do not help: on no mesh of up to 65,536"),
    ):
        config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=2))
        text = plan_text(Plan(resolve(config, 2, "tpu"), parse_topology("v5e:2x2")))
        assert "no change of settings is enough: the best below needs" in text
        assert text.index("no change of") < text.index(said) < text.index("change one of these")
        described = describe(Plan(resolve(config, 2, "tpu"), parse_topology("v5e:2x2")))
        assert not any(one["fits"] for one in described["remedies"])
        assert (described["more_devices"] is None) == ("do not help" in said)


def test_the_estimate_may_reach_less_where_the_compiler_needs_more():
    machine = parse_topology("v5e:2x2")
    work = resolve(CONFIG, 4, "tpu")
    estimated = estimate_memory(work).total
    assert Plan(work, machine).room == 15.75 * GIB
    needs = CompilerMemory(round(4 * estimated), 0, 0, 0, 0)
    plan = Plan(work, machine, Compiled(needs, PROGRAM, 1.0, 1.0))
    assert plan.room == pytest.approx(15.75 * GIB / 4)


def test_what_fits_by_arithmetic_is_said_to_and_warned_of_near_the_limit():
    """11.8 of 15.75 GiB are three quarters."""
    work, machine = resolve(CONFIG, 4, "tpu"), parse_topology("v5e:2x2")
    chip = machine.chip
    for share, warned in ((0.7, False), (0.8, True)):
        usable = estimate_memory(work).total / share
        roomy = dataclasses.replace(
            machine, chip=dataclasses.replace(chip, usable_hbm_bytes=usable)
        )
        said = verdict(Plan(work, roomy))
        assert said.startswith("fits by arithmetic: ") and f"({share:.0%})" in said
        assert ("compile before you rent" in said) == warned


def test_a_step_that_the_compiler_refused_does_not_fit_whatever_the_arithmetic_says():
    refused = Compiled(None, None, 3.0, 2.0, refused=(20.0 * GIB, 15.75 * GIB))
    plan = Plan(resolve(CONFIG, 4, "tpu"), parse_topology("v5e:2x2"), refused)
    assert not plan.fits and plan.needed == 20 * GIB
    assert "refused: needs 20.000 GiB of 15.750 GiB" in plan_text(plan)
    assert describe(plan)["compiled_step"]["refused"]["needed_bytes"] == 20 * GIB


def test_a_compiler_that_names_no_sizes_is_not_quoted_with_numbers():
    refused = Compiled(None, None, 3.0, 2.0, refused=out_of_memory("RESOURCE_EXHAUSTED: no room"))
    text = plan_text(Plan(resolve(CONFIG, 4, "tpu"), parse_topology("v5e:2x2"), refused))
    assert "refused: the compiler does not say how much it needs\n" in text
    assert "does not fit: the compiler refuses it, and does not say how much it needs\n" in text
    assert "nan" not in text


# A program for 4 devices: an all-to-all over expert, five times.
PROGRAM = Program(
    flops=10**12, traffic={"jit(step)/jvp()/while/body/moe/run_experts/gather": 10**10},
    uncounted={"kernel": 2}, unknown_loops=("while",),
    collectives=(Collective("all-to-all", "bf16[8]", 1000, (0, 1), "layer", 5),),
)  # fmt: skip
STEP = Compiled(CompilerMemory(100, 90, 80, 50, 5), PROGRAM, 1.5, 2.5, 5e11)


def test_a_compiled_step_is_reported_against_the_arithmetic():
    plan = Plan(resolve(CONFIG, 4, "tpu"), V5P, STEP)
    said = describe(plan)["compiled_step"]
    assert said["memory"]["total"] == 100 + 90 - 80 + 50 + 5 == describe(plan)["needed_bytes"]
    expected = sum(computed_flops(plan.work).values())
    assert said["flops_over_arithmetic"] == pytest.approx(10**12 / expected)
    (row,) = said["collectives"]
    assert (row["axes"], row["count"], row["wire_bytes"]) == (("expert",), 5, 2500)
    times = said["roofline"]
    assert times["seconds"]["compute"] == pytest.approx(1e12 / 459e12)
    assert times["bound"] == "memory"
    assert times["mfu_overlapped"] == pytest.approx(
        model_flops(plan.work) / 459e12 / (1e10 / 2765e9)
    )
    text = plan_text(plan)
    assert "fits: 0.000 GiB of 95.740 GiB" in text
    assert "counts the body of a loop once" in text and "kernel x2" in text and "while" in text
    assert said["hbm_bytes_by_scope"] == {"moe/run_experts": 10**10}
    assert re.search(r"memory traffic in +GB\n +moe/run_experts +10\.000 +100%\n", text)


def test_memory_traffic_has_the_scopes_of_its_instructions():
    """A transformation wraps the first scope; a name within another is none."""
    experts = "jit(step)/transpose(jvp(moe))/run_experts/experts/checkpoint/dot_general"
    again = "jit(step)/while/body/checkpoint/rematted_computation/moe/run_experts/experts/mul"
    traffic = {
        experts: 40, again: 20, "jit(step)/jvp(head)/dot_general": 30, "": 3,
        "jit(step)/headed/attention_of/mul": 5, "jit(step)/attention/add;jit(step)/mul": 2,
    }  # fmt: skip
    found = traffic_by_scope(dataclasses.replace(PROGRAM, traffic=traffic), CONFIG.model)
    expected = {"moe/run_experts/experts": 60, "head": 30, "other": 8, "attention": 2}
    assert list(found.items()) == list(expected.items())


def test_every_scope_is_in_the_training_step():
    config = tiny_config()
    state = abstract_state(config)
    batch = abstract_batch(config, (1, config.training.batch_size))
    lowered = jax.jit(make_train_step(config)).lower(state, batch)
    origins = set(re.findall(r'"(jit\([^"]+)"', lowered.as_text(debug_info=True)))
    found = traffic_by_scope(
        dataclasses.replace(PROGRAM, traffic=dict.fromkeys(origins, 1)), config.model
    )
    moe = {f"moe/{name}" for name in ("router", "run_experts", "run_experts/experts")}
    assert {*moe, "attention", "embedding", "head", "loss", "optimizer", "other"} <= set(found)


def test_json_holds_numbers_only_json_knows():
    for plan in (
        Plan(resolve(CONFIG, 4)),
        Plan(resolve(CONFIG, 4, "tpu"), V5P, STEP, STEP),
        Plan(resolve(CONFIG, 4, "gpu"), parse_topology("h100:4"), dataclasses.replace(
            STEP, cost_analysis_flops=None)),
    ):  # fmt: skip
        assert json.loads(json.dumps(describe(plan), allow_nan=False))["num_devices"] == 4


def test_the_meshes_of_a_machine_are_all_products():
    found = list(meshes(16, 2))
    assert len(found) == len(set(found)) == 20  # 2^3 as an ordered product of four: C(6, 3)
    assert all(mesh.num_devices == 16 and mesh.slices == 2 for mesh in found)


def test_a_sweep_puts_the_fastest_that_fit_first():
    machine = parse_topology("v5e:2x2")
    found = sweep(dataclasses.replace(LARGE, mesh=MeshConfig()), machine)
    assert len(found.fitting) + len(found.too_large) + sum(found.uneven.values()) == 10  # C(5, 3)
    assert all(one.memory.total <= 15.75 * GIB and one.fits for one in found.fitting)
    assert all(one.memory.total > 15.75 * GIB and not one.fits for one in found.too_large)
    for one in (found.fitting, found.too_large):
        assert [c.times.seconds for c in one] == sorted(c.times.seconds for c in one)
    copies = [one.work.mesh for one in found.too_large]
    assert MeshConfig(data=4) in copies, "four copies are too large"
    assert found.fitting[0].work.mesh.fsdp * found.fitting[0].work.mesh.expert > 1
    assert found.own == MeshConfig(data=4)
    last = found.fitting[-1].work.mesh
    with mock.patch.object(sweeping, "MAX_ROWS", 1):
        text = sweep_text(dataclasses.replace(found, own=last))
    assert f"the config's own mesh, number {len(found.fitting)} of these" in text
    text = sweep_text(found)
    assert f"{len(found.fitting)} meshes fit" in text and "do not fit" in text
    full = sum(one.memory.total > 0.75 * 15.75 * GIB for one in found.fitting)
    assert full and text.count("* ") + text.count("*\n") == full, "a mark at each, of which"
    assert "\n*: above 75% of the memory" in text
    said = json.loads(json.dumps(describe_sweep(found), allow_nan=False))
    assert said["fitting"][0]["mesh"]["expert"] == found.fitting[0].work.mesh.expert


def test_the_compiler_has_the_last_word_on_the_best(monkeypatch):
    def refuse(candidate, topology):
        return dataclasses.replace(candidate, compiled_bytes=math.inf, fits=False)

    monkeypatch.setattr(sweeping, "compile_candidate", refuse)
    config, machine = dataclasses.replace(CONFIG, mesh=MeshConfig()), parse_topology("v5e:2x2")
    before, after = sweep(config, machine), sweep(config, machine, compile_best=2)
    assert len(after.fitting) == len(before.fitting) - 2
    moved = [one.work.mesh for one in after.too_large[:2]]
    assert moved == [one.work.mesh for one in before.fitting[:2]]
    said = json.loads(json.dumps(describe_sweep(after), allow_nan=False))["too_large"][0]
    assert said["compiler_refused"] and said["compiled_bytes"] is None
    assert "refused (by arithmetic, 2 of them compiled)" in sweep_text(after)
    assert "0 are refused (by arithmetic)" in sweep_text(before)


def test_a_setting_that_no_mesh_mends_is_no_result_of_a_sweep():
    splash = dataclasses.replace(CONFIG.model.part["attention"], kernel="splash")
    model = dataclasses.replace(CONFIG.model, parts={**CONFIG.model.part, "attention": splash})
    config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig())
    with pytest.raises(ValueError, match="it runs on a TPU, here on a GPU"):
        sweep(config, parse_topology("h100:2"))
    assert sweep(config, parse_topology("v5e:1x1")).fitting


def test_a_dense_model_has_no_expert_axis():
    parts = {name: CONFIG.model.part[name] for name in ("attention", "mlp")}
    layers = StackLayout(unit=(("attention", "mlp"),), repeats=3)
    dense = dataclasses.replace(CONFIG.model, parts=parts, stack=layers)
    config = dataclasses.replace(CONFIG, model=dense, mesh=MeshConfig())
    found = sweep(config, parse_topology("v5p:2x2x1"))
    assert {one.work.mesh.expert for one in found.fitting} == {1}


def test_figures_are_written(tmp_path):
    plan = Plan(resolve(CONFIG, 4, "tpu"), V5P, STEP)
    names = [path.name for path in write_figures(plan, tmp_path / "new")]
    assert names == ["memory.png", "roofline.png"]
    assert all((tmp_path / "new" / name).stat().st_size > 5000 for name in names)
    assert [path.name for path in write_figures(Plan(resolve(CONFIG, 4)), tmp_path)] == [
        "memory.png"
    ]


def test_the_bar_of_memory_is_as_long_as_the_total():
    for config in (CONFIG, LARGE):
        memory = estimate_memory(resolve(config, 4))
        assert sum(memory_parts(memory).values()) == memory.total


def test_tables_align():
    assert table([("a", "10"), ("bcd", "2")]) == ["  a    10", "  bcd   2"]
