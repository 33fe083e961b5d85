"""Criteria of the studies applied to made-up results."""

import pytest

from experiments.capacity_factors import study as capacity_factors
from experiments.distillation.study import mean_recovered
from experiments.results import Results
from experiments.study import load_study
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from moe_jax.training.files import EVALUATION_FILE
from tests.made_up_study import SEEDS, judged, made_up, of_seed, row

# Smoothed, dense ends at 2.2. The experts pass 2.2 after 300 and 400 steps.
DENSE = (4.0, 3.0, 2.6, 2.4, 2.2, 2.0)
FAST = (3.0, 2.0, 1.6, 1.4, 1.3, 1.2)
SLOW = (3.2, 2.6, 2.2, 1.7, 1.6, 1.5)


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
        (GAIN, SLOW, SEEDS, (REPRODUCED,) * 3),  # 600 / 400 = 1.5: enough
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
    """A gap of 0.2 to the teacher. Other arms close these shares of it."""
    shares = {"init": 0.0, "distilled": 0.03, "distilled_init": 0.2, "distilled_init_mixed": 0.29}
    ends = {"dense": 1.0, "teacher": 0.8} | {a: 1 - 0.2 * s for a, s in (shares | losses).items()}
    rows = [row(arm, seed, of_seed(loss, seed, arm == "dense")) for arm, loss in ends.items()
            for seed in seeds]  # fmt: skip
    return Results(tuple(rows), "dense")


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        # Counted from dense the share is 0.29, as published; from the parameters alone it is 0.14.
        ({"init": 0.15}, {2: NOT_REPRODUCED}),
        ({"distilled": 0.2}, {3: INCONCLUSIVE}),
        ({"distilled": 0.3}, {3: NOT_REPRODUCED}),
        ({"distilled_init_mixed": 0.16}, {}),  # hard targets cost less than 0.03 bits
        ({"distilled_init_mixed": -0.1}, {2: NOT_REPRODUCED, 3: NOT_REPRODUCED}),
        ({"seeds": (0, 1)}, dict.fromkeys(range(4), INCONCLUSIVE)),
    ],
)
def test_the_criterion_of_distillation(changes, failed):
    findings = judged(load_study("distillation"), distillation_results(**changes))
    expected = [failed.get(place, REPRODUCED) for place in range(4)]
    assert [finding.verdict for finding in findings] == expected, findings


def test_without_a_gap_distillation_is_inconclusive():
    """Shares of a missing gap are undefined: a teacher diverged, or is 4 sd below in one seed."""
    study, results = load_study("distillation"), distillation_results()
    found = judged(study, diverged(results, ("teacher", 2)))
    assert [finding.verdict for finding in found[:3]] == [INCONCLUSIVE] * 3
    assert found[1].because.endswith("in 2 of 3 seeds")
    apart = {0: 0.01, 1: 0.0, 2: -0.01}
    rows = [row("dense", s, 1.0) for s in apart] + [row("teacher", s, 0.95 + x)
                                                    for s, x in apart.items()]  # fmt: skip
    others = [r for r in results.rows if r["arm"] not in ("dense", "teacher")]
    found = judged(study, Results((*rows, *others), "dense"))
    assert [f.verdict for f in found[:3]] == [REPRODUCED, INCONCLUSIVE, INCONCLUSIVE], found


def test_the_share_of_targets_beside_parameters_alone_is_the_published_one():
    """Table 6 of Switch Transformers: log perplexities 1.639, 1.580, 1.636 and 1.444."""
    ends = {"init": 1.639, "distilled_init_mixed": 1.580, "dense": 1.636, "teacher": 1.444}
    rows = [row(arm, seed, loss) for arm, loss in ends.items() for seed in SEEDS]
    results = Results(tuple(rows), "dense")
    assert f"{mean_recovered(results, 'distilled_init_mixed', 'init'):.0%}" == "31%"
    assert f"{mean_recovered(results, 'distilled_init_mixed'):.0%}" == "29%"


def capacity_results(**changes):
    """Results as in the literature, with changed measures for some arms."""
    dense = [("dense", 1.0), ("dense_1.25", 0.98), ("dense_2.0", 0.95)]
    rows = [row(arm, seed, loss + 0.01 * seed, capacity_limited=loss + 0.01 * seed)
            for arm, loss in dense for seed in range(5)]  # fmt: skip
    for family in ("top1", "top2_assignment", "top2_token"):
        for factor, loss in ((1.0, 0.83), (1.25, 0.82), (2.0, 0.81)):
            arm = f"{family}_{factor}"
            by_token = family == "top2_token"
            measures = {
                "loss": loss,
                "evaluated_at_1.0": 0.85,
                "evaluated_at_1.25": 0.83,
                "evaluated_at_2.0": 0.82,
                "dropped_fraction": (2.05 - factor) / 2 if by_token else 0.02 / factor,
                **changes.get(arm.replace(".", "_"), {}),
            }
            limited = measures.pop("capacity_limited", loss)
            rows += [
                row(arm, s, of_seed(measures["loss"], s), capacity_limited=of_seed(limited, s),
                    **measures)
                for s in SEEDS
            ]  # fmt: skip
    return Results(tuple(rows), "dense")


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"top1_2_0": {"loss": 0.998}}, {0: INCONCLUSIVE}),
        ({"top2_assignment_1_0": {"loss": 0.97}}, {0: NOT_REPRODUCED}),
        # Top-2 by token is compared by its loss within the capacity, at the cost of training.
        ({"top2_token_1_0": {"loss": 1.05}}, {}),
        ({"top2_token_1_25": {"capacity_limited": 0.96}}, {1: NOT_REPRODUCED}),
        ({"top2_token_2_0": {"capacity_limited": 0.96}}, {0: NOT_REPRODUCED, 1: NOT_REPRODUCED}),
        ({"top1_1_25": {"capacity_limited": 0.9}}, {1: NOT_REPRODUCED}),
        # Evaluation with more capacity does not help: no gain after 1.25.
        ({"top1_1_25": {"evaluated_at_1.25": 0.82}}, {2: NOT_REPRODUCED}),
        # A gain of 0.04 after 1.25, and 0.03 after 1.0.
        ({"top1_1_25": {"evaluated_at_1.25": 0.86}}, {3: NOT_REPRODUCED}),
        (
            {"top1_1_0": {"dropped_fraction": 0.06}, "top1_1_25": {"dropped_fraction": 0.051}},
            {4: NOT_REPRODUCED},
        ),
    ],
)
def test_the_criterion_of_capacity_factors(changes, failed):
    study = load_study("capacity_factors")
    findings = judged(study, capacity_results(**changes))
    expected = [failed.get(place, REPRODUCED) for place in range(5)]
    assert [finding.verdict for finding in findings] == expected, findings


@pytest.mark.parametrize("arm", ["dense", "dense_1.25"])
def test_a_dense_model_has_its_loss_within_any_capacity(arm, tmp_path, monkeypatch):
    """Top-2 by token is compared with this loss, which no dense run records."""
    config = load_study("capacity_factors").experiment("smoke", arm, 0)
    monkeypatch.setattr(capacity_factors, "open_run", lambda workdir: (config, None, None))
    (tmp_path / EVALUATION_FILE).write_text('{"dropless": {"bits_per_byte": 1.5}}')
    assert capacity_factors.crossed(tmp_path) == {"capacity_limited": 1.5}


STILL = {"moved": 1e-6, "prefix_rise": -1e-6, "other_rise": 0.0}
LEAKY = {
    "moved": 0.5,
    "prefix_rise": 0.2,
    "other_rise": 0.1,
}  # the noise floor of five dense seeds is 0.0158
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
        # Three known seeds gave at most 0.347: the load-balance loss can lie between that and 0.5.
        (
            {
                "loss_free_1e-3": {"heldout_violation": 0.347},
                "switch_global_0_01": {"heldout_violation": 0.45},
            },
            {2: NOT_REPRODUCED},
        ),
        ({"switch_global_0_01": {"heldout_violation": 0.04}}, {3: NOT_REPRODUCED}),
        ({"loss_free_1e-3": {"loss": 0.95}}, {4: NOT_REPRODUCED}),
        ({"none_noisy": {"loss": 0.87}}, {4: INCONCLUSIVE}),
        ({"loss_free_1e-2": {"max_violation": 0.3}}, {5: NOT_REPRODUCED}),
        ({"switch_global_0_1": {"loss": 0.899}}, {6: INCONCLUSIVE}),
        ({"switch_micro_0_1": {"domain_information": 0.3}}, {6: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_balance(changes, failed):
    findings = judged(load_study("balance"), made_up(BALANCE, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(7)]
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
    "base": {"loss": 0.9},
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
    ],
)
def test_the_criterion_of_router_tournament(changes, failed):
    findings = judged(load_study("router_tournament"), made_up(TOURNAMENT, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(5)]
    assert [finding.verdict for finding in findings] == expected, findings


GRANULARITY = {
    **{f"fine_{g}": {"loss": 0.88 + 0.03 * g**-0.58} for g in (1, 2, 4, 8)},
    "shared_31": {"loss": 0.893, "shared_rise": 0.94, "routed_rise": 0.01},
}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"fine_8": GRANULARITY["fine_2"]}, {0: INCONCLUSIVE}),
        ({"fine_8": {"loss": 0.95}}, {0: NOT_REPRODUCED}),
        ({"shared_31": {"loss": 0.95}}, {1: NOT_REPRODUCED}),
        ({"shared_31": {"shared_rise": 0.92}}, {2: NOT_REPRODUCED}),
        # Without a routed expert the loss falls or stays, so there is no ratio.
        ({"shared_31": {"routed_rise": -0.01}}, {2: NOT_REPRODUCED}),
        ({"shared_31": {"routed_rise": 0.0}}, {2: NOT_REPRODUCED}),
        ({"fine_1": {"loss": 0.5}}, {}),  # one expert per token has another gate
    ],
)
def test_the_criterion_of_granularity(changes, failed):
    findings = judged(load_study("granularity"), made_up(GRANULARITY, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(3)]
    assert [finding.verdict for finding in findings] == expected, findings


TOP_K = {f"top{k}_{count}": {"loss": 0.9} for count in (16, 32) for k in (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, {}),
        ({"top8_16": {"loss": 0.998}}, {0: INCONCLUSIVE}),
        ({"top8_16": {"loss": 1.05}}, {0: NOT_REPRODUCED}),
        ({"top2_32": {"loss": 0.93}}, {1: INCONCLUSIVE}),
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
    "dropped_0.1": 0.9, "capacity_0.9": 0.90, "capacity_2.0": 0.90, "capacity_0.9_no_loss": 0.90,
}  # fmt: skip


def tuned_results(targets, **changes):
    """Five seeds per arm with these held-out losses of the target, also used as training losses."""
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
        ({"capacity_0_9": 0.95}, {1: NOT_REPRODUCED, 2: NOT_REPRODUCED}),
        ({"capacity_0_9_no_loss": 0.85}, {2: NOT_REPRODUCED}),
    ],
)
def test_the_criterion_of_finetuning_regularisation(changes, failed):
    study = load_study("finetuning_regularisation")
    findings = judged(study, tuned_results(REGULARISED, **changes))
    expected = [failed.get(place, REPRODUCED) for place in range(3)]
    assert [finding.verdict for finding in findings] == expected, findings


SQUARED = {"0": 9.0, "1e-4": 6.0, "1e-3": 2.0, "1e-2": 0.5}
Z_LOSS = {
    **{f"z_{w}": {"squared_logsumexp": v, "router_flips": 0.001} for w, v in SQUARED.items()},
    "z_0_fast": {"squared_logsumexp": 30.0},
    "z_1e-3_fast": {"squared_logsumexp": 10.0},
    "selective": {},
}
BITS = {
    "domain_bits": 0.4, "domain_by_ids": 0.25, "token_bits": 0.9, "token_shuffled": 0.2,
    "domain_information": 0.4,
}  # fmt: skip
SPECIALISATION = {
    **dict.fromkeys(("switch_global_0.1", "loss_free_1e-3"), BITS),
    "switch_micro_0.1": BITS | {"domain_information": 0.15},
}
STEADY = {"noise_flips": 0.002, "checkpoint_flips": 0.2}
INSTABILITY = {
    **{f"top{k}": {**STEADY, "noise_flips_set": 0.01 * k} for k in (1, 2, 4)},
    **{f"top{k}_jitter": {"noise_flips_set": 0.009 * k} for k in (1, 2)},
    "top2_temperature_0.5": {"noise_flips_set": 0.01},
    "top2_temperature_2": {"noise_flips_set": 0.03},
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
        ("router_z_loss", Z_LOSS, {"z_0": {"router_flips": 7e-4}}, {3: NOT_REPRODUCED}),
        ("specialisation", SPECIALISATION, {}, {}),
        ("specialisation", SPECIALISATION, {"loss_free_1e-3": {"domain_bits": 0.37}},
         {0: NOT_REPRODUCED}),
        ("specialisation", SPECIALISATION, {"loss_free_1e-3": {"token_bits": 0.59}},
         {1: NOT_REPRODUCED}),
        ("specialisation", SPECIALISATION, {"switch_micro_0_1": {"domain_information": 0.21}},
         {2: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {}, {}),
        ("router_instability", INSTABILITY, {"top4": {"noise_flips": 0.0026}}, {0: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top1": {"checkpoint_flips": 0.0}},
         {1: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top4": {"noise_flips_set": 0.015}},
         {2: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top2_jitter": {"noise_flips_set": 0.021}},
         {3: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top2_temperature_0.5": {"noise_flips_set": 0.04}},
         {4: NOT_REPRODUCED}),
        ("router_instability", INSTABILITY, {"top1_jitter": {"loss": 0.85}}, {5: NOT_REPRODUCED}),
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


def diverged(results, *runs):
    """The same results, with these (arm, seed) runs diverged."""
    gone = {"measures": {}, "diverged_after_step": 30}
    rows = [row | gone if (row["arm"], row["seed"]) in runs else row for row in results.rows]
    return Results(tuple(rows), results.baseline)


def test_a_seed_that_diverged_without_the_z_loss_alone_meets_the_claim():
    """At the higher learning rate. A seed where both arms diverged does not meet the claim."""
    study, results = load_study("router_z_loss"), made_up(Z_LOSS)
    alone = judged(study, diverged(results, ("z_0_fast", 1)))[0]
    assert alone.verdict == REPRODUCED
    assert "(3 where z_0_fast alone diverged: 1): 3, 3, 3; at least 3 in 3 of 3" in alone.because
    both = judged(study, diverged(results, ("z_0_fast", 1), ("z_1e-3_fast", 1)))[0]
    assert both.verdict == NOT_REPRODUCED


def test_leaks_are_inconclusive_without_the_noise():
    """Without dense runs there is no noise to compare with."""
    results = made_up(LEAKS)
    alone = Results(tuple(row for row in results.rows if row["arm"] != "dense"), "dense")
    findings = judged(load_study("future_leaks"), alone)
    assert [finding.verdict for finding in findings[1:]] == [INCONCLUSIVE] * 3
