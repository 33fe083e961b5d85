"""Commands as processes: killed, stopped, resumed, misused."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.__main__ import main
from moe_jax.training.saved import CHECKPOINTS
from tests.tiny_run import CACHE, ROOT, assert_same_run, files, tiny_flags

# A process starts, compiles and trains in about ten seconds; the margin is for a busy machine.
LIMIT_SECONDS = 300
ENDLESS = "--config.training.num_steps=1000000"
TINY = tiny_flags(num_steps=30, checkpoint_every=10, evaluate_every=15, sample_tokens=4)


def command(module, *arguments):
    return [sys.executable, "-m", f"moe_jax.{module}", *map(str, arguments)]


def environment():
    # Reuse programs that an earlier process compiled.
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run(module, *arguments):
    """Runs a command to its end."""
    return subprocess.run(
        command(module, *arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=LIMIT_SECONDS,
        check=False,
    )


def succeed(module, *arguments):
    outcome = run(module, *arguments)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


class Process:
    """A command that a test stops. Its output goes to a file, so a full pipe never blocks it."""

    def __init__(self, log, module, *arguments):
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command(module, *arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def wait_until(self, condition):
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def stop(self, number):
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=LIMIT_SECONDS)


def checkpoint_steps(workdir):
    directory = workdir / CHECKPOINTS
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run. Tests write nothing to it except `evaluation.json`."""
    workdir = tmp_path_factory.mktemp("commands") / "run"
    said = succeed("train", *TINY, f"--workdir={workdir}")
    assert "step 30/30  loss" in said and "held-out after step 30" in said
    return workdir


def test_a_run_that_was_killed_ends_like_one_that_was_not(finished, tmp_path):
    workdir = tmp_path / "run"
    with Process(tmp_path / "log", "train", *TINY, f"--workdir={workdir}") as process:
        process.wait_until(lambda: checkpoint_steps(workdir))
        assert process.stop(signal.SIGKILL) == -signal.SIGKILL
    said = succeed("train", *TINY, f"--workdir={workdir}")
    assert re.search(r"resuming after step \d0 of 30", said)
    assert_same_run(workdir, finished)


@pytest.mark.slow
def test_a_run_that_starts_from_a_checkpoint_ends_alike_after_a_kill(finished, tmp_path):
    """Before its first checkpoint it starts from the source again; later it needs no source."""
    source, workdir = shutil.copytree(finished, tmp_path / "source"), tmp_path / "run"
    start = (f"--config.init_from.path={source}", "--config.init_from.fresh=router")
    succeed("train", *TINY, *start, f"--workdir={tmp_path / 'expected'}")
    for has_reached in ((workdir / "metrics.jsonl").exists, lambda: checkpoint_steps(workdir)):
        with Process(tmp_path / "log", "train", *TINY, *start, f"--workdir={workdir}") as process:
            process.wait_until(has_reached)
            assert process.stop(signal.SIGKILL) == -signal.SIGKILL
    shutil.rmtree(source)
    assert "resuming after step" in succeed("train", *TINY, *start, f"--workdir={workdir}")
    assert_same_run(workdir, tmp_path / "expected")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(finished, tmp_path):
    """Kills come at random moments, including during saves, evaluations and the report."""
    workdir, rng = tmp_path / "run", random.Random(0)
    arguments = ("train", *TINY, f"--workdir={workdir}")

    def saving():
        directory = workdir / CHECKPOINTS
        return directory.is_dir() and any("tmp" in path.name for path in directory.iterdir())

    kills = 0
    for attempt in range(12):
        with Process(tmp_path / f"log{attempt}", *arguments) as process:
            if attempt % 3 == 0:
                try:
                    process.wait_until(saving)
                except AssertionError:
                    assert process.process.poll() == 0, process.log.read_text()
            else:
                time.sleep(rng.uniform(1, 6))
            kills += process.stop(signal.SIGKILL) == -signal.SIGKILL
    assert kills > 2
    succeed(*arguments)
    assert_same_run(workdir, finished)


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]],
    ids=["SIGTERM", "then Ctrl-C"],
)
@pytest.mark.slow  # test_launch.py has a quick one
def test_a_signal_saves_says_how_to_go_on_and_exits_with_128_more(tmp_path, numbers):
    """SIGTERM, as schedulers send it, then Ctrl-C on the resumed run."""
    workdir = tmp_path / "a run"
    no_evaluation = "--config.training.evaluate_every=0"  # a signal would end an evaluation at once
    arguments = ("train", *TINY, ENDLESS, no_evaluation, f"--workdir={workdir}")
    before = 0
    for number in numbers:
        name = number.name
        log = tmp_path / name
        with Process(log, *arguments) as process:
            process.wait_until(lambda before=before: checkpoint_steps(workdir)[-1:] > [before])
            assert process.stop(number) == 128 + number
        said = log.read_text()
        step = int(re.search(rf"stopped by {name} after step (\d+); its checkpoint", said)[1])
        assert checkpoint_steps(workdir)[-1] == step > before
        assert shlex.split(said.splitlines()[-1]) == command(*arguments), "can be pasted"
        assert (f"resuming after step {before} of" in said) == (before > 0)
        assert "Traceback" not in said
        before = step


def test_a_wrong_setting_is_answered_with_its_name_value_and_fix(tmp_path):
    """The config as a whole refuses these values; `test_command_line.py` covers flags."""
    workdir, smoke = f"--workdir={tmp_path / 'run'}", "--config=configs/quickstart.py:smoke"
    moe = "config.model.parts.moe"
    cases = {
        f"--{moe}.num_selected_experts=9": (
            rf"error: {moe}: num_selected_experts must lie in",
            rf"--{moe}.num_selected_experts=9, --{moe}.num_experts=8. Lower num_selected_experts",
        ),
        f"--{moe}.bias=sing": (rf"{moe}\.bias", r"\['error', 'quantile', 'sign'\]", "kind='sing'"),
        "--config.data.tokenizer=sentencepiece:none.model": (
            "none.model", "moe_jax.data.train_tokenizer",
        ),
    }  # fmt: skip
    running = {
        flag: subprocess.Popen(
            command("train", smoke, flag, workdir),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for flag in cases
    }  # fmt: skip
    for flag, patterns in cases.items():
        _, said = running[flag].communicate(timeout=LIMIT_SECONDS)
        assert running[flag].returncode == 1, (flag, said)
        assert said.count("\n") == 1, said
        for pattern in patterns:
            assert re.search(pattern, said), (pattern, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_of_another_config_is_refused_and_left_as_it_is(finished):
    before = files(finished)
    outcome = run("train", *TINY, "--config.training.num_steps=29", f"--workdir={finished}")
    assert outcome.returncode == 1
    assert "--config.training.num_steps: 30 -> 29" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert files(finished) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_a_message(tmp_path):
    setting = "--config.optimizer.learning_rate=1e30"
    outcome = run("train", *TINY, setting, f"--workdir={tmp_path}")
    assert outcome.returncode == 1
    assert re.search(r"error: train/\w+ is (nan|inf) at step \d+; last good", outcome.stderr)
    assert "Traceback" not in outcome.stderr


def test_evaluate_and_generate_read_a_run(finished):
    expected = (finished / "evaluation.json").read_text()
    said = succeed("evaluate", f"--workdir={finished}")
    assert (finished / "evaluation.json").read_text() == expected
    values = json.loads(expected)["dropless"]
    row = f"{values['bits_per_byte']:.4f} +{values['nats_per_token']:.4f}"
    named = "the held-out split of embedded"
    assert re.search(rf"^step 30: {named}\n.*\n.*\nall +{row}", said), said
    for domain, losses in values["domains"].items():
        assert re.search(rf"^{domain} +{losses['bits_per_byte']:.4f}", said, re.MULTILINE)

    arguments = ("generate", f"--workdir={finished}", "--prompt=The ", "--tokens=4")
    assert succeed(*arguments) == (finished / "sample.txt").read_text()


def test_reading_a_directory_without_a_run_is_answered(tmp_path, capsys):
    for arguments in (("evaluate",), ("analyze",), ("generate", "--prompt=The ")):
        with pytest.raises(SystemExit, match=r"^1$"):
            main([*arguments, f"--workdir={tmp_path}"])
        assert "error: The workdir of a run must hold config.json" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_commands_import_neither_tensorflow_nor_torch():
    code = (
        "import sys, moe_jax.train, moe_jax.evaluate, moe_jax.generate;"
        "print([name for name in ('tensorflow', 'torch', 'clu') if name in sys.modules])"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert outcome.stdout == "[]\n"
