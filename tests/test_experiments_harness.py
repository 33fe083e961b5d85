"""Running studies, without training: arms, planned runs, and repeats."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import job as job_module
from experiments import report, run
from experiments.budget import check_budget, cost_of
from experiments.job import Job
from experiments.results import LOSS, append_result, read_results
from experiments.run import Board, jobs_of, run_in_turn, run_side_by_side
from experiments.study import (
    NO_EXPERTS,
    RUN_OF,
    Arm,
    load_study,
)
from experiments.tables import budget_table
from moe_jax.jobs.places import this_machine
from moe_jax.layers.feed_forward import Mlp
from moe_jax.moe.routing.fixed import Hash
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.placement import compile_train_step
from tests.foreign import RoundRobin
from tests.made_up_study import STUDY, TINY, line, make_study, plan
from tests.tiny_run import ROOT


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"baseline": "moe_8"},
            r"Study.baseline and Arm.against must name arms: made_up: \['moe_8'\], arms",
        ),
        ({"arms": STUDY.arms * 2}, "arms have different names"),
        ({"arms": (Arm("a/b", "", {}),)}, "arms have different names of letters"),
        ({"seeds": (0, 1)}, r"3 at the least.*seeds=\(0, 1\)"),
        ({"least_seeds": 2}, r"3 at the least.*least_seeds=2"),
        ({"least_seeds": 4}, r"least_seeds seeds or more.*seeds=\(0, 1, 2\), least_seeds=4"),
        ({"baseline_seeds": (0, 1, 3)}, "which are among those of the baseline"),
        ({"sizes": {"small": {}}}, r"the size 'smoke' and one or more of .*: made_up: \['small'\]"),
        ({"sizes": {"smoke": {}}}, r"the size 'smoke' and one or more of .*: made_up: \['smoke'\]"),
        ({"expect": ()}, "a study has a criterion: made_up. Write Study.expect"),
        (
            {"base": {**TINY, "model.parts.moe.num_expertz": 1}},
            "names a setting: model.parts.moe.num_expertz",
        ),
        ({"base": {**TINY, "model.moee.x": 1}}, "names a setting: model.moee.x"),
        ({"base": {**TINY, "model.moee.x": Mlp()}}, "names a setting: model.moee.x"),
        ({"base": {**TINY, "model.mlp": Mlp()}}, r"config.model has the fields .*config.model.mlp"),
        ({"base": {**TINY, "model.model_dim": 0}}, r"config.model: model_dim lies in \[1, inf\)"),
        ({"base": {**TINY, "data.corpus": "jsonl:CORPUS"}}, "smoke uses the embedded corpus"),
    ],
)
def test_a_study_that_breaks_a_rule_is_refused_when_it_is_read(changes, error):
    with pytest.raises(ValueError, match=error):
        make_study(**changes)


def test_settings_of_an_arm():
    config = STUDY.experiment("base", "moe", 3)
    moe = config.model.part["moe"]
    assert moe.expert_dim == 64  # that of the MLP at this size: functions are called last
    assert moe.num_experts == 8
    assert set(config.model.part) == {"attention", "moe"}  # no layer has the MLP
    assert config.seed == config.data.seed == 3
    assert STUDY.overrides("base", "moe") == {"model.parts.moe.num_experts": 8}
    large = load_study("switch_against_dense").experiment("base", "dense", 0, "/some/where").data
    assert large.corpus == "jsonl:/some/where"
    assert large.tokenizer == "sentencepiece:/some/where/bpe8192.model"


def test_a_function_of_an_arm_sees_the_value_of_the_size():
    twice = Arm("twice", "", {"model.parts.mlp.dim": lambda c: 2 * c.model.parts.mlp.dim})
    whole = Arm("whole", "", {"model.parts.mlp.dim": 48})
    study = make_study(arms=(*STUDY.arms, twice, whole), tolerance=9.0)
    dims = [study.experiment(size, "twice", 0).model.part["moe"].expert_dim
            for size in ("small", "base")]  # fmt: skip
    # The width of an expert follows the MLP, though it was set earlier.
    assert dims == [32, 64]
    assert study.overrides("base", "twice") == {"model.parts.mlp.dim": 128}
    assert study.overrides("base", "whole") == {"model.parts.mlp.dim": 48}


def test_an_arm_without_experts_has_an_mlp_in_every_layer():
    model = STUDY.experiment("base", "dense", 0).model
    assert model.stack.layers == (("attention", "mlp"),) * 2
    assert model.part["mlp"].dim == 64 and "moe" not in model.part


def test_an_arm_may_bring_a_part():
    """A whole part replaces another, and later overrides can set its fields."""
    path = "model.parts.moe.router"
    hashed = Arm("hash", "hash", {path: Hash(by="position"), f"{path}.scaling_factor": 2.0})
    study = make_study(arms=(*STUDY.arms, hashed))
    router = study.experiment("small", "hash", 0).model.part["moe"].router
    assert router == Hash(by="position", scaling_factor=2.0)
    said = json.loads(json.dumps(study.overrides("small", "hash")))
    assert said[path]["kind"] == "hash" and said[path]["by"] == "position"
    assert study.settings("small", "hash", 0)["model"]["parts"]["moe"]["router"] == said[path]


def test_an_arm_may_bring_a_part_of_its_own(tmp_path):
    path = "model.parts.moe.router"
    study = make_study(arms=(*STUDY.arms, Arm("turns", "in turn", {path: RoundRobin()})))
    assert isinstance(study.experiment("small", "turns", 0).model.part["moe"].router, RoundRobin)
    assert "tests.foreign:RoundRobin" in json.dumps(study.overrides("small", "turns"))
    append_result(tmp_path / "results.jsonl", line("turns", 0, 1.0, study))
    assert len(report.results_of(study, "small", tmp_path).rows) == 1
    assert "| turns | equal | " in budget_table(study, "small")


def test_arms_share_the_order_of_the_data_by_seed():
    for seed in STUDY.seeds:
        dense, moe = (STUDY.experiment("small", arm, seed).data for arm in ("dense", "moe"))
        assert dense == moe


def test_arms_of_one_budget_must_match():
    check_budget(make_study(tolerance=0.1), "small")
    wide = Arm("wide", "wide", {**NO_EXPERTS, "model.parts.mlp.dim": 512})
    with pytest.raises(ValueError, match=r"budget 'equal': wide .* dense .* more\. Change the"):
        check_budget(make_study(arms=(*STUDY.arms, wide), tolerance=0.1), "small")
    other = dataclasses.replace(wide, budget="twice")
    check_budget(make_study(arms=(*STUDY.arms, other), tolerance=0.1), "small")


def test_padding_and_dispatch_count():
    einsum = make_study(base={**TINY, "model.parts.moe.run_experts": "einsum"})
    assert cost_of(einsum, "small", "moe").active == cost_of(STUDY, "small", "moe").active
    with pytest.raises(ValueError, match="padding and dispatch included"):
        check_budget(dataclasses.replace(einsum, tolerance=0.1), "small")
    # Forward per token: 2 layers x 8 router logits of 16 dims more than the dense arm.
    dense, moe = (cost_of(STUDY, "small", arm) for arm in ("dense", "moe"))
    assert moe.computed - dense.computed == 2 * 2 * 16 * 8
    assert moe.total_parameters - dense.total_parameters == 2 * (7 * 2 * 16 * 32 + 16 * 8)
    assert "| moe | equal | " in budget_table(STUDY, "small")


def test_the_baseline_comes_first(tmp_path):
    dense = [f"dense_seed{seed}" for seed in range(3)]
    assert plan(tmp_path) == dense + [f"moe_seed{seed}" for seed in range(3)]
    wide = make_study(baseline_seeds=(0, 1, 2, 3, 4))
    assert wide.seeds_of("dense") == (0, 1, 2, 3, 4) and wide.seeds_of("moe") == (0, 1, 2)
    assert plan(tmp_path, num_seeds=1) == ["dense_seed0", "moe_seed0"]
    assert plan(tmp_path, arms=("moe",), num_seeds=2) == ["moe_seed0", "moe_seed1"]
    with pytest.raises(ValueError, match=r"made_up has the arms \['dense', 'moe'\]: 'm'"):
        plan(tmp_path, arms=("m",))


def test_what_is_finished_is_not_run_again(tmp_path):
    append_result(tmp_path / "results.jsonl", line("dense", 0, 1.0))
    append_result(tmp_path / "results.jsonl", line("moe", 1, 1.0) | {"size": "base"})
    append_result(tmp_path / "results.jsonl", line("moe", 0, 1.0))
    assert plan(tmp_path, num_seeds=2) == ["dense_seed1", "moe_seed1"]


def test_a_size_that_a_study_lacks_is_refused(capsys):
    assert run.main(["balance", "--size=medium"]) == 1
    said = capsys.readouterr()
    assert "balance has the sizes ['smoke', 'small', 'gpu', 'base']: 'medium'" in said.err
    assert not said.out


def test_results_of_other_settings_are_refused(tmp_path):
    other = make_study(base={**TINY, "optimizer.learning_rate": 0.5})
    append_result(tmp_path / "results.jsonl", line("moe", 1, 1.0, other))
    named = "made_up, arm moe, seed 1: config.optimizer.learning_rate: 0.5 -> 0.001. Restore"
    with pytest.raises(ValueError, match=named):
        plan(tmp_path)
    with pytest.raises(ValueError, match=named):
        report.results_of(STUDY, "small", tmp_path)


def test_results_outlive_a_new_setting_at_its_default(tmp_path):
    row = line("moe", 1, 1.0)
    del (
        row["config"]["optimizer"]["learning_rate"],
        row["config"]["model"]["parts"]["moe"]["router"],
    )
    append_result(tmp_path / "results.jsonl", row)
    assert "moe_seed1" not in plan(tmp_path)
    assert len(report.results_of(STUDY, "small", tmp_path).rows) == 1


def test_lines_are_added_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    for seed in range(3):
        append_result(path, line("moe", seed, 1.0))
    assert [row["seed"] for row in read_results(path)] == [0, 1, 2]
    assert read_results(path, "base") == []
    append_result(path, line("moe", 1, 2.0))  # from another process that ran the same
    assert [row["measures"][LOSS] for row in read_results(path)] == [1.0] * 3


def test_a_run_that_is_stopped_between_arms_and_inside_one_goes_on(tmp_path, monkeypatch):
    """The second arm is interrupted. A second call resumes it in its folder and runs the rest."""
    seen = []

    def run_arm(study, size, arm, seed, *, workdir, results, corpus):
        seen.append(workdir.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        append_result(results, line(arm, seed, 1.0))

    monkeypatch.setattr(job_module, "run_arm", run_arm)

    def go():
        results = tmp_path / "results.jsonl"
        jobs = jobs_of(STUDY, "small", num_seeds=2, runs=tmp_path, results=results)
        with Board(jobs) as board:
            run_in_turn(jobs, board)

    with pytest.raises(KeyboardInterrupt):
        go()
    go()
    assert seen == ["dense_seed0", *["dense_seed1"] * 2, "moe_seed0", "moe_seed1"]
    go()
    assert len(seen) == 5


def test_a_run_stops_after_its_minutes_and_keeps_what_is_finished(tmp_path, monkeypatch):
    """At size gpu, one process runs all arms, and the time limit stops it like SIGTERM."""

    def run_arm(study, size, arm, seed, *, workdir, results, corpus):
        if arm == "moe":
            time.sleep(60)
            (tmp_path / "slept to the end").touch()
        config = study.settings(size, arm, seed)
        append_result(results, line(arm, seed, 1.0) | {"size": size, "config": config})

    monkeypatch.setattr(job_module, "run_arm", run_arm)
    results = tmp_path / "results.jsonl"
    jobs = jobs_of(STUDY, "gpu", runs=tmp_path, results=results)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run_jobs(jobs, "gpu", 1, minutes=1 / 60)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not (tmp_path / "slept to the end").exists()
    assert [(row["arm"], row["seed"]) for row in read_results(results)] == [
        ("dense", seed) for seed in range(3)
    ]
    (left,) = jobs_of(STUDY, "gpu", runs=tmp_path, results=results)
    assert (left.arm, left.seeds_left()) == ("moe", [0, 1, 2])


def test_seeds_of_an_arm_have_one_program():
    mesh = make_mesh(STUDY.experiment("small", "moe", 0).mesh)
    programs = [
        compile_train_step(STUDY.experiment("small", arm, seed), mesh)
        for arm, seed in (("moe", 0), ("moe", 1), ("dense", 1))
    ]
    assert programs[0] is programs[1] and programs[0] is not programs[2]


def test_the_size_of_one_card_is_traced_on_a_cpu(tmp_path, capsys):
    arguments = ["switch_against_dense", "--size=gpu", "--dry", "--arms=switch_64"]
    arguments += [
        f"--corpus={tmp_path}",
        f"--runs={tmp_path / 'runs'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert run.main(arguments) == 1
    assert "at the size gpu --corpus is a folder of packed tokens" in capsys.readouterr().err
    for name in ("manifest.json", "tokens.tar.xz", "bpe8192.model"):
        (tmp_path / name).touch()
    assert run.main(arguments) == 0
    said = capsys.readouterr().out
    # 237 M parameters with two moments each, in float32.
    assert "switch_64 (seed 0, 1, 2): 3 x 1,200 steps of 32,768 tokens, 39.3 M; " in said
    assert "parameters and moments 2.84 GB" in said
    study = load_study("switch_against_dense")
    for name in ("dense", "switch_64"):
        assert 13e6 < cost_of(study, "gpu", name).active_parameters < 17e6
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


@dataclasses.dataclass(frozen=True)
class FakeJob(Job):
    """A job whose process is a script."""

    script: str = ""

    def command(self):
        return [sys.executable, "-c", self.script]


def fake_jobs(tmp_path, *scripts):
    return [
        FakeJob(STUDY, "small", "moe", (seed,), tmp_path / str(seed), tmp_path / "r", "", script)
        for seed, script in enumerate(scripts)
    ]


def test_processes_run_side_by_side_and_a_failure_stops_no_other(tmp_path, capsys):
    meet = (
        "import pathlib, time, sys; me, other = map(pathlib.Path, {}); me.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print('met')"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    scripts = [meet.format([a, b]), meet.format([b, a]), "import sys; sys.exit('no')", "print(1)"]
    jobs = fake_jobs(tmp_path, *scripts)
    with Board(jobs) as board:
        failed = run_side_by_side(jobs, this_machine("cpu").places(2), board)
    assert [job.seeds for job in failed] == [(2,)]
    why = "the process ended by exit code 1; the lines above may say why"
    logs = [(tmp_path / f"{n}/.logs/moe/log.txt").read_text().partition("\n") for n in (0, 2)]
    assert all(starts.startswith("starts: ") for starts, _, _ in logs)
    assert [said for _, _, said in logs] == ["met\n", f"no\n\nerror: {why}\n"]
    said = capsys.readouterr().out
    assert f"moe (seed 2): failed: {why} ({tmp_path / '2/.logs/moe/log.txt'})" in said
    assert "(4 of 4)" in said


def test_a_signal_is_handed_on_to_every_arm_and_waited_for(tmp_path, monkeypatch):
    script = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_): pathlib.Path('saved').touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path('ready').touch(); time.sleep(60)\n"
        "pathlib.Path('slept').touch()"
    )
    logs = [str(tmp_path / str(i) / ".logs/moe") for i in range(2)]
    jobs = fake_jobs(tmp_path, *[f"import os; os.chdir({log!r})\n" + script for log in logs])

    def look(self):
        if all((job.workdir / "ready").exists() for job in jobs):
            raise KeyboardInterrupt

    monkeypatch.setattr(Board, "look", look)
    with pytest.raises(KeyboardInterrupt), Board(jobs) as board:
        run_side_by_side(jobs, this_machine("cpu").places(2), board)
    assert all((job.workdir / "saved").exists() for job in jobs)
    assert not any((job.workdir / "slept").exists() for job in jobs)


def test_a_study_without_its_corpus_says_how_to_make_it(tmp_path, capsys):
    arguments = ["capacity_factors", f"--corpus={tmp_path}", f"--runs={tmp_path}"]
    assert run.main(arguments) == 1
    said = capsys.readouterr()
    assert "| top1_1.0 | experts: 1.0 |" in said.out  # the table is printed before any run
    assert "Run `python -m moe_jax.data.build --out=" in said.err
    (tmp_path / "one.jsonl").touch()
    assert run.main([*arguments, "--size=base"]) == 1
    assert "python -m moe_jax.data.train_tokenizer --corpus=jsonl:" in capsys.readouterr().err
    assert run.main(["no_such_study"]) == 1
    assert "the studies are ['balance', 'capacity_factors', " in capsys.readouterr().err
    assert run.main(["moe_against_dense"]) == 1
    assert "Run python -m experiments.moe_against_dense.run" in capsys.readouterr().err
    assert run.main(["balance", "--jobs=0"]) == 1
    assert "--jobs is 1 or more: 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]


def test_a_kill_leaves_no_half_line(tmp_path):
    """A process killed at any moment while it appends leaves only whole lines."""
    script = (
        "import pathlib, sys; from experiments.results import append_result\n"
        "for seed in range(10**9):\n"
        "    row = {'size': 'small', 'arm': 'moe', 'seed': seed, 'x': 'y' * 9999}\n"
        "    append_result(pathlib.Path(sys.argv[1]), row)"
    )
    path = tmp_path / "results.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT)
    while not path.exists():
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(0.3)
    process.kill()
    process.wait()
    rows = [json.loads(text) for text in pathlib.Path(path).read_text().splitlines()]
    assert rows and all(len(row["x"]) == 9999 for row in rows)


def test_an_arm_that_needs_the_run_of_another_comes_behind_it(tmp_path):
    needs = {**NO_EXPERTS, "init_from.path": RUN_OF + "moe", "init_from.fresh": ("mlp", "moe")}
    made = make_study()
    study = make_study(arms=(Arm("student", "starts from moe", needs), *made.arms))
    assert study.needed_by("small", "student") == {"moe"}
    assert [study.stage("small", arm.name) for arm in study.arms] == [1, 0, 0]
    jobs = jobs_of(study, "small", num_seeds=2, runs=tmp_path, results=tmp_path / "none.jsonl")
    assert [job.arm for job in jobs] == ["dense", "moe", "student"]
    of_seed = study.experiment("small", "student", 1, runs=str(jobs[0].runs))
    assert of_seed.init_from.path == str(jobs[1].workdirs[1])
    settings = study.settings("small", "student", 1)  # results lines record no local path
    assert settings["init_from"]["path"] == "RUNS/moe_seed1"
