import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_cell_runs_on_a_smoke_run(path, tmp_path):
    environment = os.environ | {"RUN": str(tmp_path / "run"), "MPLBACKEND": "agg"}
    train = ["-m", "moe_jax.train", "--config=configs/quickstart.py:smoke"]
    train += [f"--workdir={tmp_path / 'run'}"]
    subprocess.run([sys.executable, *train], cwd=ROOT, env=environment, check=True)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + "\nprint('all cells ran')"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all cells ran\n")
    assert "expert 0:" in done.stdout


def test_notebooks_are_committed_without_outputs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"{path.name} has outputs: strip them"
