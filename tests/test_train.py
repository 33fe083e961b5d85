"""`python -m moe_jax.train` in this process: what it writes in addition to training."""

import json
import re
import shutil

import jax
import pytest

from moe_jax import train
from moe_jax.analysis import report
from moe_jax.training.files import METRICS_FILE, RUN_FILE
from moe_jax.training.metrics import read_metrics
from moe_jax.training.saved import load_run
from tests.tiny_run import files, tiny_moe, tiny_training

CONFIG = tiny_training({"training": {"num_steps": 3, "evaluate_every": 3}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.run(CONFIG, workdir)
    return workdir


def test_a_sample_and_a_report(finished):
    said = json.loads((finished / "evaluation.json").read_text())
    assert said["step"] == 3
    assert (finished / "sample.txt").read_text().startswith("The ")
    report = (finished / "report" / "report.md").read_text()
    figures = re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)", report)
    assert figures and all((finished / "report" / name).stat().st_size > 0 for name in figures)
    assert f"{said['dropless']['bits_per_byte']:.4f}" in report


def test_what_is_known_of_the_model_is_recorded(finished):
    record = json.loads((finished / RUN_FILE).read_text())
    state = load_run(finished)[1]
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert record["parameters"]["total"] == total > record["parameters"]["active"]
    flops = record["forward_flops_per_token"]
    assert 0 < flops["model"] <= flops["computed"]
    rows = read_metrics(finished / METRICS_FILE)
    assert any("perf/mfu" in row for row in rows) == bool(record["peak_flops"])


def test_a_sample_or_a_report_that_fails_does_not_fail_the_run(
    finished, tmp_path, monkeypatch, capsys
):
    def fail(*args, **kwargs):
        raise RuntimeError("no\nfont")

    workdir = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(train, "sample", fail)
    monkeypatch.setattr(report, "write_report", fail)
    assert train.run(CONFIG, workdir)["step"] == 3
    warnings = capsys.readouterr().err.splitlines()
    assert [line for line in warnings if "the run is saved" in line] == [
        f"warning: the run is saved, but there is no {what}: RuntimeError: no font"
        for what in ("sample", "report")
    ]


def test_of_several_processes_no_other_waits_for_one_that_failed(monkeypatch, capsys):
    """All processes compute the sample together; only process 0 writes the report."""

    def fail(together):
        with train.failure_is_a_warning("sample", together=together):
            raise RuntimeError("no room")

    fail(together=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    fail(together=False)
    with pytest.raises(RuntimeError, match="no room"):
        fail(together=True)
    with train.failure_is_a_warning("sample", together=True):
        raise ValueError("a refusal, which all of them get")
    assert capsys.readouterr().err.count("the run is saved, but there is no sample") == 4


def test_a_finished_run_writes_the_same_sample_again(finished):
    before = files(finished)
    assert train.run(CONFIG, finished)["step"] == 3
    after = files(finished)
    for name in ("sample.txt", "evaluation.json", METRICS_FILE):
        assert after[name] == before[name], name


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [8, 32])
def test_a_run_in_groups_that_are_no_sequence(tmp_path, group_size):
    """Half a sequence, and two sequences: the sample and the counts have no such groups."""
    config = tiny_training(
        {
            **tiny_moe(group_size=group_size),
            "training": {"num_steps": 2, "num_microbatches": 2},
        }
    )
    assert train.run(config, tmp_path)["step"] == 2
