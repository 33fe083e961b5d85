"""Verdicts of the studies on made-up results."""

import json

import pytest

from experiments.moe_against_dense import run
from tests.tiny_run import ROOT


def results(moe, dense):
    return {
        arm: {
            str(seed): {
                "bits_per_byte": value,
                "nats_per_token": value * 0.7,
                "training_minutes": 5.0 + seed,
                "commit": "0123456789abcdef",
            }
            for seed, value in enumerate(values)
        }
        for arm, values in {"moe": moe, "dense": dense}.items()
    }


def test_a_gap_larger_than_both_spreads_passes():
    verdict = run.judge(results(moe=(2.0, 2.1, 2.05), dense=(2.3, 2.35, 2.4)))
    assert verdict["passed"] is True
    assert verdict["mean_moe"] == pytest.approx(2.05)
    assert verdict["mean_dense"] == pytest.approx(2.35)
    assert verdict["gap"] == pytest.approx(0.3)
    # Gaps of 0.3, 0.25 and 0.35: half width 4.303 * 0.05 / sqrt(3).
    assert (verdict["gap_low"], verdict["gap_high"]) == pytest.approx((0.1758, 0.4242), abs=1e-4)
    assert verdict["spread_moe"] == pytest.approx(0.1)
    assert verdict["spread_dense"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("moe", "dense"),
    [
        ((2.0, 2.2, 2.1), (2.2, 2.2, 2.2)),  # gap 0.1, spread of moe 0.2
        ((2.0, 2.0, 2.0), (2.0, 2.2, 2.1)),  # gap 0.1, spread of dense 0.2
        ((2.4, 2.4, 2.4), (2.1, 2.1, 2.1)),  # wrong direction
        ((2.0, 2.5, 2.0), (2.0, 2.5, 3.0)),  # gap 1/3, spreads 0.5 and 1
        ((2.0, 2.0, 2.0), (2.0, 2.0, 2.0)),  # no gap and no spread: not larger
    ],
)
def test_anything_else_fails(moe, dense):
    verdict = run.judge(results(moe, dense))
    assert verdict["passed"] is False
    assert "**failed**" in run.report(results(moe, dense))


def test_the_report_has_every_run_and_the_verdict():
    text = run.report(results(moe=(2.0, 2.1, 2.05), dense=(2.3, 2.35, 2.4)))
    for line in (
        "| 0 | 2.0000 | 2.3000 | 0.3000 |",
        "| 2 | 2.0500 | 2.4000 | 0.3500 |",
        "| mean | 2.0500 | 2.3500 | 0.3000 |",
        "| spread | 0.1000 | 0.1000 | |",
        "Criterion (gap larger than either spread): **passed**. It is the rule of the time when "
        "this was run.",
        "| dense | 1 | 0123456789ab | 6.0 |",
    ):
        assert line in text.splitlines(), line


def test_a_report_in_the_repository_is_that_of_its_results():
    path = ROOT / "experiments" / "moe_against_dense" / "results.json"
    recorded = json.loads(path.read_text())
    assert path.with_name("report.md").read_text() == run.report(recorded)
    assert {arm: set(runs) for arm, runs in recorded.items()} == {
        arm: {str(seed) for seed in run.SEEDS} for arm in run.ARMS
    }


def test_the_arms_differ_in_their_ffns_alone():
    moe, dense = (run.quickstart.get_config(run.ARMS[arm]).to_dict() for arm in ("moe", "dense"))
    assert moe.pop("name") != dense.pop("name")
    experts, mlp = moe["model"]["parts"].pop("moe"), dense["model"]["parts"].pop("mlp")
    assert moe["model"]["stack"].pop("unit") == (("attention", "moe"),)
    assert dense["model"]["stack"].pop("unit") == (("attention", "mlp"),)
    assert moe == dense
    # Equal FLOPs per token except the router: selected experts are as wide as the dense FFN.
    assert experts["num_selected_experts"] * experts["expert_dim"] == mlp["dim"]
    for name in ("activation", "use_bias", "init_scale"):
        assert experts[name] == mlp[name]
