"""The command convert: models in as runs of 0 steps, and out unchanged."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import convert
from moe_jax.__main__ import main
from moe_jax.data import open_tokenizer_of
from moe_jax.data.corpora import open_corpus
from moe_jax.data.objectives.span_corruption import SpanCorruption
from moe_jax.data.train_tokenizer import train
from moe_jax.interchange.tensor_files import ONE_FILE
from moe_jax.training.saved import load_run
from tests.hf_families import CASES, write_model

CASE = CASES["mixtral"]
TOKENIZER_RULE = (
    "A tokenizer must be a BPE that falls back on bytes, so that the bytes of a token are known"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in bfloat16, with one tensor in float32."""
    folder = tmp_path_factory.mktemp("convert")
    config, params = moe_jax.from_hf(write_model(folder / "wide", CASE))
    dtypes = {"model.norm.weight": "float32"}
    half = jax.tree.map(lambda a: a.astype("bfloat16"), params)
    half["final_norm"] = params["final_norm"]
    moe_jax.to_hf(config, half, folder / "hf", settings={"eos_token_id": 7, **dtypes})
    return folder / "hf"


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The model as the directory of a run."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert main(["convert", f"--from-hf={model}", "--workdir", str(workdir)]) == 0
    return workdir


def test_a_run_has_the_logits_of_the_model(model, run):
    config, state = load_run(run)
    assert state.opt_state == () and int(state.step) == 0
    tokens = CASE.tokens()
    ours = moe_jax.build(config).apply({"params": state.params}, tokens)
    read, params = moe_jax.from_hf(model)
    assert read.model == config.model
    theirs = moe_jax.build(read).apply({"params": params}, tokens)
    np.testing.assert_array_equal(ours, theirs)


def test_a_model_is_read_to_a_mesh_and_written_from_it(model, run, tmp_path):
    mesh, there, back = "--mesh=fsdp=2,expert=2", tmp_path / "there", tmp_path / "back"
    half = "--compute_dtype=bfloat16"
    assert main(["convert", f"--from-hf={model}", f"--workdir={there}", mesh, half]) == 0
    (before, one), (config, split) = load_run(run), load_run(there)
    assert config.model == dataclasses.replace(before.model, compute_dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, one.params, split.params)
    assert main(["convert", f"--workdir={there}", f"--to-hf={back}", mesh]) == 0
    assert (back / ONE_FILE).read_bytes() == (model / ONE_FILE).read_bytes()


@pytest.mark.parametrize(
    ("mode", "flag"),
    [
        ("from-hf", "dtype=float16"),
        ("from-gguf", "family=llama"),
        ("from-hf", "trust"),
        ("to-hf", "compute_dtype=bfloat16"),
        ("to-peft", "mesh=fsdp=2"),
        ("to-peft", "format=Q8_0"),
    ],
)
def test_a_flag_of_another_mode_is_refused(tmp_path, capsys, mode, flag):
    with pytest.raises(SystemExit):
        main(["convert", f"--{mode}={tmp_path / 'a'}", f"--workdir={tmp_path / 'b'}", f"--{flag}"])
    assert f"--{mode} does not accept flags of another mode: --{flag.partition('=')[0]}. Leave" in (
        capsys.readouterr().err
    )


def test_a_model_comes_out_as_it_came_in(model, run, tmp_path):
    assert main(["convert", f"--workdir={run}", f"--to-hf={tmp_path / 'hf'}"]) == 0
    assert (tmp_path / "hf" / ONE_FILE).read_bytes() == (model / ONE_FILE).read_bytes()
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["eos_token_id"] == 7 and settings["dtype"] == "bfloat16"


def test_an_encoder_decoder_comes_out_as_it_came_in(tmp_path):
    hf = write_model(tmp_path / "hf", CASES["switch"], decoder_start_token_id=0)
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["convert", f"--from-hf={hf}", f"--workdir={run}"]) == 0
    assert main(["convert", f"--workdir={run}", f"--to-hf={again}"]) == 0
    assert (again / ONE_FILE).read_bytes() == (hf / ONE_FILE).read_bytes()
    settings = json.loads((again / "config.json").read_text())
    assert settings["decoder_start_token_id"] == 0 and settings["is_encoder_decoder"]
    assert load_run(run)[0].data.objective == SpanCorruption()


@pytest.mark.parametrize("kind", ["unusable", "with a .model"])
def test_a_model_whose_tokenizer_cannot_be_used_comes_in(model, tmp_path, caplog, kind):
    """Its tokenizer.json is not BPE, like T5's. Its files are written back unchanged."""
    hf, run, again = (tmp_path / name for name in ("hf", "run", "again"))
    shutil.copytree(model, hf)
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    (hf / "tokenizer.json").write_text(json.dumps({"model": unigram}))
    (hf / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    if kind == "with a .model":
        (tmp_path / "text.txt").write_text("\n\n".join(["A text of some words."] * 9))
        corpus = open_corpus(str(tmp_path / "text.txt"))
        train(corpus, str(hf / "tokenizer.model"), vocab_size=300, heldout_fraction=0.1)
    assert main(["convert", f"--from-hf={hf}", f"--workdir={run}"]) == 0
    assert f"tokenizer.json cannot be used: {TOKENIZER_RULE}: {hf}/tokenizer.json" in caplog.text
    data = load_run(run)[0].data
    if kind == "unusable":
        assert "data.tokenizer is byte" in caplog.text
        assert (data.tokenizer, data.eos_token) == ("byte", "")
    else:
        assert "data.tokenizer is byte" not in caplog.text
        assert data.tokenizer == str(run / "tokenizer" / "tokenizer.model")
        assert open_tokenizer_of(data).eos_id == 2
    assert main(["convert", f"--workdir={run}", f"--to-hf={again}"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (hf / name).read_bytes()


def test_a_tokenizer_of_the_models_own_code_goes_through_unread(model, tmp_path, caplog):
    """Like Kimi K2's: read as a .tiktoken file, it would give other ids."""
    hf, run, again = (tmp_path / name for name in ("hf", "run", "again"))
    shutil.copytree(model, hf)
    (hf / "tiktoken.model").write_text("ranks")
    assert main(["convert", f"--from-hf={hf}", f"--workdir={run}"]) == 0
    assert "tiktoken.model is kept and not read" in caplog.text
    assert load_run(run)[0].data.tokenizer == "byte"
    assert main(["convert", f"--workdir={run}", f"--to-hf={again}"]) == 0
    assert (again / "tiktoken.model").read_text() == "ranks"


def test_without_the_package_of_its_tokenizer_no_model_comes_in(
    model, tmp_path, monkeypatch, capsys
):
    """A fallback to bytes would give a model of other tokens."""
    hf = tmp_path / "hf"
    shutil.copytree(model, hf)
    bpe = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    spec = {"model": bpe, "added_tokens": [], "decoder": {"type": "ByteLevel"}}
    (hf / "tokenizer.json").write_text(json.dumps(spec))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SystemExit):
        main(["convert", f"--from-hf={hf}", f"--workdir={tmp_path / 'run'}"])
    assert "pip install tokenizers" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failed_import_leaves_nothing(model, tmp_path, capsys):
    broken = tmp_path / "hf"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    (broken / ONE_FILE).write_bytes((model / ONE_FILE).read_bytes()[:-8])
    with pytest.raises(SystemExit):
        main(["convert", f"--from-hf={broken}", f"--workdir={tmp_path / 'some' / 'where' / 'run'}"])
    assert "is cut" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_a_damaged_file_of_the_tokenizer_is_named(model, tmp_path, capsys, content):
    broken = shutil.copytree(model, tmp_path / "hf")
    (broken / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(SystemExit):
        main(["convert", f"--from-hf={broken}", f"--workdir={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert "tokenizer_config.json is damaged" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_output_or_a_family_that_cannot_be_is_refused_before_the_model_is_read(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(convert, "loaded", lambda *_: pytest.fail("the model was read"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    for flags, message in (
        ([f"--to-hf={tmp_path / 'there'}"], "is there already"),
        ([f"--to-hf={tmp_path / 'there' / 'file' / 'new'}"], "is a file"),
        ([f"--to-hf={tmp_path / 'new'}", "--family=mixtrall"], "mixtrall"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", f"--workdir={run}", *flags])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "none is"),
        (["--from-hf=a", "--to-hf=b"], "from_hf"),
        (["--from-hf=no_such_folder"], "files that exist: there is no no_such_folder"),
        (["--from-gguf=no_such_file.gguf"], "files that exist: there is no no_such_file.gguf"),
        (["--to-hf=out"], "no_run"),
    ],
)
def test_bad_flags_end_in_one_line(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["convert", "--workdir=no_run", *flags])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


MEASURE = """
import resource, sys
from moe_jax import from_hf
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config, params = from_hf(sys.argv[1])
import jax
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024, held)
"""


@pytest.mark.slow
def test_reading_takes_little_more_memory_than_the_model(tmp_path):
    """A model of 400 MB in one file: peak memory exceeds the model by less than a tenth."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    case = CASE.__class__({**CASE.settings, **sizes, "num_local_experts": 8})
    path = write_model(tmp_path / "hf", case)
    command = [sys.executable, "-c", MEASURE, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, held = map(int, out.split())
    assert held == (path / ONE_FILE).stat().st_size - header_bytes(path)
    assert peak < 1.1 * held + 150e6  # compiled code and the allocator add 150 MB


def header_bytes(path: pathlib.Path) -> int:
    with (path / ONE_FILE).open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
