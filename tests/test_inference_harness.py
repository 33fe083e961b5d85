"""Models for lm-evaluation-harness: its requests, and its results with transformers."""

import json
import pathlib
import types

import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.config import MeshConfig
from moe_jax.inference import harness
from moe_jax.inference.harness import HarnessModel, register, settings_of
from moe_jax.inference.writer import Piece
from moe_jax.training.imported import save_imported
from tests.hf_families import CASES, Case, write_model
from tests.tiny_run import tiny_config, tiny_state

ROOT = pathlib.Path(__file__).parent.parent
TASKS = ("moe_jax_choices", "moe_jax_rolling", "moe_jax_continue")


def requests(*arguments):
    return [types.SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with a context of sixteen tokens and one byte per token."""
    workdir = tmp_path_factory.mktemp("harness")
    config = tiny_config({"model": {"stack": {"repeats": 1}, "tie_embeddings": False}})
    save_imported(workdir, config, tiny_state(config).params, {}, {}, {})
    return HarnessModel(str(workdir), batch_size=1)


def test_a_rolling_text_is_the_sum_of_its_windows(model):
    """24 bytes: the first 16, then the other 8 after their context. Each is scored once."""
    text = "It was the best of times"
    assert len(text) == 24 and model.max_length == 16
    [rolled, none] = model.loglikelihood_rolling(requests((text,), ("",)))
    [(first, _)] = model.loglikelihood(requests(("", text[:16])))
    ids = model.tokenizer.encode(text).tolist()
    [rest] = model.score([(ids[7:16], ids[16:])])
    np.testing.assert_allclose(rolled, first + rest.log_likelihood, rtol=1e-6)
    assert none == 0


def test_a_text_begins_with_bos_or_does_not(model, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "score", lambda pairs: seen.extend(pairs) or [])
    a, b = model.tokenizer.encode("ab").tolist()
    model.loglikelihood(requests(("a", "b"), ("", "b")))
    monkeypatch.setattr(model, "add_bos", False)
    model.loglikelihood(requests(("a", "b"), ("", "b")))
    assert seen == [([1, a], [b]), ([1], [b]), ([a], [b]), ([1], [b])]


def test_an_encoder_reads_the_context_and_the_end_of_a_document(model, monkeypatch):
    """As in the harness's model `hf`: two texts, the first of which ends with eos."""
    seen = []
    monkeypatch.setattr(model, "has_encoder", True)
    monkeypatch.setattr(model, "score", lambda pairs: seen.extend(pairs) or [])
    a, b, space = model.tokenizer.encode("ab ").tolist()
    model.loglikelihood(requests(("a", " b"), ("a ", "b"), ("", "b")))
    eos = model.tokenizer.eos_id
    assert seen == [([a, eos], [space, b]), ([a, eos], [space, b]), ([eos], [b])]
    assert model.encode("ab") == [a, b, eos]
    with pytest.raises(
        ValueError, match=r"only a decoder can score a text without context: .*perplexity"
    ):
        model.loglikelihood_rolling(requests(("ab",)))


def test_texts_are_continued_by_the_settings_of_their_task(model, monkeypatch):
    """Requests with equal settings share a call. Long prompts are cut, stop strings hidden."""
    calls = []

    def stream(config, params, prompts, num_tokens, **settings):
        calls.append((prompts, num_tokens, settings))
        for row, _ in enumerate(prompts):
            ids = model.tokenizer.encode("x\n\ny").tolist()
            yield Piece(row, ids, False)

    monkeypatch.setattr("moe_jax.inference.text.stream_tokens", stream)
    ends = (model.tokenizer.eos_id, 7)  # a generation_config.json may name the second id
    monkeypatch.setattr(type(model.tokenizer), "end_ids", ends)
    greedy, drawn = {"until": "\n\n", "max_gen_toks": 6}, {"do_sample": True, "temperature": 0.5}
    drawn |= {"max_new_tokens": 4, "top_p": 0.9}
    asked = requests(("a" * 30, greedy), ("b", drawn), ("c", greedy))
    assert model.generate_until(asked) == ["x", "x\n\ny", "x"]
    (first, six, how), (second, four, other) = calls
    assert [len(prompt) for prompt in first] == [10, 2] and six == 6, "ten and six are sixteen"
    assert second == [[1, *model.tokenizer.encode("b")]] and four == 4
    assert how["temperature"] == 0 and how["stop_tokens"] == ends
    assert (other["temperature"], other["top_p"]) == (0.5, 0.9)


def test_a_text_with_its_stop_string_is_not_decoded_any_further(model, monkeypatch):
    seen = []

    def stream(config, params, prompts, num_tokens, *, ended, **settings):
        for text in ("x", "\n\n", "y"):
            for row in {0, 1} - ended:
                seen.append((row, text))
                ids = model.tokenizer.encode(text if row == 0 else "z").tolist()
                yield Piece(row, ids, False)

    monkeypatch.setattr("moe_jax.inference.text.stream_tokens", stream)
    settings = {"until": "\n\n", "max_gen_toks": 6}
    assert model.generate_until(requests(("a", settings), ("b", settings))) == ["x", "zzz"]
    assert [text for row, text in seen if row == 0] == ["x", "\n\n"]


def test_settings_of_a_task_that_are_not_known_are_refused(model):
    assert settings_of({}) == (256, [], {"temperature": 0.0})
    for given, temperature in (
        ({"temperature": 0.7}, 0.7), ({"temperature": 0.7, "do_sample": True}, 0.7),
        ({"temperature": 0.7, "do_sample": False}, 0.0), ({"do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0), ({"do_sample": None, "temperature": 0.7}, 0.7),
    ):  # fmt: skip
        assert settings_of(given)[2] == {"temperature": temperature}, f"as the harness: {given}"
    with pytest.raises(ValueError, match=r"got {'num_beams': 2}\. Leave these out"):
        settings_of({"num_beams": 2})
    with pytest.raises(ValueError, match=r"max_gen_toks=256, context=16\. Lower it"):
        model.generate_until(requests(("a", {})))


def test_devices_are_named_where_commas_separate_arguments(monkeypatch):
    seen = []

    def load(workdir, mesh, step, trust):
        seen.append(mesh)
        raise InterruptedError

    monkeypatch.setattr(harness, "load_run", load)
    for mesh in ("fsdp=-1", "data=2:fsdp=-1", MeshConfig(data=2), None):
        with pytest.raises(InterruptedError):
            HarnessModel("run", mesh=mesh)
    assert seen == [
        MeshConfig(data=1, fsdp=-1),
        MeshConfig(data=2, fsdp=-1),
        MeshConfig(data=2),
        None,
    ]
    with pytest.raises(
        ValueError, match=r"mesh must be NAME=SIZE:NAME=SIZE: got 'fsdp' in mesh=fsdp\."
    ):
        HarnessModel("run", mesh="fsdp")


def write_hugging_face(directory):
    """Writes a tiny Mixtral with its own byte-level tokenizer, which prepends nothing."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    end = "<|endoftext|>"
    settings = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    case = Case({**CASES["mixtral"].settings, **settings}, scale=3.0)
    write_model(directory, case)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    (directory / "tokenizer_config.json").write_text(json.dumps({**named, "pad_token": end}))
    return directory


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_finds_what_it_finds_with_transformers(tmp_path, monkeypatch):
    """Compares choices, rolling texts beyond the context, and greedy texts with its model `hf`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    lm_eval = pytest.importorskip("lm_eval")
    for needed in ("torch", "transformers", "accelerate", "peft"):
        pytest.importorskip(needed)
    from lm_eval.tasks import TaskManager

    register()
    hf, run = write_hugging_face(tmp_path / "hf"), tmp_path / "run"
    assert main(["convert", f"--from-hf={hf}", f"--workdir={run}"]) == 0
    tasks = TaskManager(include_path=str(ROOT / "tests/lm_eval_tasks"), include_defaults=False)
    how = {"tasks": list(TASKS), "task_manager": tasks, "batch_size": 3, "bootstrap_iters": 0}
    ours = {"workdir": str(run), "context": 24, "add_bos": False}
    theirs = {"pretrained": str(hf), "max_length": 24, "device": "cpu", "dtype": "float32"}
    found = [
        lm_eval.simple_evaluate(model=model, model_args=arguments, **how)
        for model, arguments in (("moe_jax", ours), ("hf", theirs))
    ]
    for task in TASKS:
        ours, theirs = (
            [sample["filtered_resps"] for sample in sorted(one["samples"][task], key=doc_id)]
            for one in found
        )
        assert len(ours) == 4
        for mine, other in zip(ours, theirs, strict=True):
            if task == "moe_jax_continue":
                assert mine == other
            else:
                np.testing.assert_allclose(
                    np.array(mine, np.float64), np.array(other, np.float64), rtol=1e-5
                )
        for name, value in found[1]["results"][task].items():
            if isinstance(value, float):
                np.testing.assert_allclose(found[0]["results"][task][name], value, rtol=1e-5)
    assert found[0]["config"]["mark"] == "" and found[0]["config"]["routing"] == "dropless"


def doc_id(sample):
    return sample["doc_id"]
