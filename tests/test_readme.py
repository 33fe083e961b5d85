"""The code and commands of README.md and docs/index.md, run on the smallest model.

Commands run one after another, each in its own process. The processes are forked from one that
has imported the library, so imports are paid for once.
"""

import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
# Flags that make a command take seconds.
SMALLER = {
    "moe_jax.train": [
        "--config.training.num_steps=6",
        "--config.training.evaluation_batches=1",
        "--config.training.sample_tokens=4",
        "--config.data.heldout_fraction=0.004",
    ],
    "moe_jax.generate": ["--tokens=4"],
    "moe_jax.analyze": ["--tokens=2048"],
}
# Reads command lines and runs each in a fork of itself; stops at the first failure.
DRIVER = """
import importlib, os, runpy, shlex, sys
commands = [shlex.split(line) for line in sys.stdin]
for command in commands:
    importlib.import_module(command[2])
for command in commands:
    print("$", shlex.join(command), flush=True)
    if os.fork() == 0:
        del sys.modules[command[2]]  # a fresh copy, run as the main module
        sys.argv = sys.orig_argv = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        sys.exit(0)
    if status := os.waitstatus_to_exitcode(os.wait()[1]):
        sys.exit(status)
"""


def commands_of(text):
    return [
        line.split("#")[0].strip()
        for line in text.splitlines()
        if re.match(r"    (make|python) ", line)
    ]


def run(arguments, directory, **options):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        arguments, cwd=directory, env=environment, capture_output=True, text=True, check=False,
        **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_pages_have_the_commands_that_this_file_runs():
    assert all(command in README for command in ("`make quickstart`", "`make test`"))
    assert len(commands_of(README)) == 2, "train, and look at the routers"
    modules = {command.split()[2] for command in commands_of(README + TOUR)}
    names = ("train", "evaluate", "generate", "analyze", "plan", "report")
    assert modules == {f"moe_jax.{name}" for name in names}


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ([README], {"smoke"}),
        pytest.param([README, TOUR], {"smoke", "smoke16"}, marks=pytest.mark.slow),
    ],
    ids=["README", "and tour"],
)
def test_the_python_commands_run_one_after_another(tmp_path, pages, runs):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = list(dict.fromkeys(command for page in pages for command in commands_of(page)))
    lines = [shlex.split(line) + SMALLER.get(line.split()[2], []) for line in commands]
    text = "\n".join(map(shlex.join, lines))
    said = run([sys.executable, "-c", DRIVER], tmp_path, input=text)
    outputs = re.split(r"^\$ .*\n", said, flags=re.MULTILINE)[1:]
    assert len(outputs) == len(commands)
    for command, output in zip(commands, outputs, strict=True):
        assert output.strip(), command
    assert {path.name for path in (tmp_path / "runs").iterdir()} == runs


def test_the_block_in_the_readme_runs_as_pasted(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    names = {}
    exec(code.group(1), names)
    assert capsys.readouterr().out
    x_BLM, params = names["x_BLM"], names["params"]
    # The loss is the task's plus the balance losses, and both reach the router.
    call, moe = names["Call"](rng=jax.random.key(2)), names["moe"]
    y_BLM, aux = names["moe_block"](params, x_BLM, moe, call)
    balance = float(names["loss"] - jnp.mean((x_BLM + y_BLM) ** 2))
    weight = {loss.metric: loss.weight for loss in moe.losses}["load_balance_loss"]
    metrics = names["metrics"]
    measured = float(metrics["load_balance_loss"])
    assert balance == pytest.approx(weight * measured, rel=1e-3)
    assert jnp.abs(names["gradients"]["router"]["weight"]).max() > 0
    dropped = 1 - aux.sums["kept_KE"].sum() / aux.sums["assigned_KE"].sum()
    assert float(metrics["dropped_fraction"]) == pytest.approx(float(dropped), abs=1e-6)


def test_the_extras_of_the_readme_exist():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = re.findall(r"pip install -e '\.\[(\w+)\]'", README)
    assert extras and all(f'"{name}": [' in setup for name in extras)


def test_sentences_of_the_readme_are_short():
    lengths = [len(sentence.split()) for sentence in sentences(README)]
    assert max(lengths) <= 30
    assert statistics.mean(lengths) <= 17


def sentences(page):
    """The sentences of a Markdown page, without code, tables, headings and pictures."""
    page = re.sub(r"```.*?```", "\n\n", page, flags=re.DOTALL)
    page = re.sub(r"^(    |\||#|!\[).*$", "\n", page, flags=re.MULTILINE)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    paragraphs = re.split(r"\n\s*\n|\n(?=[-*] )", page)
    found = [one for text in paragraphs for one in re.split(r"(?<=[.!?])\W*\s", text)]
    return [one for one in found if re.search(r"\w", one)]


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
