"""The criteria of the upcycling study on made-up results."""

from experiments.results import LOSS, Results
from experiments.study import load_study
from experiments.upcycling.study import ahead_at_half, crossing
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED

DENSE = list(range(100, 1700, 100))  # steps of the dense run's evaluations
ON = list(range(1700, 2500, 100))


def results(scratch, upcycled, seeds=(0, 1, 2)):
    """Losses as functions of hundreds of steps; those of `upcycled` count from step 1,600."""
    rows = []
    curves = {
        "dense": (DENSE, [2.0] * len(DENSE)),
        "scratch": (DENSE + ON, [scratch(i) for i in range(1, 25)]),
        "upcycled": (ON, [upcycled(i) for i in range(1, 9)]),
    }
    for seed in seeds:
        for arm, (steps, losses) in curves.items():
            curve = {"step": steps, LOSS: losses}
            rows.append({"arm": arm, "seed": seed, "measures": {LOSS: losses[-1]}, "curve": curve})
    return Results(tuple(rows), "dense")


def test_the_crossing_is_where_scratch_has_caught_up_after_as_many_steps():
    found = results(lambda i: 3.0 - 0.3 * i, lambda i: 1.8 - 0.05 * i)
    # Means of three: 3.3 - 0.3 i meets 1.85 - 0.05 i before i = 6.
    assert crossing(found) == {seed: 600 / 1600 for seed in (0, 1, 2)}
    late = results(lambda i: 9.0, lambda i: 1.8)
    assert crossing(late)[0] == float("inf")


def test_the_claim_is_decided_after_half_of_the_dense_runs_steps():
    """After 800 steps each, with means of three: 1.45 for the upcycled model."""
    ahead = results(lambda i: 3.0 - 0.15 * i, lambda i: 1.8 - 0.05 * i)  # scratch is at 1.95
    assert ahead_at_half(ahead).verdict == REPRODUCED
    behind = results(lambda i: 3.0 - 0.22 * i, lambda i: 1.8 - 0.05 * i)  # at 1.46
    assert ahead_at_half(behind).verdict == REPRODUCED
    overtaken = results(lambda i: 3.0 - 0.24 * i, lambda i: 1.8 - 0.05 * i)  # at 1.32
    assert ahead_at_half(overtaken).verdict == NOT_REPRODUCED
    assert ahead_at_half(Results((), "dense")).verdict == INCONCLUSIVE


def test_arms_have_the_model_that_upcycling_gives():
    """Each start checks its own source; this test checks that the sizes agree."""
    study = load_study("upcycling")
    for size in ("smoke", "small", "gpu", "base"):
        dense = study.experiment(size, "dense", 0)
        for arm, width in (("upcycled", 1), ("granular", 2)):
            config = study.experiment(size, arm, 0)
            moe = config.model.part["moe"]
            assert moe.expert_dim * width == dense.model.part["mlp"].dim
            assert dense.training.num_steps * 3 == config.training.num_steps * 2


def test_arms_that_go_on_come_after_the_dense_run():
    study = load_study("upcycling")
    stages = {arm.name: study.stage("small", arm.name) for arm in study.arms}
    assert {name for name, stage in stages.items() if stage == 0} == {"dense", "scratch"}
