"""Made-up data: a small study of two arms, lines of its results, and results of any study."""

from experiments.results import LOSS, Results
from experiments.run import jobs_of
from experiments.study import (
    EMBEDDED_CORPUS,
    HERE,
    MOE_LAYER,
    NO_EXPERTS,
    Arm,
    Published,
    Study,
)
from experiments.verdict import Claim, lower
from moe_jax.layers.feed_forward import Mlp

TINY = {
    **EMBEDDED_CORPUS,
    "model.stack.unit": (MOE_LAYER,),
    "model.stack.repeats": 2,
    "model.model_dim": 16,
    "model.parts.mlp": Mlp(dim=32),
    "model.parts.moe.expert_dim": lambda config: config.model.parts.mlp.dim,
    "model.parts.moe.run_experts": "ragged",
}


def make_study(**changes):
    settings = {
        "file": str(HERE / "made_up" / "study.py"),
        "question": "Is it lower?",
        "published": (Published("loss", "low", "a paper, table 1", lambda results: "as here"),),
        "base": TINY,
        "sizes": {"smoke": {}, "small": {}, "gpu": {}, "base": {"model.parts.mlp.dim": 64}},
        "arms": (
            Arm("dense", "dense", NO_EXPERTS),
            Arm("moe", "eight experts", {"model.parts.moe.num_experts": 8}),
        ),
        "baseline": "dense",
        "expect": (Claim("It is lower.", lower("moe", "dense")),),
        **changes,
    }
    return Study(**settings)


STUDY = make_study()


def line(arm, seed, loss, study=STUDY):
    return {
        "study": study.name,
        "size": "small",
        "arm": arm,
        "seed": seed,
        "config": study.settings("small", arm, seed),
        "measures": {LOSS: loss},
        "curve": {"step": [1, 2], LOSS: [loss + 1, loss]},
        "minutes": 1.0 + seed,
        "data": {"corpus_sha256": "c" * 64, "tokenizer_sha256": "t" * 64},
        "commit": "0123456789abcdef",
        "commits": ["0123456789abcdef"],
        "dirty": False,
        "versions": {"jax": "1", "python": "3"},
        "hardware": {
            "platform": "cpu", "device_kind": "cpu", "num_devices": 1, "machine": "x", "cores": 1,
        },
    }  # fmt: skip


def plan(tmp_path, **arguments):
    results = tmp_path / "results.jsonl"
    jobs = jobs_of(STUDY, "small", runs=tmp_path, results=results, **arguments)
    return [path.name for job in jobs for path in job.workdirs.values()]


SEEDS = (0, 1, 2)
STEPS = [100, 200, 300, 400, 500, 600]


def row(arm, seed, final, curve=(), **measures):
    return {
        "arm": arm,
        "seed": seed,
        "measures": {LOSS: final, **measures},
        "curve": {"step": STEPS, LOSS: list(curve)},
    }


def judged(study, results):
    """The finding of each claim of a study, on made-up results of some arms."""
    return [claim.judge(results) for claim in study.expect]


def of_seed(loss, seed, place=0):
    """A loss whose difference to dense has a spread of 0.001; every second arm has the other sign.

    For three pairs with dense, 0.0025 shows a direction: t = sqrt(3) 0.0025 / 0.001 = 4.33.
    """
    return loss + 0.01 * seed + (0.001 if place % 2 else -0.001) * (seed - 1)


def made_up(arms, seeds=SEEDS, **changes):
    """Five dense runs, and arms with equal measures in every seed except for these changes."""
    rows = [row("dense", seed, 1.0 + 0.01 * seed, **arms.get("dense", {})) for seed in range(5)]
    for place, (arm, measures) in enumerate(arms.items()):
        if arm != "dense":
            said = {"loss": 0.9, **measures, **changes.get(arm.replace(".", "_"), {})}
            rows += [row(arm, seed, of_seed(said["loss"], seed, place), **said) for seed in seeds]
    return Results(tuple(rows), "dense")
