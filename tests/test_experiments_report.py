"""The pages of studies: what they report, always with the same text."""

import json
import os
import re
import statistics

import pytest

from experiments import arm, from_plans, report, top_page
from experiments.results import append_result, check_same_text, read_results
from experiments.study import (
    LOOKS_AHEAD,
    Arm,
    Published,
    Study,
    load_study,
    study_names,
)
from experiments.verdict import Claim, lower
from moe_jax.moe.routing.soft import Soft
from tests.made_up_study import STUDY, line, make_study, plan
from tests.tiny_run import ROOT


def write_results(directory, moe, rule="paired"):
    said = {"rule": rule} if rule else {}
    for name, losses in (("dense", (1.0, 1.1, 1.2, 1.1, 1.1)), ("moe", moe)):
        for seed, loss in enumerate(losses):
            append_result(directory / "results.jsonl", line(name, seed, loss) | said)


@pytest.mark.parametrize(
    ("moe", "verdict"),
    [((0.7, 0.8, 0.93), "reproduced"), ((0.98, 1.11, 1.21), "inconclusive"),
     ((1.4, 1.5, 1.63), "not reproduced")],
)  # fmt: skip
def test_a_report_says_what_its_results_say_and_always_the_same(moe, verdict, tmp_path):
    study = make_study(tolerance=0.1)
    write_results(tmp_path, moe)
    assert report.write_study(study, "small", tmp_path) == verdict
    first = {name: (tmp_path / name).read_bytes() for name in ("README.md", "curves.png")}
    report.write_study(study, "small", tmp_path)
    assert first == {name: (tmp_path / name).read_bytes() for name in first}
    text = first["README.md"].decode()
    assert f"Verdict: **{verdict}**" in text
    # The dense mean covers only the seeds that the experts share, of five dense runs.
    assert "over the seeds that all arms have: 0, 1, 2." in text
    assert "| dense | 5 | 1.1000 +- 0.1000 | 3.0 |" in text.splitlines()
    spread = statistics.stdev(moe)
    row = f"| eight experts | 3 | {statistics.fmean(moe):.4f} +- {spread:.4f} | 2.0 |"
    assert row in text.splitlines()
    differences = [a - b for a, b in zip(moe, (1.0, 1.1, 1.2), strict=True)]
    mean, half = statistics.fmean(differences), 4.302653 * statistics.stdev(differences) / 3**0.5
    start = (
        f"| eight experts | dense | 3 | {mean:+.4f} | {mean - half:+.4f} to {mean + half:+.4f} |"
    )
    assert any(line.startswith(start) for line in text.splitlines())
    assert "| 0123456789ab | 1 x cpu (cpu, x, 1 cores per run) | jax 1, python 3 | 8 |" in text


def test_results_of_before_keep_the_verdict_of_their_rule(tmp_path):
    """0.06 lower in every seed: paired differences show it, though it is under twice the spread."""
    study = make_study(tolerance=0.1)
    write_results(tmp_path, (0.94, 1.04, 1.1402), rule=None)
    assert report.write_study(study, "small", tmp_path) == "reproduced"
    page = (tmp_path / "README.md").read_text()
    assert (
        "Verdict: **reproduced**; under the earlier rule, by which it was run, **inconclusive**"
        in page
    )
    assert "   Under the earlier rule: **inconclusive**: moe less dense: -0.0599" in page
    assert report.OLDER_RULE in page
    (tmp_path / "results.jsonl").unlink()
    write_results(tmp_path, (0.94, 1.04, 1.1402))
    report.write_study(study, "small", tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "Verdict: **reproduced**. Written" in page and "earlier rule" not in page


def test_an_arm_that_looks_ahead_is_marked_wherever_it_is_named(tmp_path):
    looks_ahead = {
        "model.parts.moe.router": Soft(),
        "model.parts.moe.losses.load_balance.weight": 0.0,
        "model.parts.moe.group_size": lambda config: config.data.sequence_length,
        "model.parts.moe.capacity.train_factor": 1.0,
        "model.parts.moe.run_experts": "auto",
    }
    soft = Arm("soft", "Soft MoE", {**looks_ahead, **LOOKS_AHEAD}, budget="soft")
    published = Published("loss", "low", "a paper", lambda results: "soft 1.0, dense 2.0")
    claim = Claim("It is lower.", lower("soft", "dense"))
    study = make_study(arms=(*STUDY.arms, soft), tolerance=0.1, published=(published,),
                       expect=(claim,))  # fmt: skip
    write_results(tmp_path, (0.7, 0.8, 0.93))
    for seed in range(3):
        append_result(tmp_path / "results.jsonl", line("soft", seed, 0.5 + 0.1 * seed, study))
    report.write_study(study, "small", tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    named = [text for text in lines if re.search(r"\bsoft\b|Soft MoE", text)]
    assert len(named) >= 6  # finding, published, cost, way, results, difference
    for text in named:
        for found in re.finditer(r"\bsoft\b|Soft MoE", text):
            rest = text[found.end() :]
            is_budget = rest.startswith(" | ") and text[: found.start()].endswith(" | ")
            assert rest.startswith(" (sees later tokens)") or is_budget, text
    drawn = report.draw(study, report.results_of(study, "small", tmp_path))
    texts = [text.get_text() for text in drawn.axes[1].texts]
    assert "Soft MoE (sees later tokens)" in texts and "dense" in texts


def test_another_outcome_is_in_the_figure_and_the_differences(tmp_path):
    outcome = ("target", "bits per byte of python")
    with pytest.raises(ValueError, match=r"Study.outcome is .*: made_up: .target., measures="):
        make_study(tolerance=0.1, outcome=outcome)
    study = make_study(tolerance=0.1, measures=("target",), outcome=outcome)
    for seed, target in enumerate((0.7, 0.8, 0.9)):
        row = line("dense", seed, 2.0, study)
        row["measures"]["target"] = target
        append_result(tmp_path / "results.jsonl", row)
    (axis,) = report.draw(study, report.results_of(study, "small", tmp_path)).axes
    assert axis.get_xlabel() == "held-out bits per byte of python after the last step"
    assert sorted(axis.lines[0].get_xdata()) == [0.7, 0.8, 0.9]


def test_the_report_of_one_study_touches_its_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "load_study", lambda name: make_study(tolerance=0.1))
    monkeypatch.setattr(Study, "directory", tmp_path / "made_up")
    write_results(tmp_path / "made_up", (0.7, 0.8, 0.93))
    assert report.main(["made_up"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made_up"]


def test_nothing_is_concluded_while_runs_are_missing(tmp_path):
    study = make_study(tolerance=0.1)
    write_results(tmp_path, (0.7, 0.8))
    assert report.write_study(study, "small", tmp_path) == "inconclusive"
    write_results(tmp_path, (0.7, 0.8, 0.9))
    assert report.write_study(study, "small", tmp_path) == "reproduced"
    more = make_study(tolerance=0.1, arms=(*study.arms, Arm("moe_2", "", {})))
    said = report.judge_study(more, "small", report.results_of(more, "small", tmp_path))
    assert said.verdict == "inconclusive"
    assert "(runs are missing: 3)" in said.findings[0].because


def test_a_claim_whose_arms_have_no_runs_is_not_run(tmp_path):
    """Its page and the top page mark it so, while the study is inconclusive."""
    claims = (
        Claim("The first is lower.", lower("moe", "dense"), "One is more."),
        Claim("The second is lower.", lower("moe_2", "dense"), "Two are more."),
    )
    arms = (*STUDY.arms, Arm("moe_2", "another", {}))
    study = make_study(tolerance=0.1, arms=arms, expect=claims)
    write_results(tmp_path, (0.7, 0.8, 0.9))
    said = report.judge_study(study, "small", report.results_of(study, "small", tmp_path))
    assert [finding.verdict for finding in said.findings] == ["inconclusive", "not run"]
    assert said.verdict == "inconclusive"
    page = report.top_page([study], {"made_up": {"small": said}})
    assert "| One is more. | [inconclusive](made_up/README.md) (small) |" in page
    assert "| Two are more. | not run |" in page
    assert "| Is it lower? | [inconclusive](made_up/README.md) (small) |" in page


@pytest.mark.parametrize("name", study_names())
def test_claims_are_open_without_any_runs(name):
    study = load_study(name)
    none = report.results_of(study, "smoke")
    assert {claim.judge(none).verdict for claim in study.expect} == {"inconclusive"}


def test_a_run_that_diverged_is_a_result(tmp_path, monkeypatch):
    """Training diverges after step 2: one line, a verdict, and no second run."""
    study = make_study(tolerance=0.1)

    def train(config, workdir):
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        record = {name: None for name in ("commit", "platform", "device_kind", "num_devices")}
        record |= {"dirty": False, "versions": {}, "python": "3"}
        (workdir / "run.json").write_text(json.dumps(record))
        raise FloatingPointError("train/loss is nan at step 3")

    monkeypatch.setattr(arm, "train", train)
    for seed in (0, 1, 2):
        arm.run_arm(
            study, "small", "moe", seed, workdir=tmp_path / str(seed),
            results=tmp_path / "results.jsonl", corpus="",
        )  # fmt: skip
    lines = read_results(tmp_path / "results.jsonl")
    assert [(row["measures"], row["diverged_after_step"]) for row in lines] == [({}, 2)] * 3
    assert plan(tmp_path) == [f"dense_seed{seed}" for seed in range(3)]
    for row in lines:
        row["data"] |= {"corpus_sha256": "c" * 64, "tokenizer_sha256": "t" * 64}
        row["versions"], row["commits"] = {}, []
    (tmp_path / "results.jsonl").unlink()
    for row in lines:
        append_result(tmp_path / "results.jsonl", row)
    write_results(tmp_path, ())
    # All three seeds of one arm diverged and none of the other: p = 2 / 8, by signs.
    assert report.write_study(study, "small", tmp_path) == "inconclusive"
    page = (tmp_path / "README.md").read_text()
    assert "| eight experts | 3, 3 diverged |" in page and "moe less dense: +inf" in page
    assert "p = 0.25, by signs: a run diverged" in page
    by_signs = "0.25, by signs: a run diverged"
    assert f"| dense | 3 | +inf | unknown | unknown | {by_signs} | unknown |" in page


def test_runs_of_different_texts_are_not_compared(tmp_path):
    write_results(tmp_path, (0.7, 0.8))
    row = line("moe", 2, 0.9)
    append_result(
        tmp_path / "results.jsonl", row | {"data": row["data"] | {"corpus_sha256": "d" * 64}}
    )
    with pytest.raises(ValueError, match=r"same corpus and tokenizer: .*cccc, tttt.*dddd, tttt"):
        report.results_of(STUDY, "small", tmp_path)
    with pytest.raises(ValueError, match=r"same corpus and tokenizer: .*cccc, tttt"):
        check_same_text([line("moe", 2, 0.9)], STUDY.experiment("small", "moe", 0).data)


def test_every_size_has_a_page_of_its_own(tmp_path):
    """Results at base do not weaken what small has shown."""
    folder = tmp_path / "made_up"
    folder.mkdir()
    study = make_study(tolerance=0.1, file=str(folder / "study.py"))
    write_results(folder, (0.7, 0.8, 0.9))
    assert report.sizes_of(study) == ["small"]
    for seed in range(5):
        row = line("dense", seed, 1.0) | {"size": "base"}
        append_result(
            # Earlier results, which record no rule.
            folder / "results.jsonl",
            row | {"config": study.settings("base", "dense", seed)},
        )
    assert report.sizes_of(study) == ["small", "base"]
    assert [report.write_study(study, size) for size in ("small", "base")] == [
        "reproduced", "inconclusive",
    ]  # fmt: skip
    found = report.judged_sizes(study)
    assert {size: said.verdict for size, said in found.items()} == {
        "small": "reproduced", "base": "inconclusive",
    }  # fmt: skip
    assert {"README.md", "base.md", "curves.png", "curves_base.png"} <= set(os.listdir(folder))
    page = report.top_page([study], {"made_up": found})
    cell = (
        "[reproduced](made_up/README.md) (small), "
        "[inconclusive](made_up/base.md) (base; inconclusive under the earlier rule)"
    )
    assert f"| Is it lower? | {cell} |" in page


def test_a_study_without_results_says_so(tmp_path):
    assert report.write_study(make_study(tolerance=0.1), "small", tmp_path) == "not run"
    text = (tmp_path / "README.md").read_text()
    assert "Verdict: **not run**" in text and "It has not been run." in text
    assert not (tmp_path / "curves.png").exists()


def test_a_report_of_no_directory_is_refused(tmp_path, capsys):
    assert report.main(["balance", f"--out={tmp_path / 'none'}"]) == 1
    assert "Pass the --out that it was given" in capsys.readouterr().err


def test_pages_in_the_repository_are_those_of_their_results(tmp_path):
    said = {}
    for name in study_names():
        study = load_study(name)
        results = report.results_of(study, "small")
        page = (study.directory / "README.md").read_text(encoding="utf-8")
        assert page == report.study_page(study, "small", results), f"report {name} again"
        said[name] = report.judged_sizes(study)
    studies = [load_study(name) for name in study_names()]
    page = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert page == report.top_page(studies, said)


def test_lines_from_plans_are_what_arithmetic_gives():
    plans = from_plans.read_plans()
    assert plans["memory"][-1] == from_plans.memory_of("olmoe")
    said = from_plans.memory_text(plans)
    assert "mixtral 46.7 B parameters for 12.9 B of a token" in said  # as published
    one = {"config": "a", "pod": "b", "mesh": {"expert": 8}}
    plans = {"exchange": [one | {"compute_seconds": 2.0, "exchange_seconds": 0.5}]}
    assert from_plans.exchange_text(plans).endswith(
        "Exchange over computing: 0.25 (a, b, experts over 8)"
    )


@pytest.mark.slow
def test_the_exchange_of_a_pod_is_as_it_was_written():
    plans = from_plans.read_plans()
    assert len(plans["exchange"]) == len(from_plans.PODS)
    assert plans["exchange"][3] == from_plans.exchange_of(*from_plans.PODS[3])


def test_the_top_page_has_every_claim_and_study():
    studies = [make_study(expect=(Claim("It is lower.", lower("moe", "dense"), "Less is more."),))]
    page = report.top_page(studies, {"made_up": {}})
    for text in (*top_page.CLAIMS, top_page.MEMORY, top_page.EXCHANGE):
        assert f"| {text} | " in page
    assert "| Less is more. | not run | [made_up](made_up/README.md) |" in page
    assert "| [made_up](made_up/README.md) | Is it lower? | not run |" in page
    assert page.index("## Claims") < page.index("## Studies") < page.index("## Log")


def test_the_figure_of_the_top_page_marks_what_saw_later_tokens():
    """For every study with results: a point per arm, hollow if it saw later tokens."""
    studies = [load_study("future_leaks")]
    results = {"future_leaks": {"small": report.results_of(studies[0], "small")}}
    (axis,) = report.draw_all(studies, results).axes
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "none"]
    assert len(axis.lines) == len(studies[0].arms) and len(hollow) == 7
    circles = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(circles) == 1 and circles[0] not in hollow  # the dense model
