"""Every command of the README runs, in its order, on the smallest model."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for line in README.splitlines()
    if re.match(r"    (make|python) ", line)
]
# What training is given so that it takes seconds.
SMALLER = ["--config.training.num_steps=6", "--config.training.evaluation_batches=1"]


def run(arguments: list[str], directory: pathlib.Path) -> str:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_has_the_commands_that_this_file_runs():
    assert "make quickstart" in COMMANDS
    assert "make test" in COMMANDS
    assert len([c for c in COMMANDS if c.startswith("python")]) >= 5


def test_the_python_commands_run_one_after_another(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for command in COMMANDS:
        if not command.startswith("python"):
            continue
        arguments = [sys.executable, *shlex.split(command)[1:]]
        if "moe_jax.train" in command:
            arguments += SMALLER
        assert run(arguments, tmp_path), command


def test_the_block_in_the_readme_is_what_it_says():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    names = {"jax": jax, "x_BLM": jax.random.normal(jax.random.key(0), (2, 16, 128))}
    exec(code.group(1), names)
    assert names["y_BLM"].shape == (2, 16, 128)
    assert jnp.isfinite(names["y_BLM"]).all()


@pytest.mark.slow
def test_make_quickstart_trains_both_models(tmp_path):
    venv = pathlib.Path(sys.prefix)
    run(["make", "quickstart", f"VENV={venv}", f"RUNS={tmp_path}", "PRESET=smoke"], ROOT)
    for name in ("quickstart", "quickstart_dense"):
        assert (tmp_path / name / "report" / "report.md").exists()


def test_make_targets_do_what_the_readme_says():
    plan = run(["make", "--dry-run", "--always-make", "quickstart"], ROOT)
    assert "--config=configs/quickstart.py:" in plan
    assert "--config=configs/quickstart.py:dense" in plan
    plan = run(["make", "--dry-run", "--always-make", "test"], ROOT)
    assert all(word in plan for word in ("venv .venv", "ruff check", "mypy", "pytest"))
