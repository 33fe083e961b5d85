"""The studies: the cost and settings of their arms, and that they run."""

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
from experiments.results import LOSS, RESULTS_FILE, read_results
from experiments.study import SIZES, load_study, study_names
from moe_jax.data.documents import TRAIN
from moe_jax.data.embedded import EmbeddedCorpus
from moe_jax.planning.arithmetic import count_flops, count_parameters
from moe_jax.training import loop
from moe_jax.training.signals import Interrupted
from tests.tiny_run import CACHE, ROOT

# Studies older than parts. `arms.jsonl` records what their arms were.
BEFORE_PARTS = {line["study"] for line in read_results(ROOT / "tests/golden/arms.jsonl")}


@pytest.mark.parametrize("name", study_names())
def test_a_study_of_the_repository_runs_on_cpus_on_one_card_and_on_many(name):
    assert set(load_study(name).sizes) >= {"smoke", "small", "gpu", "base"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", study_names())
def test_arms_cost_the_same(name, size):
    check_budget(load_study(name), size)


@pytest.mark.parametrize("name", sorted(set(study_names()) & BEFORE_PARTS))
def test_arms_are_the_models_that_they_were(name):
    """Every arm at every size has the counts per component of commit f891836.

    `arms.jsonl` was written by that code, before models had parts; it omits zeros and all arms,
    sizes and studies added since.
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
        study.check_row(line)  # checks its settings
        cost = cost_of(study, line["size"], line["arm"])
        parameters, flops = line["parameters"], line["forward_flops_per_token"]
        assert parameters == {"total": cost.total_parameters, "active": cost.active_parameters}
        assert flops == {"active": cost.active, "computed": cost.computed}


def test_a_line_of_results_from_before_models_had_parts_is_compared_as_well():
    study = load_study("switch_against_dense")
    line = read_results(study.directory / RESULTS_FILE)[-1]
    assert "format" not in line["config"]
    line["config"]["model"]["moe"]["capacity"]["train_factor"] = 1.5
    changed = r"config.model.parts.moe.capacity.train_factor: 1.5 -> 1.25\. Restore the settings"
    with pytest.raises(ValueError, match=changed):
        study.check_row(line)


def test_fine_tuned_arms_start_from_the_pretrained_one_of_their_seed():
    study = load_study("finetuning_subsets")
    config = study.experiment("smoke", "moe", 2, runs="some/runs")
    assert config.init_from.path == "some/runs/pretrained_seed2"
    assert config.data.domain_weights == (("python", 1.0),)
    pretrained = study.experiment("smoke", "pretrained", 2)
    assert pretrained.init_from.path == "" and "python" not in dict(pretrained.data.domain_weights)
    assert pretrained.training.num_steps > config.training.num_steps


@pytest.mark.parametrize("name", ["finetuning_subsets", "finetuning_regularisation"])
@pytest.mark.parametrize("size", ["small", "gpu", "base"])
def test_fine_tuning_reads_its_domain_twice_at_most(name, size):
    study = load_study(name)
    config = study.experiment(size, "all", 0)
    ((domain, _),) = config.data.domain_weights
    documents = EmbeddedCorpus().documents(domain, config.data.heldout_fraction)
    there = sum(len(text.text.encode()) for split, text in documents if split == TRAIN)
    assert 1.5 * there < bytes_read(config) < 2.01 * there


def test_upcycling_at_one_card_reads_no_packed_token_twice():
    """40 M tokens are packed. `scratch` trains all steps, as do runs that continue from `dense`."""
    study = load_study("upcycling")
    read = {arm.name: bytes_read(study.experiment("gpu", arm.name, 0)) for arm in study.arms}
    assert read["scratch"] == read["upcycled"] == read["dense"] * 3 // 2
    assert 38e6 < read["scratch"] < 40e6


def bytes_read(config):
    """Tokens read by a whole run; these are bytes for a byte tokenizer."""
    return config.training.num_steps * config.training.batch_size * config.data.sequence_length


def test_the_cost_that_upcycling_says_is_the_cost_of_its_arms():
    study = load_study("upcycling")
    for size, said in (("small", 1.35), ("gpu", 1.37), ("base", 1.49)):
        upcycled, dense = (cost_of(study, size, arm).active for arm in ("upcycled", "dense_on"))
        assert upcycled / dense == pytest.approx(said, abs=0.005)
        assert str(said) in study.expect[0].statement


@pytest.mark.parametrize("size", ["small", "gpu", "base"])
def test_the_tight_capacity_of_fine_tuning_leaves_a_tenth_of_the_tokens_without_a_slot(size):
    study = load_study("finetuning_regularisation")
    assert cost_of(study, size, "capacity_0.9").slots == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("size", ["small", "gpu", "base"])
def test_the_cost_of_predicting_two_tokens_is_counted(size):
    """The arm without the module takes more steps, for as many training FLOPs."""
    study = load_study("multi_token")
    module, longer = (
        cost_of(study, size, arm).active * study.experiment(size, arm, 0).training.num_steps
        for arm in ("module", "longer")
    )
    assert module / longer == pytest.approx(1, abs=0.05)


def test_finer_experts_have_the_parameters_and_the_cost_of_coarser_ones():
    """Only the router grows: each extra output has 64 inputs, in two layers."""
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
    """A removed routed or shared expert has zero output weights, by their sums."""
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


@pytest.mark.slow
def test_an_arm_that_is_stopped_goes_on_and_says_the_same(tmp_path, monkeypatch):
    """An arm stopped inside training records no line. Run again, it resumes and records one."""
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
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
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
    assert "**inconclusive**" in page  # one seed
    assert (tmp_path / "out" / "curves_smoke.png").stat().st_size > 0


OWN_STUDY = """
from router_turns.routers import Turns
from tests.made_up_study import TINY
from experiments.study import NO_EXPERTS, Arm, Study
from experiments.verdict import Claim, lower

STUDY = Study(
    file=__file__, question="Are turns as good?", published=(), base=TINY,
    sizes={"smoke": {"training.num_steps": 2, "optimizer.warmup_steps": 1}, "medium": {}},
    arms=(Arm("dense", "dense", NO_EXPERTS), Arm("turns", "", {"model.parts.moe.router": Turns()})),
    baseline="dense", expect=(Claim("Turns end below.", lower("turns", "dense")),),
)
"""


def own_study(folder):
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(OWN_STUDY)
    source = (ROOT / "tests" / "foreign.py").read_text().replace("RoundRobin", "Turns")
    (folder / "routers.py").write_text(source)
    return folder


def test_a_study_of_ones_own_lies_anywhere(tmp_path, capsys):
    study = load_study(str(own_study(tmp_path / "mine" / "router_turns")))
    assert study.name == "router_turns" and study.directory == tmp_path / "mine" / "router_turns"
    router = study.experiment("medium", "turns", 0).model.part["moe"].router
    assert type(router).__module__ == "router_turns.routers"
    assert load_study(study.place) is study
    assert run.main([study.place, "--arms=turns"]) == 1
    assert "router_turns has the sizes ['smoke', 'medium']: 'small'" in capsys.readouterr().err
    for name in ("numpy", "router.turns"):
        with pytest.raises(ValueError, match=rf"a Python name .*: '{name}'\. Rename the folder"):
            load_study(str(own_study(tmp_path / name)))
    with pytest.raises(ValueError, match=r"folders of your own with a study\.py: 'nowhere'"):
        load_study("nowhere")


@pytest.mark.slow
def test_a_study_of_ones_own_runs_in_workers_and_leaves_the_repository_alone(tmp_path):
    folder = own_study(tmp_path / "mine" / "router_turns")

    def command(name, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", name, str(folder), *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    command("experiments.run", "--smoke", f"--runs={tmp_path}", f"--out={folder}")
    command("experiments.report", f"--out={folder}")
    rows = read_results(folder / "results.jsonl", "smoke")
    assert sorted(row["arm"] for row in rows) == ["dense", "turns"]
    assert "experiments.run" in (folder / "smoke.md").read_text()
