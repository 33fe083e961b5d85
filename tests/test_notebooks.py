import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.results import LOSS, RESULTS_FILE, append_result
from experiments.study import load_study
from tests.tiny_run import CACHE

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT_SECONDS = 300


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(name, **variables):
    """Runs all code of a notebook as one program, warnings being errors; returns what it prints."""
    code = [
        "".join(cell["source"])
        for cell in cells_of(ROOT / "notebooks" / f"{name}.ipynb")
        if cell["cell_type"] == "code"
    ]
    # As a Jupyter kernel is started: absl flags, which some libraries read, were never parsed.
    program = "\n".join([*code, "print('all cells ran')"])
    environment = os.environ | {
        "MPLBACKEND": "agg",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        **{key: str(value) for key, value in variables.items()},
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all cells ran\n")
    return done.stdout


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A run that the notebook on routers trained, and what the notebook said of it."""
    workdir = tmp_path_factory.mktemp("notebooks") / "run"
    return workdir, run("looking_into_a_router", RUN=workdir)


@pytest.mark.slow
def test_looking_into_a_router_trains_and_shows_where_tokens_go(looked):
    workdir, said = looked
    assert "settled at step 10" in said and "at random 12.5%, 46.4%" in said
    assert "expert 0:" in said and "expert 7:" in said
    assert (workdir / "analysis" / "analysis.html").exists()


@pytest.mark.slow
def test_look_at_a_run_reads_a_finished_run(looked):
    run("look_at_a_run", RUN=looked[0])


@pytest.mark.slow
def test_reading_a_study_computes_its_verdict(tmp_path):
    where = {"STUDY": "switch_against_dense", "RESULTS": tmp_path, "RUNS": tmp_path / "runs"}
    said = run("reading_a_study", **where)  # of a smoke run, as there are no results
    assert "2 of 17 runs, size smoke" in said and "noise floor: nan" in said
    assert "| Switch, E = 16 | 1 |" in said
    # Of part of the arms and seeds, as while a study is running.
    study = load_study("switch_against_dense")
    for arm, seed in [*(("dense", seed) for seed in range(5)), ("switch_8", 0)]:
        append_result(tmp_path / RESULTS_FILE, {
            "study": study.name, "size": "small", "arm": arm, "seed": seed, "minutes": 1.0,
            "config": study.settings("small", arm, seed),
            "data": {"corpus_sha256": "a", "tokenizer_sha256": "b"},
            "measures": {LOSS: 2 - 0.1 * seed}, "curve": {"step": [1, 2], LOSS: [3, 2]},
        })  # fmt: skip
    said = run("reading_a_study", **where)
    assert "6 of 17 runs, size small" in said and "noise floor: 0.1581" in said
    assert "Switch, E = 8: {0: 0.0}" in said and "verdict: inconclusive" in said


def test_every_notebook_is_run_above_and_committed_without_outputs():
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f'run("{path.stem}"' in source, f"no test runs {path.name}"
        for cell in cells_of(path):
            assert not cell.get("outputs"), f"{path.name} has outputs: strip them"
