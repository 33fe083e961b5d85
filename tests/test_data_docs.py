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
# Flags that shrink the commands, in addition to the preset `smoke`.
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


def commands(section="Train on your own text"):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"## {section}\n(?:(?!\n## ).)*?```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


def run(command, folder, *more):
    flags = [flag.replace("configs/", f"{ROOT}/configs/") for flag in command[3:]]
    flags = [flag.replace("quickstart.py", "quickstart.py:smoke") for flag in flags]
    done = subprocess.run(
        [sys.executable, "-m", command[2], *flags, *more],
        cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


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
        done = run(command, tmp_path, *SMALL[command[2]])
    said = json.loads((tmp_path / "runs/mine/evaluation.json").read_text())
    assert list(said["dropless"]["domains"]) == ["my_texts"]
    assert done.stdout.startswith("It was ")


@pytest.mark.slow
def test_the_commands_train_on_prompts_and_answers(tmp_path):
    lines = [json.dumps({"prompt": f"{i} + {i} = ", "answer": str(2 * i)}) for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train, evaluate, generate = commands("Prompts and answers")
    small = [flag for flag in SMALL[train[2]] if "vocab_size" not in flag]
    run(train, tmp_path, *small)
    assert "held-out split of" in run(evaluate, tmp_path).stdout
    assert run(generate, tmp_path, "--tokens=3").stdout.startswith("2 + 2 = ")
    said = json.loads((tmp_path / "runs/sums/evaluation.json").read_text())
    assert 2 * 2 <= said["dropless"]["tokens"] <= 30 * 4  # answers and their ends; a tenth of 60
