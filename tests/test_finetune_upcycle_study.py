"""The study of upcycling: what its criteria say of made-up results."""

from experiments.results import LOSS, Results
from experiments.study import load_study
from experiments.upcycling.study import ahead_at_a_quarter, crossing
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED

DENSE = list(range(100, 1700, 100))  # steps at which the dense run is evaluated
ON = list(range(1700, 2500, 100))


def results(scratch, upcycled, seeds=(0, 1, 2)):
    """Losses of both that change by so much a hundred steps from 2.0; one is from step 1,600 on."""
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
    assert ahead_at_a_quarter(found).verdict == REPRODUCED
    late = results(lambda i: 9.0, lambda i: 1.8)
    assert crossing(late)[0] == float("inf")


def test_scratch_that_is_ahead_at_a_quarter_fails_the_claim():
    found = results(lambda i: 1.0, lambda i: 1.8)
    assert ahead_at_a_quarter(found).verdict == NOT_REPRODUCED
    assert ahead_at_a_quarter(Results((), "dense")).verdict == INCONCLUSIVE


def test_arms_have_the_model_that_upcycling_gives():
    """What each is started with is checked when it starts; here that the sizes agree."""
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
