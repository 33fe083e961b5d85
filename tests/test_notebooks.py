import json
import os
import pathlib
import re
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


EXECUTE = """
import sys, nbclient, nbformat
_, path, seconds, out = sys.argv
notebook = nbformat.read(path, 4)
strict = "import warnings; warnings.simplefilter('error')"
notebook.cells.insert(0, nbformat.v4.new_code_cell(strict))
nbclient.NotebookClient(notebook, timeout=int(seconds)).execute(cwd=".")
nbformat.write(notebook, out)
"""


def run(name, directory, **variables):
    """Executes a notebook in Jupyter, with warnings as errors.

    Returns:
      The printed text, and the PNG images shown.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        **{key: str(value) for key, value in variables.items()},
    }
    environment.pop("MPLBACKEND", None)  # a kernel sets its own
    path, out = ROOT / "notebooks" / f"{name}.ipynb", directory / f"{name}.ipynb"
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(LIMIT_SECONDS), str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in cells_of(out) for output in cell.get("outputs", ())]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    return text, [output["data"]["image/png"] for output in outputs if is_image(output)]


def is_image(output):
    return "image/png" in output.get("data", {})


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A run that the notebook on routers trained, with the notebook's text and images."""
    directory = tmp_path_factory.mktemp("notebooks")
    workdir = directory / "run"
    return workdir, *run("looking_into_a_router", directory, RUN=workdir)


@pytest.mark.slow
def test_looking_into_a_router_trains_and_shows_where_tokens_go(looked):
    workdir, said, images = looked
    assert len(images) == 5
    assert "settled at step 10" in said and "at random 12.5%, 46.4%" in said
    assert "expert 0:" in said and "expert 7:" in said
    assert (workdir / "analysis" / "analysis.html").exists()


@pytest.mark.slow
def test_look_at_a_run_reads_a_finished_run(looked, tmp_path):
    _, images = run("look_at_a_run", tmp_path, RUN=looked[0])
    assert len(images) == 3


@pytest.mark.slow
def test_reading_a_study_computes_its_verdict(tmp_path):
    where = {"STUDY": "switch_against_dense", "RESULTS": tmp_path, "RUNS": tmp_path / "runs"}
    # With no results, the notebook uses a smoke run.
    said, images = run("reading_a_study", tmp_path, **where)
    assert len(images) == 1
    assert "2 of 15 runs, size smoke" in said
    assert "| Switch, E = 16 | 1 |" in said
    # Only some arms and seeds have results, as while a study is running.
    study = load_study("switch_against_dense")
    for arm, seed in [*(("dense", seed) for seed in range(5)), ("switch_8", 0)]:
        append_result(tmp_path / RESULTS_FILE, {
            "study": study.name, "size": "small", "arm": arm, "seed": seed, "minutes": 1.0,
            "config": study.settings("small", arm, seed),
            "data": {"corpus_sha256": "a", "tokenizer_sha256": "b"},
            "measures": {LOSS: 2 - 0.1 * seed}, "curve": {"step": [1, 2], LOSS: [3, 2]},
        })  # fmt: skip
    said, _ = run("reading_a_study", tmp_path, **where)
    assert "6 of 15 runs, size small" in said and "verdict: inconclusive" in said
    assert re.search(r"\| Switch, E = 8 \| .*0\.0000", said)


@pytest.mark.slow
def test_what_a_model_says_imports_a_model_and_shows_the_experts_of_its_text(tmp_path):
    said, _ = run("what_a_model_says", tmp_path, RUNS=tmp_path / "runs")
    assert "olmoe of " in said and "The old king said to his|" in said
    share = float(re.search(r"([\d.]+)% of the choices are the same", said)[1])
    assert share > 99
    page = (tmp_path / "runs" / "page" / "analysis.html").read_text(encoding="utf-8")
    assert "texts that the model wrote" in page and "The old king said to his" in page


def test_every_notebook_is_run_above_and_committed_without_outputs():
    source = pathlib.Path(__file__).read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f'run("{path.stem}"' in source, f"no test runs {path.name}"
        for cell in cells_of(path):
            assert not cell.get("outputs"), f"{path.name} has outputs: strip them"
