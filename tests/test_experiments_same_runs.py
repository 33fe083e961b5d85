"""Two studies that share a run train it once."""

import dataclasses
import json
import shutil

import pytest

from experiments import run
from experiments.results import read_results
from experiments.same_runs import WATCHED, link_same_run
from experiments.study import Arm, load_study
from moe_jax.config import write_config
from moe_jax.data import open_data
from moe_jax.training.loop import content_of
from tests.made_up_study import STUDY, make_study
from tests.tiny_run import CACHE

ONE = STUDY.experiment("small", "moe", 0)
# The same run under the names of another study and arm.
SAME = make_study(
    file="another/study.py",
    baseline="eight",
    arms=(Arm("eight", "", STUDY.arm("moe").overrides),),
).experiment("small", "eight", 0)


def leave(workdir, config=ONE, step=ONE.training.num_steps):
    """Writes the files that identify a run."""
    workdir.mkdir(parents=True)
    content = content_of(config, open_data(config.data))
    (workdir / "config.json").write_text(json.dumps(write_config(config, content)))
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    (workdir / "evaluation.json").write_text(json.dumps({"step": step}))
    return workdir


def with_training(**changes):
    return dataclasses.replace(SAME, training=dataclasses.replace(SAME.training, **changes))


@pytest.fixture
def place(tmp_path):
    leave(tmp_path / "made_up/small/moe_seed0")
    return tmp_path / "another/small/eight_seed0"


def test_a_new_workdir_becomes_a_link_to_the_same_run(place, tmp_path):
    other = tmp_path / "made_up/small/moe_seed0"
    assert SAME.name != ONE.name
    assert link_same_run(SAME, place) == other
    assert place.resolve() == other
    shutil.rmtree(other)
    assert place.is_symlink() and not place.exists()
    assert link_same_run(SAME, place) is None
    assert not place.is_symlink()  # the run is trained here
    leave(tmp_path / "third/small/moe_seed0")
    assert link_same_run(SAME, place) == tmp_path / "third/small/moe_seed0"


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SAME, seed=1),
        dataclasses.replace(SAME, data=dataclasses.replace(SAME.data, seed=1)),
        STUDY.experiment("small", "dense", 0),
        STUDY.experiment("base", "moe", 0),
        with_training(num_steps=SAME.training.num_steps + 1),
        # These settings change the curve or the checkpoints.
        *(with_training(**{name: getattr(SAME.training, name) + 1}) for name in WATCHED[:-1]),
        with_training(keep_every=SAME.training.checkpoint_every),
    ],
)
def test_any_other_setting_is_another_run(place, config):
    assert link_same_run(config, place) is None
    assert not place.is_symlink()


def test_the_same_settings_on_other_data_are_another_run(place, tmp_path):
    path = tmp_path / "made_up/small/moe_seed0/config.json"
    record = json.loads(path.read_text())
    assert record["content"].keys() == {"corpus", "tokenizer"}
    for name in record["content"]:
        other = record | {"content": record["content"] | {name: "0" * 64}}
        path.write_text(json.dumps(other))
        assert link_same_run(SAME, place) is None, name
    path.write_text(json.dumps(record))
    assert link_same_run(SAME, place) == path.parent


def test_a_run_that_is_not_whole_or_began_with_a_made_model_is_left_out(tmp_path):
    leave(tmp_path / "unfinished/small/moe_seed0", step=ONE.training.num_steps - 1)
    leave(tmp_path / "of_other_size/base/moe_seed0")
    (leave(tmp_path / "started/small/moe_seed0") / "imported.json").write_text("{}")
    (leave(tmp_path / "damaged/small/moe_seed0") / "config.json").write_text("{")
    assert link_same_run(SAME, tmp_path / "another/small/eight_seed0") is None


def test_a_workdir_that_exists_stays(place):
    place.mkdir(parents=True)
    assert link_same_run(SAME, place) is None
    assert not place.is_symlink()


@pytest.mark.slow
def test_each_study_takes_its_measures(tmp_path, monkeypatch, capsys):
    """The studies of balance and of specialisation share arms."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    lines = {}
    for name in ("balance", "specialisation"):
        study, results = load_study(name), tmp_path / f"{name}.jsonl"
        jobs = run.jobs_of(
            study, "smoke", arms=("none",), num_seeds=1, runs=tmp_path, results=results
        )
        with run.Board(jobs) as board:
            run.run_in_turn(jobs, board)
        (lines[name],) = read_results(results)
    first, second = lines["balance"], lines["specialisation"]
    assert f"balance has trained this run: {tmp_path}/balance/smoke/none_seed0" in (
        capsys.readouterr().out
    )
    assert first["curve"] == second["curve"] and first["heldout"] == second["heldout"]
    assert "heldout_violation" in first["measures"] and "domain_bits" in second["measures"]
