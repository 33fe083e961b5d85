"""The page docs/finetuning.md: its commands run, and its statements about settings hold."""

import json
import re
import shlex
import sys

import pytest

from moe_jax.config import from_config_dict
from moe_jax.config.file import load_config, override, split_overrides
from moe_jax.training.init_from import open_source
from tests.test_readme import DRIVER, ROOT, SMALLER, commands_of, run
from tests.test_training_init_from import CONTENT, config_of, save_run, started
from tests.tiny_run import JITTER

PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
# Commands that extend the run before them keep their number of steps.
SHORT = {name: list(flags) for name, flags in SMALLER.items()}


def shortened(line):
    words = shlex.split(line)
    more = SHORT.get(words[2], [])
    given = {word.partition("=")[0] for word in words}
    return words + [flag for flag in more if flag.partition("=")[0] not in given]


def config_of_command(line):
    """The config that a command of the page trains."""
    plain, overrides = split_overrides(shlex.split(line)[3:])
    (name,) = [word.removeprefix("--config=") for word in plain if word.startswith("--config=")]
    config = load_config(str(ROOT / name))
    for flag, text in overrides:
        override(config, flag, text)
    return from_config_dict(config)


# Training commands, except one that reads the config of the command before it.
TRAIN = [line for line in commands_of(PAGE) if "moe_jax.train --config=configs/" in line]


@pytest.mark.parametrize("line", TRAIN)
def test_the_flags_of_the_page_are_settings(line):
    config_of_command(line)


def test_the_presets_of_the_page_are_settings():
    flags = re.findall(r"`((?:--config\.optimizer\.\w+=[\w,]+ ?)+)`", PAGE)
    assert len(flags) == 7
    for flag in flags:
        if "encoder" not in flag:
            config_of_command(f"{TRAIN[0]} {flag}")


@pytest.mark.slow
def test_the_commands_of_the_page_run_one_after_another(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pairs = [{"prompt": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(200)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    commands = commands_of(PAGE)
    text = "\n".join(shlex.join(shortened(line)) for line in commands)
    said = run([sys.executable, "-c", DRIVER], tmp_path, input=text)
    outputs = re.split(r"^\$ .*\n", said, flags=re.MULTILINE)[1:]
    assert len(outputs) == len(commands)
    for line, output in zip(commands, outputs, strict=True):
        assert output.strip(), line
        for source in re.findall(r"init_from\.path=(\S+)", line):
            steps = 0 if source == "runs/sparse" else 6  # a made run has only parameters, at step 0
            assert f"starts from step {steps} of {tmp_path / source}" in output
    assert "extended from 6" in said


REGULARISED = {
    "dropout": {"model": {"dropout_rate": 0.1}},
    "expert dropout": {"moe": {"expert_dropout_rate": 0.4}},
    "dropped experts": {"moe": {"router": {"kind": "token_choice", "drop_rate": 0.2}}},
    "jitter": {"moe": {"router": {"kind": "token_choice", "noise": {"jitter": JITTER}}}},
    "balance off": {"moe": {"losses": {}}},
    "balance on": {"moe": {"losses": {"load_balance": {"weight": 0.1}}}},
    "capacity": {"moe": {"capacity": {"train_factor": 1.0, "eval_factor": 2.0}}},
    "dropless": {"moe": {"capacity": {"train_factor": 0.0}}},
    "frozen routers": {"optimizer": {"frozen": ("router",)}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("source") / "run", config_of(), 2)


@pytest.mark.parametrize("name", REGULARISED)
def test_a_run_that_starts_from_a_checkpoint_regularises_as_it_likes(name, source, tmp_path):
    """These settings change no array: the run takes all of the source and sets its own values."""
    settings = dict(REGULARISED[name])
    if "moe" in settings:
        bias = {"kind": "sign", "rate": 0.01}
        settings["model"] = {"parts": {"moe": {"bias": bias, **settings.pop("moe")}}}
    model = {**settings.pop("model", {}), "stack": {"unit": [["attention", "moe"]], "repeats": 1}}
    model.setdefault("parts", {"moe": {"bias": {"kind": "sign", "rate": 0.01}}})
    config = started(source, model=model, **settings)
    plain = started(source)
    assert config != plain
    opened = open_source(config, CONTENT)
    assert opened.takes == open_source(plain, CONTENT).takes and not opened.fresh
