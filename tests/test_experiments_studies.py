"""The studies themselves: what their criteria say of made-up results, and that they run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import arm as experiments_arm
from experiments import run, scoring
from experiments.budget import check_budget, cost_of
from experiments.results import LOSS, RESULTS_FILE, Results, read_results
from experiments.study import SIZES, load_study, study_names
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from moe_jax.planning.arithmetic import count_flops, count_parameters
from moe_jax.training import loop
from moe_jax.training.signals import Interrupted
from tests.tiny_run import CACHE, ROOT

SEEDS = (0, 1, 2)
# Studies that are older than parts; `arms.jsonl` has what their arms were.
BEFORE_PARTS = {line["study"] for line in read_results(ROOT / "tests/golden/arms.jsonl")}
STEPS = [100, 200, 300, 400, 500, 600]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", study_names())
def test_arms_cost_the_same(name, size):
    check_budget(load_study(name), size)


@pytest.mark.parametrize("name", sorted(set(study_names()) & BEFORE_PARTS))
def test_arms_are_the_models_that_they_were(name):
    """Every arm at every size has the counts by component of commit f891836.

    `arms.jsonl` was written by its code, before models had parts; zeros are left out. Arms, sizes
    and studies that were added since are not in it.
    """
    study = load_study(name)
    lines = read_results(ROOT / "tests/golden/arms.jsonl")
    lines = [line for line in lines if line["study"] == name]
    for line in lines:
        config = study.experiment(line["size"], line["arm"], 0)
        for counts, count in (("parameters", count_parameters), ("flops", count_flops)):
            counted = dataclasses.asdict(count(config.model, config.data.sequence_length))
            assert {k: v for k, v in counted.items() if v} == line[counts], line


@pytest.mark.parametrize("name", study_names())
def test_lines_of_results_are_of_the_arms_of_today(name):
    study = load_study(name)
    for line in read_results(study.directory / RESULTS_FILE):
        study.check_row(line)  # of its settings
        cost = cost_of(study, line["size"], line["arm"])
        parameters, flops = line["parameters"], line["forward_flops_per_token"]
        assert parameters == {"total": cost.total_parameters, "active": cost.active_parameters}
        assert flops == {"active": cost.active, "computed": cost.computed}


def test_a_line_of_results_from_before_models_had_parts_is_compared_as_well():
    study = load_study("switch_against_dense")
    line = read_results(study.directory / RESULTS_FILE)[-1]
    assert "format" not in line["config"]
    line["config"]["model"]["moe"]["capacity"]["train_factor"] = 1.5
    changed = r"config.model.parts.moe.capacity.train_factor: 1.5 -> 1.25\. Bring the study back"
    with pytest.raises(ValueError, match=changed):
        study.check_row(line)


def row(arm, seed, final, curve=(), **measures):
    return {
        "arm": arm,
        "seed": seed,
        "measures": {LOSS: final, **measures},
        "curve": {"step": STEPS, LOSS: list(curve)},
    }


# Smoothed, these end at 2.2 (dense) and pass it after 300 and 400 steps.
DENSE = (4.0, 3.0, 2.6, 2.4, 2.2, 2.0)
FAST = (3.0, 2.0, 1.6, 1.4, 1.3, 1.2)
SLOW = (3.2, 2.6, 2.2, 1.7, 1.6, 1.5)


def judged(study, results):
    """What each claim of a study finds in made-up results, of some arms."""
    return [claim.judge(results) for claim in study.expect]


def of_seed(loss, seed, place=0):
    """A loss whose difference to the dense one spreads by 0.001; every second arm the other way.

    Of three pairs with the dense arm 0.0025 shows a direction: t = sqrt(3) 0.0025 / 0.001 = 4.33.
    """
    return loss + 0.01 * seed + (0.001 if place % 2 else -0.001) * (seed - 1)


def switch_results(losses, curve, seeds=SEEDS):
    rows = [row("dense", seed, 1.0 + 0.01 * seed, DENSE) for seed in range(5)]
    for arm, loss in losses.items():
        rows += [row(arm, seed, of_seed(loss, seed), curve) for seed in seeds]
    return Results(tuple(rows), "dense")


GAIN = {"switch_2": 0.95, "switch_4": 0.90, "switch_8": 0.85}


@pytest.mark.parametrize(
    ("losses", "curve", "seeds", "expected"),
    [
        (GAIN, FAST, SEEDS, (REPRODUCED,) * 3),  # 600 / 300 = 2
        (GAIN, SLOW, SEEDS, (REPRODUCED,) * 3),  # 600 / 400 = 1.5, which is enough
        (GAIN, DENSE, SEEDS, (NOT_REPRODUCED, REPRODUCED, REPRODUCED)),
        (GAIN, FAST, (0, 1), (INCONCLUSIVE,) * 3),
        (
            GAIN | {"switch_2": 0.90, "switch_4": 0.95, "switch_8": 0.998},
            FAST, SEEDS, (REPRODUCED, INCONCLUSIVE, NOT_REPRODUCED),
        ),
        # E = 2 and 4 swapped: 0.8, just enough.
        (
            {"switch_2": 0.90, "switch_4": 0.95, "switch_8": 0.85},
            FAST, SEEDS, (REPRODUCED, REPRODUCED, REPRODUCED),
        ),
        (
            {"switch_2": 1.05, "switch_4": 1.1, "switch_8": 1.2},
            FAST, SEEDS, (REPRODUCED, NOT_REPRODUCED, NOT_REPRODUCED),
        ),
    ],
)  # fmt: skip
def test_the_criterion_of_switch_against_dense(losses, curve, seeds, expected):
    study = load_study("switch_against_dense")
    findings = judged(study, switch_results(losses, curve, seeds))
    assert tuple(finding.verdict for finding in findings) == expected, findings


def distillation_results(seeds=SEEDS, **losses):
    """A gap of 0.2 to the teacher; the losses of the others are shares of it."""
    shares = {"init": 0.0, "distilled": 0.03, "distilled_init": 0.2, "distilled_init_mixed": 0.29}
    ends = {"dense": 1.0, "teacher": 0.8} | {a: 1 - 0.2 * s for a, s in (shares | losses).items()}
    rows = [row(arm, seed, of_seed(loss, seed, arm == "dense")) for arm, loss in ends.items()
            for seed in seeds]  # fmt: skip
    return Results(tuple(rows), "dense")


@pytest.mark.parametrize(
    ("results", "verdicts"),
    [
        (distillation_results(), (REPRODUCED,) * 5),
        (distillation_results(distilled_init_mixed=0.1),
         (REPRODUCED, REPRODUCED, NOT_REPRODUCED, NOT_REPRODUCED, REPRODUCED)),
        (distillation_results(init=0.2), (*(REPRODUCED,) * 4, NOT_REPRODUCED)),
        (distillation_results(seeds=(0, 1)), (INCONCLUSIVE,) * 5),
    ],
)  # fmt: skip
def test_what_distillation_shows(results, verdicts):
    found = judged(load_study("distillation"), results)
    assert tuple(finding.verdict for finding in found) == verdicts, found


def capacity_results(**changes):
    """Results as the literature would have them, but for some measures of some arms."""
    rows = [row("dense", seed, 1.0 + 0.01 * seed) for seed in range(5)]
    for arm in ("dense_1.25", "dense_2.0"):
        rows += [row(arm, seed, 0.95 + 0.01 * seed) for seed in SEEDS]
    for family in ("top1", "top2_assignment", "top2_token"):
        for factor, loss in ((1.0, 0.83), (1.25, 0.82), (2.0, 0.81)):
            arm = f"{family}_{factor}"
            by_token = family == "top2_token"
            measures = {
                "loss": loss,
                "capacity_limited": loss,
                "evaluated_at_1.0": 0.85,
                "evaluated_at_1.25": 0.83,
                "evaluated_at_2.0": 0.82,
                "dropped_fraction": (2.05 - factor) / 2 if by_token else 0.02 / factor,
                **changes.get(arm.replace(".", "_"), {}),
            }
            rows += [row(arm, s, of_seed(measures["loss"], s), **measures) for s in SEEDS]
    return Results(tuple(rows), "dense")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [REPRODUCED] * 6),
        ({"top1_2_0": {"loss": 0.998}}, [INCONCLUSIVE] + [REPRODUCED] * 5),
        ({"top2_token_1_0": {"loss": 1.05}}, [NOT_REPRODUCED] + [REPRODUCED] * 5),
        (
            {"top1_1_25": {"capacity_limited": 0.9}},
            [REPRODUCED, NOT_REPRODUCED] + [REPRODUCED] * 4,
        ),
        # Evaluated with more capacity it is no better: no gain after 1.25.
        (
            {"top1_1_25": {"evaluated_at_1.25": 0.82}},
            [REPRODUCED] * 2 + [NOT_REPRODUCED] + [REPRODUCED] * 3,
        ),
        # A gain of 0.04 after 1.25, of 0.03 after 1.0.
        (
            {"top1_1_25": {"evaluated_at_1.25": 0.86}},
            [REPRODUCED] * 3 + [NOT_REPRODUCED] + [REPRODUCED] * 2,
        ),
        (
            {"top1_1_0": {"dropped_fraction": 0.04}, "top1_1_25": {"dropped_fraction": 0.031}},
            [REPRODUCED] * 4 + [NOT_REPRODUCED, REPRODUCED],
        ),
        ({"top2_token_1_0": {"dropped_fraction": 0.45}}, [REPRODUCED] * 5 + [NOT_REPRODUCED]),
    ],
)
def test_the_criterion_of_capacity_factors(changes, expected):
    study = load_study("capacity_factors")
    findings = judged(study, capacity_results(**changes))
    assert [finding.verdict for finding in findings] == expected, findings


def made_up(arms, seeds=SEEDS, **changes):
    """Five dense runs, and arms with the same measures in every seed but for these changes."""
    rows = [row("dense", seed, 1.0 + 0.01 * seed, **arms.get("dense", {})) for seed in range(5)]
    for place, (arm, measures) in enumerate(arms.items()):
        if arm != "dense":
            said = {"loss": 0.9, **measures, **changes.get(arm.replace(".", "_"), {})}
            rows += [row(arm, seed, of_seed(said["loss"], seed, place), **said) for seed in seeds]
    return Results(tuple(rows), "dense")


STILL = {"moved": 1e-6, "prefix_rise": -1e-6, "other_rise": 0.0}
LEAKY = {
    "moved": 0.5,
    "prefix_rise": 0.2,
    "other_rise": 0.1,
}  # the floor of five dense seeds is 0.0158
LEAKS = {
    **dict.fromkeys(("dense", "token_major_1.0", "expert_choice_safe"), STILL),
    **dict.fromkeys(("expert_choice", "soft", "batch_prioritized_1.0"), LEAKY),
    **dict.fromkeys(("choice_major_1.0", "choice_major_1.25"), LEAKY | {"prefix_rise": 0.0}),
}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"choice_major_1_25": {"moved": 0.009}}, {0: NOT_REPRODUCED}),
        ({"token_major_1_0": {"moved": 2e-4}}, {1: NOT_REPRODUCED}),
        ({"expert_choice_safe": {"prefix_rise": -2e-4}}, {1: NOT_REPRODUCED}),
        ({"soft": {"prefix_rise": 0.079}}, {2: NOT_REPRODUCED}),
        ({"expert_choice": {"prefix_rise": 0.08}}, {}),
        ({"expert_choice": {"other_rise": 0.03}}, {3: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_future_leaks(changes, failed):
    findings = judged(load_study("future_leaks"), made_up(LEAKS, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(4)]
    assert [finding.verdict for finding in findings] == expected, findings


EVEN = {
    "fullest_expert": 1.2, "heldout_violation": 0.3, "early_violation": 1.0, "max_violation": 0.4,
    "domain_information": 0.5,
}  # fmt: skip
BALANCE = {
    "none": {**EVEN, "heldout_violation": 3.0},
    "none_noisy": {**EVEN, "fullest_expert": 5.0},
    **dict.fromkeys(("importance_load_0.1", "switch_global_0.01"), EVEN),
    "switch_global_0.1": {**EVEN, "loss": 0.85},
    "switch_micro_0.1": {**EVEN, "domain_information": 0.2},
    "loss_free_1e-4": {**EVEN, "early_violation": 2.0},
    "loss_free_1e-3": {**EVEN, "heldout_violation": 0.05},
    "loss_free_1e-2": {**EVEN, "max_violation": 0.6},
}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"none_noisy": {"fullest_expert": 3.5}}, {0: NOT_REPRODUCED}),
        ({"switch_global_0_01": {"heldout_violation": 0.6}}, {1: NOT_REPRODUCED}),
        ({"loss_free_1e-3": {"heldout_violation": 0.11}}, {2: NOT_REPRODUCED}),
        ({"switch_global_0_01": {"heldout_violation": 0.14}}, {2: NOT_REPRODUCED}),
        ({"loss_free_1e-3": {"loss": 0.95}}, {3: NOT_REPRODUCED}),
        ({"none_noisy": {"loss": 0.89}}, {3: INCONCLUSIVE}),
        ({"loss_free_1e-2": {"max_violation": 0.3}}, {4: NOT_REPRODUCED}),
        ({"switch_global_0_1": {"loss": 0.899}}, {5: INCONCLUSIVE}),
        ({"switch_micro_0_1": {"domain_information": 0.3}}, {5: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_balance(changes, failed):
    findings = judged(load_study("balance"), made_up(BALANCE, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(6)]
    assert [finding.verdict for finding in findings] == expected, findings


LEARNED = (
    "switch", "top2", "top2_raw", "mixtral", "sigmoid_loss_free", "noisy", "jitter",
    "group_limited", "cosine",
)  # fmt: skip
TOURNAMENT = {
    **{arm: {"loss": 0.9} for arm in (*LEARNED, "hash_token")},
    "sampled": {"loss": 0.95},
    "hash_position": {"loss": 1.0},
    "random": {"loss": 1.01},
    "base": {"loss": 0.9, "max_violation": 0.0},
}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"cosine": {"loss": 0.998}}, {0: INCONCLUSIVE}),
        ({"noisy": {"loss": 1.04}}, {0: NOT_REPRODUCED}),
        ({"random": {"loss": 0.94}}, {1: NOT_REPRODUCED}),
        ({"hash_token": {"loss": 0.86}}, {2: NOT_REPRODUCED}),
        ({"sampled": {"loss": 0.901}}, {3: INCONCLUSIVE}),
        ({"jitter": {"loss": 0.94}}, {4: NOT_REPRODUCED}),
        ({"jitter": {"loss": 0.86}}, {4: NOT_REPRODUCED}),
        ({"base": {"max_violation": 0.02}}, {5: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_router_tournament(changes, failed):
    findings = judged(load_study("router_tournament"), made_up(TOURNAMENT, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(6)]
    assert [finding.verdict for finding in findings] == expected, findings


GRANULARITY = {
    **{f"fine_{g}": {"loss": 0.88 + 0.03 * g**-0.58} for g in (1, 2, 4, 8)},
    "shared_31": {"loss": 0.893, "shared_rise": 0.5, "routed_rise": 0.1},
}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"fine_8": GRANULARITY["fine_2"]}, {0: INCONCLUSIVE}),
        ({"fine_8": {"loss": 0.95}}, {0: NOT_REPRODUCED, 1: NOT_REPRODUCED}),
        ({"shared_31": {"loss": 0.95}}, {2: NOT_REPRODUCED}),
        ({"shared_31": {"shared_rise": 0.49}}, {3: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_granularity(changes, failed):
    findings = judged(load_study("granularity"), made_up(GRANULARITY, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(4)]
    assert [finding.verdict for finding in findings] == expected, findings


TOP_K = {f"top{k}_{count}": {"loss": 0.9} for count in (16, 32) for k in (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"top8_16": {"loss": 0.998}}, {0: INCONCLUSIVE}),
        ({"top8_16": {"loss": 1.05}}, {0: NOT_REPRODUCED}),
        ({"top2_32": {"loss": 0.91}}, {1: INCONCLUSIVE}),
        ({"top2_32": {"loss": 0.95}}, {1: NOT_REPRODUCED}),
        ({"top2_32": {"loss": 0.85}}, {}),
    ],
)
def test_the_criterion_of_top_k(changes, failed):
    findings = judged(load_study("top_k"), made_up(TOP_K, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(2)]
    assert [finding.verdict for finding in findings] == expected, findings


TUNED = {
    "all": 0.90, "not_moe": 0.90, "moe": 0.99, "attention": 0.92, "mlp": 0.91,
    "router_frozen": 0.88, "moments": 0.87,
}  # fmt: skip
REGULARISED = {
    "all": 0.90, "dropout_0.1": 0.90, "dropout_0.2": 0.91, "dropout_0.3": 0.93, "expert_0.4": 0.90,
    "dropped_0.1": 0.9, "capacity_0.75": 0.90, "capacity_2.0": 0.90, "capacity_0.75_no_loss": 0.90,
}  # fmt: skip


def tuned_results(targets, **changes):
    """Five seeds of arms with these held-out losses of the target, and of training."""
    rows = [row("pretrained", seed, 1.0 + 0.01 * seed, target=3.0, train=2.0) for seed in range(5)]
    for place, (arm, target) in enumerate(targets.items()):
        target = changes.get(arm.replace(".", "_"), target)
        for seed in range(5):
            loss = of_seed(target, seed, place)
            rows.append(row(arm, seed, loss, target=loss, train=loss))
    return Results(tuple(rows), "pretrained")


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"mlp": 0.999}, {0: NOT_REPRODUCED}),
        ({"moe": 0.85}, {0: NOT_REPRODUCED, 1: NOT_REPRODUCED}),
        ({"not_moe": 0.95}, {2: NOT_REPRODUCED}),
        ({"router_frozen": 0.93}, {3: NOT_REPRODUCED}),
        ({"moments": 0.95}, {4: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_finetuning_subsets(changes, failed):
    findings = judged(load_study("finetuning_subsets"), tuned_results(TUNED, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(5)]
    assert [finding.verdict for finding in findings] == expected, findings


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"expert_0_4": 0.95}, {0: NOT_REPRODUCED}),
        ({"capacity_0_75": 0.95}, {1: NOT_REPRODUCED, 2: NOT_REPRODUCED}),
        ({"capacity_0_75_no_loss": 0.85}, {2: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_finetuning_regularisation(changes, failed):
    study = load_study("finetuning_regularisation")
    findings = judged(study, tuned_results(REGULARISED, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(3)]
    assert [finding.verdict for finding in findings] == expected, findings


def test_fine_tuned_arms_start_from_the_pretrained_one_of_their_seed():
    study = load_study("finetuning_subsets")
    config = study.experiment("smoke", "moe", 2, runs="some/runs")
    assert config.init_from.path == "some/runs/pretrained_seed2"
    assert config.data.domain_weights == (("python", 1.0),)
    pretrained = study.experiment("smoke", "pretrained", 2)
    assert pretrained.init_from.path == "" and "python" not in dict(pretrained.data.domain_weights)
    assert pretrained.training.num_steps > config.training.num_steps


SQUARED = {"0": 9.0, "1e-4": 6.0, "1e-3": 2.0, "1e-2": 0.5}
Z_LOSS = {
    **{f"z_{w}": {"squared_logsumexp": v, "router_flips": 0.01} for w, v in SQUARED.items()},
    "z_0_fast": {"squared_logsumexp": 30.0},
    "z_1e-3_fast": {"squared_logsumexp": 10.0},
    "selective": {},
}
BITS = {"domain_bits": 0.4, "domain_shuffled": 0.1, "token_bits": 0.9, "token_shuffled": 0.2}
SPECIALISATION = {
    **dict.fromkeys(("switch_global_0.1", "loss_free_1e-3"), BITS),
    "switch_micro_0.1": BITS | {"domain_bits": 0.15},
}
STEADY = {"noise_flips": 0.01, "checkpoint_flips": 0.2}
INSTABILITY = {
    **{f"top{k}": {**STEADY, "noise_flips_set": 0.01 * k} for k in (1, 2, 4)},
    **{f"top{k}_jitter": {} for k in (1, 2)},
}
MULTI_TOKEN = {"plain": {}, "module": {}, "longer": {"loss": 0.898}}


@pytest.mark.parametrize(
    ("name", "arms", "changes", "failed"),
    [
        ("router_z_loss", Z_LOSS, {}, {}),
        ("router_z_loss", Z_LOSS, {"z_1e-4": {"squared_logsumexp": 9.5}}, {0: NOT_REPRODUCED}),
        ("router_z_loss", Z_LOSS, {"z_0_fast": {"squared_logsumexp": 29.0}}, {0: NOT_REPRODUCED}),
        ("router_z_loss", Z_LOSS, {"z_1e-3_fast": {"loss": 0.95}}, {1: NOT_REPRODUCED}),
        ("router_z_loss", Z_LOSS, {"selective": {"loss": 0.95}}, {2: NOT_REPRODUCED}),
        ("router_z_loss", Z_LOSS, {"z_0": {"router_flips": 9e-4}}, {3: NOT_REPRODUCED}),
        ("specialisation", SPECIALISATION, {}, {}),
        ("specialisation", SPECIALISATION, {"loss_free_1e-3": {"domain_bits": 0.29}},
         {0: NOT_REPRODUCED}),
        ("specialisation", SPECIALISATION, {"loss_free_1e-3": {"token_bits": 0.59}},
         {1: NOT_REPRODUCED}),
        ("specialisation", SPECIALISATION, {"switch_micro_0_1": {"domain_bits": 0.21}},
         {2: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {}, {}),
        ("router_instability", INSTABILITY, {"top4": {"noise_flips": 0.06}}, {0: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top1": {"checkpoint_flips": 0.0}},
         {1: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top4": {"noise_flips_set": 0.015}},
         {2: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top1_jitter": {"loss": 0.85}}, {3: NOT_REPRODUCED}),
        ("multi_token", MULTI_TOKEN, {}, {}),
        ("multi_token", MULTI_TOKEN, {"module": {"loss": 0.95}},
         {0: NOT_REPRODUCED, 1: NOT_REPRODUCED}),
        ("multi_token", MULTI_TOKEN, {"longer": {"loss": 0.85}}, {1: NOT_REPRODUCED}),
    ],
)  # fmt: skip
def test_the_criteria_of_the_smaller_studies(name, arms, changes, failed):
    named = {arm.replace(".", "_"): change for arm, change in changes.items()}
    study = load_study(name)
    findings = judged(study, made_up(arms, **named))
    expected = [failed.get(place, REPRODUCED) for place in range(len(study.expect))]
    assert [finding.verdict for finding in findings] == expected, findings


@pytest.mark.parametrize("size", ["small", "gpu", "base"])
def test_the_cost_of_predicting_two_tokens_is_counted(size):
    """As many training FLOPs as the arm without the module, which takes more steps."""
    study = load_study("multi_token")
    module, longer = (
        cost_of(study, size, arm).active * study.experiment(size, arm, 0).training.num_steps
        for arm in ("module", "longer")
    )
    assert module / longer == pytest.approx(1, abs=0.05)


def test_finer_experts_have_the_parameters_and_the_cost_of_coarser_ones():
    """But for the router, which grows by its outputs alone: 64 inputs for each, in two layers."""
    study = load_study("granularity")
    costs = {arm.name: cost_of(study, "small", arm.name) for arm in study.arms_at("small")}
    for granularity in (2, 4, 8):
        more = 2 * 64 * (8 * granularity - 8)
        fine, whole = costs[f"fine_{granularity}"], costs["fine_1"]
        assert fine.total_parameters - whole.total_parameters == more
        assert fine.active - whole.active == 2 * more
    for routed, fine in ((31, 4), (63, 8)):
        shared = costs[f"shared_{routed}"]
        assert costs[f"fine_{fine}"].total_parameters - shared.total_parameters == 2 * 64
    top_k = load_study("top_k")
    pairs = (("top2_32", "top1_16"), ("top4_32", "top2_16"), ("top8_32", "top4_16"))
    for more, fewer in pairs:
        a, b = (cost_of(top_k, "small", arm) for arm in (more, fewer))
        assert a.total_parameters - b.total_parameters == 2 * 64 * 16


def test_experts_that_are_taken_out_give_nothing():
    """A routed one and the shared one, by the sums of their last weights."""
    study = load_study("granularity")
    config = study.experiment("smoke", "shared_31", 0)
    params = jax.tree.map(lambda spec: np.ones(spec.shape), config.model.specs())
    moe = params["stack"]["unit"]["0"]["moe"]
    without = scoring.without_routed_expert(config, params, 3)["stack"]["unit"]["0"]["moe"]
    sums_E = without["experts"]["wo"].sum(axis=(0, 2, 3))
    assert sums_E[3] == 0 and (np.delete(sums_E, 3) > 0).all() and len(sums_E) == 31
    assert (without["experts"]["wi"] == moe["experts"]["wi"]).all()
    assert without["shared"]["wo"].sum() == moe["shared"]["wo"].sum()
    shared = scoring.without_shared_expert(config, params)["stack"]["unit"]["0"]["moe"]
    assert shared["shared"]["wo"].sum() == 0 and shared["experts"]["wo"].all()
    assert list(scoring.routed_experts(config, 4)) == [0, 8, 16, 24]


def test_leaks_are_inconclusive_without_the_noise():
    """Two arms alone: no dense runs to take the noise from."""
    results = made_up(LEAKS)
    alone = Results(tuple(row for row in results.rows if row["arm"] != "dense"), "dense")
    findings = judged(load_study("future_leaks"), alone)
    assert [finding.verdict for finding in findings[1:]] == [INCONCLUSIVE] * 3


@pytest.mark.slow
def test_an_arm_that_is_stopped_goes_on_and_says_the_same(tmp_path, monkeypatch):
    """Stopped inside its training, an arm has no line; run again it resumes and has one."""
    study = load_study("switch_against_dense")
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    real = loop.train_batches

    def stopping(*args, start_step, **kwargs):
        batches = real(*args, start_step=start_step, **kwargs)
        for step, batch in enumerate(batches, start_step + 1):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def go(directory):
        results = tmp_path / directory / "results.jsonl"
        jobs = run.jobs_of(
            study, "smoke", arms=("switch_2",), num_seeds=1, runs=tmp_path / directory,
            results=results,
        )  # fmt: skip
        with run.Board(jobs) as board:
            run.run_in_turn(jobs, board)
        return read_results(results)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 3"):
        patch.setattr(loop, "train_batches", stopping)
        go("stopped")
    assert not (tmp_path / "stopped" / "results.jsonl").exists()
    (resumed,), (expected,) = go("stopped"), go("never_stopped")
    assert resumed["sessions"] == 2 and expected["sessions"] == 1
    for name in ("measures", "curve", "heldout", "config", "data", "parameters"):
        assert resumed[name] == expected[name], name
    assert resumed["curve"]["step"] == [2, 4, 6]
    assert resumed["tokens"] == 6 * 4 * 32
    assert set(resumed["heldout"]) == {"dropless", "capacity_limited"}
    assert "drama" in resumed["heldout"]["dropless"]["domains"]
    assert str(tmp_path) not in json.dumps(resumed)
    monkeypatch.setattr(experiments_arm, "train", None)
    assert go("stopped") == [resumed]


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_every_study_passes_its_smoke_run(name, tmp_path):
    study = load_study(name)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XDG_CACHE_HOME": str(CACHE),
    }

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    command("experiments.run", name, "--smoke", f"--runs={tmp_path}", f"--out={tmp_path / 'out'}")
    rows = read_results(tmp_path / "out" / "results.jsonl", "smoke")
    assert sorted(row["arm"] for row in rows) == sorted(arm.name for arm in study.arms_at("smoke"))
    columns = {name for row in rows for name in row["measures"]}
    assert columns >= {LOSS, *study.measures}
    command("experiments.report", name, f"--out={tmp_path / 'out'}")
    page = (tmp_path / "out" / "smoke.md").read_text()
    assert "**inconclusive**" in page  # of one seed
    assert (tmp_path / "out" / "curves_smoke.png").stat().st_size > 0
