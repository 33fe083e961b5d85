"""What a model keeps of its import when it is written after training or other commands."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

from moe_jax.__main__ import main
from moe_jax.config import DataConfig, ExperimentConfig, InitFrom
from moe_jax.convert_tokenizer import write_tokenizer
from moe_jax.data.objectives.supervised import Supervised
from moe_jax.finetune.made import save_made
from moe_jax.interchange.tensor_files import ONE_FILE, write_tensors
from moe_jax.training.imported import origin_of_run, save_imported
from moe_jax.training.saved import load_run
from moe_jax.training.workdir import IMPORTED_FILE
from tests.hf_families import CASES, Case, write_model, written_by_rules

tokenizers = pytest.importorskip("tokenizers")
LENGTH = 77  # the context length; the runs train on another sequence length
GIVEN = {
    "bos_token_id": 256, "eos_token_id": [257, 3], "max_position_embeddings": LENGTH,
    "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "a_file_that_is_not_there.Config"},
}  # fmt: skip
CASE = Case({**CASES["mixtral"].settings, "vocab_size": 260})
BESIDE = {
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 1 }}"},
    "generation_config.json": {"eos_token_id": [257, 3]},
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A model in bfloat16 with one tensor in float32 and its tokenizer, imported as a run."""
    folder = tmp_path_factory.mktemp("imported")
    hf = write_model(folder / "hf", CASE, **GIVEN)
    tensors = [
        one if one.name == "model.norm.weight" else one._replace(dtype=jnp.dtype("bfloat16"))
        for one in written_by_rules(CASE)
    ]
    (hf / ONE_FILE).unlink()
    write_tensors(hf, tensors)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({one: i for i, one in enumerate(letters)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    bpe.save(str(hf / "tokenizer.json"))
    for name, content in BESIDE.items():
        (hf / name).write_text(json.dumps(content))
    assert main(["convert", f"--from-hf={hf}", f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def trained(base, workdir, **changed):
    """The directory of a run that started from another run, as training leaves it."""
    config, state = load_run(base)
    config = dataclasses.replace(config, init_from=InitFrom(str(base)), **changed)
    save_imported(workdir, config, state.params, state.model_state, {}, {})
    (workdir / IMPORTED_FILE).unlink()
    return workdir


def made(base, workdir, made_by):
    """A model that a command made from a run."""
    config, state = load_run(base)
    save_made(base, config, state, workdir, {"made_by": made_by})
    return workdir


def test_a_trained_model_is_written_with_all_that_its_import_had(imported, tmp_path):
    run = trained(imported, tmp_path / "run")
    assert main(["convert", f"--workdir={run}", f"--to-hf={tmp_path / 'hf'}"]) == 0
    hf = imported.parent / "hf"
    before, after = (json.loads((one / "config.json").read_text()) for one in (hf, tmp_path / "hf"))
    names = set(GIVEN) - {"torch_dtype", "auto_map"}
    assert {name: after.get(name) for name in names} == {name: before[name] for name in names}
    assert after["dtype"] == "bfloat16" and not {"torch_dtype", "auto_map"} & set(after)
    assert (tmp_path / "hf" / ONE_FILE).read_bytes() == (hf / ONE_FILE).read_bytes()
    for name in ("tokenizer.json", *BESIDE):
        assert (tmp_path / "hf" / name).read_bytes() == (hf / name).read_bytes()


def test_transformers_ends_a_text_as_the_import_did(imported, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = trained(imported, tmp_path / "run")
    assert main(["convert", f"--workdir={run}", f"--to-hf={tmp_path / 'hf'}"]) == 0
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [257, 3]
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert read.eos_token == "</s>" and read.chat_template == "{{ 1 }}"


def test_a_gguf_file_of_a_trained_model_has_the_length_of_its_import(imported, tmp_path):
    gguf = pytest.importorskip("gguf")
    data = dataclasses.replace(load_run(imported)[0].data, sequence_length=32)
    run = trained(imported, tmp_path / "run", data=data)
    assert main(["convert", f"--workdir={run}", f"--to-gguf={tmp_path / 'a.gguf'}"]) == 0
    fields = gguf.GGUFReader(str(tmp_path / "a.gguf")).fields
    assert fields["llama.context_length"].contents() == LENGTH


def test_the_template_that_a_run_was_trained_with_is_written(imported, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    objective = Supervised(chat_template=str(tmp_path / "own.jinja"))
    data = dataclasses.replace(load_run(imported)[0].data, objective=objective)
    run = trained(imported, tmp_path / "run", data=data)
    assert main(["convert", f"--workdir={run}", f"--to-hf={tmp_path / 'hf'}"]) == 0
    written = (tmp_path / "hf" / "chat_template.jinja").read_text()
    assert written == "{{ messages[0].content }}"


def test_an_origin_goes_on_through_every_command(imported, tmp_path):
    """By hand: training drops the source, upcycling also the family; quantising drops nothing."""
    whole = origin_of_run(imported)
    assert set(whole) == {"family", "source", "settings", "dtypes"}
    kept = {name: whole[name] for name in ("family", "settings", "dtypes")}
    twice = trained(trained(imported, tmp_path / "once"), tmp_path / "twice")
    assert origin_of_run(twice) == kept
    assert origin_of_run(made(imported, tmp_path / "small", "quantise")) == whole
    assert origin_of_run(made(twice, tmp_path / "small2", "quantise")) == kept
    merged = made(twice, tmp_path / "merged", "merge_adapters")
    assert origin_of_run(merged) == kept
    sparse = made(merged, tmp_path / "sparse", "upcycle")
    others = {name: whole[name] for name in ("settings", "dtypes")}
    assert origin_of_run(sparse) == others
    assert origin_of_run(trained(sparse, tmp_path / "on_it")) == others


def test_a_run_in_the_place_of_its_own_source_has_lost_it(imported, tmp_path, caplog):
    base = shutil.copytree(imported, tmp_path / "base")
    run = trained(base, tmp_path / "run")
    shutil.rmtree(base)
    run.rename(base)
    assert origin_of_run(base) == {}
    assert f"There is no {base} any more" in caplog.text


def test_what_was_made_needs_its_source_no_more_and_what_was_trained_says_so(
    imported, tmp_path, caplog
):
    run = trained(shutil.copytree(imported, tmp_path / "base"), tmp_path / "run")
    merged = made(run, tmp_path / "merged", "merge_adapters")
    shutil.rmtree(tmp_path / "base")
    assert origin_of_run(merged)["settings"]["eos_token_id"] == [257, 3] and not caplog.text
    assert origin_of_run(run) == {}
    assert f"There is no {tmp_path / 'base'} any more" in caplog.text


def test_a_fresh_vocabulary_has_ends_of_its_own(imported, tmp_path):
    config, state = load_run(imported)
    fresh = InitFrom(str(imported), fresh=("embedding", "head"))
    run = tmp_path / "run"
    config = dataclasses.replace(config, init_from=fresh)
    save_imported(run, config, state.params, state.model_state, {}, {})
    (run / IMPORTED_FILE).unlink()
    assert main(["convert", f"--workdir={run}", f"--to-hf={tmp_path / 'hf'}"]) == 0
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (256, 257)
    assert settings["max_position_embeddings"] == LENGTH


def test_a_run_without_an_import_has_the_ends_of_its_tokenizer(imported, tmp_path):
    config, state = load_run(imported)
    save_imported(tmp_path / "run", config, state.params, state.model_state, {}, {})
    (tmp_path / "run" / IMPORTED_FILE).unlink()
    assert main(["convert", f"--workdir={tmp_path / 'run'}", f"--to-hf={tmp_path / 'hf'}"]) == 0
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (256, 257)
    assert settings["dtype"] == "float32"
    assert {one.name for one in (tmp_path / "hf").iterdir()} >= {"tokenizer.json", *BESIDE}


@pytest.mark.parametrize("form", ["tokenizers", "sentencepiece", "tiktoken"])
def test_a_tokenizer_that_is_named_by_its_form_is_written(tmp_path, form):
    """A tokenizer given as KIND:PATH is found and written, like a bare path."""
    folder, target = tmp_path / "words", tmp_path / "hf"
    folder.mkdir()
    target.mkdir()
    (folder / "ranks").write_text("words")
    config = ExperimentConfig(data=DataConfig(tokenizer=f"{form}:{folder}/ranks"))
    write_tokenizer(config, tmp_path, target)
    assert (target / "ranks").read_text() == "words"


def test_a_tokenizer_that_is_gone_is_named(tmp_path, caplog):
    config = ExperimentConfig(data=DataConfig(tokenizer=f"tiktoken:{tmp_path}/ranks"))
    write_tokenizer(config, tmp_path, tmp_path)
    assert f"is not written: there is no {tmp_path}/ranks. Copy it to {tmp_path}." in caplog.text


def test_what_was_made_names_the_tokenizer_in_its_own_folder_by_its_form(imported, tmp_path):
    config, state = load_run(imported)
    data = dataclasses.replace(config.data, tokenizer=f"tokenizers:{config.data.tokenizer}")
    config = dataclasses.replace(config, data=data)
    save_made(imported, config, state, tmp_path / "made", {"made_by": "upcycle"})
    found = load_run(tmp_path / "made")[0].data.tokenizer
    assert found == f"tokenizers:{tmp_path}/made/tokenizer/tokenizer.json"
