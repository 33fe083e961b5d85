"""The commands of docs/data.md train on a user's own text."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from moe_jax.data import corpora

ROOT = pathlib.Path(__file__).parent.parent
# What makes the commands small, beside the preset `smoke`.
SMALL = {
    "moe_jax.data.train_tokenizer": ["--vocab_size=400"],
    "moe_jax.train": [
        "--config.model.vocab_size=400",
        "--config.training.num_steps=3",
        "--config.training.batch_size=4",
        "--config.optimizer.warmup_steps=1",
        "--config.data.sequence_length=64",
    ],
    "moe_jax.generate": ["--tokens=3"],
}


def commands():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"## Train on your own text\n.*?```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


def test_three_commands_come_first():
    assert [command[:2] for command in commands()] == [["python", "-m"]] * 3
    assert [command[2] for command in commands()] == list(SMALL)


@pytest.mark.slow
def test_the_commands_train_on_a_folder_of_text(tmp_path):
    (tmp_path / "my_texts").mkdir()
    documents = list(corpora.EmbeddedCorpus().documents("prose", 0.0))[:3]
    for number, (_, document) in enumerate(documents):
        (tmp_path / "my_texts" / f"{number}.txt").write_text(document.text, encoding="utf-8")
    for command in commands():
        module = command[2]
        flags = [flag.replace("configs/", f"{ROOT}/configs/") for flag in command[3:]]
        flags = [flag.replace("quickstart.py", "quickstart.py:smoke") for flag in flags]
        done = subprocess.run(
            [sys.executable, "-m", module, *flags, *SMALL[module]],
            cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "runs/mine/evaluation.json").read_text())
    assert list(said["dropless"]["domains"]) == ["my_texts"]
    assert done.stdout.startswith("It was ")
