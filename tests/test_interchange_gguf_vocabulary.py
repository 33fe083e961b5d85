"""Tokenizers of GGUF files: llama.cpp and this library give a text the same ids."""

import dataclasses
import json

import jax
import pytest

from benchmarks.llama_cpp import LlamaCpp
from moe_jax.__main__ import main
from moe_jax.config import ExperimentConfig
from moe_jax.convert_tokenizer import words_of
from moe_jax.data.corpora import open_corpus
from moe_jax.data.objectives import CausalLM, Supervised
from moe_jax.data.tokenizers import open_tokenizer
from moe_jax.data.train_tokenizer import train
from moe_jax.interchange.gguf_files import GGUFFile
from moe_jax.interchange.gguf_vocabulary import PATTERNS, PLAIN, byte_letters, vocabulary
from moe_jax.interchange.gguf_write import to_gguf
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.parameters import init_parameters
from moe_jax.training.imported import save_imported

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
TEXT = (
    "It's what we'LL learn:  two spaces,\ttabs\r\n\r\n and   lines \n 1234567 x1y22 f(a,b)=c**2;"
    " don't caf\u00e9 na\u00efve \u00dcn\u00efC\u00f6de \u4e2d\u6587\u5b57 \u3042\u30a2"
    " e\u0301 \u2581 _under_score HTTPServer /path/to \U0001f41d\u00a0end...  "
)


@pytest.fixture(scope="module")
def model():
    """The smallest model of 512 ids."""
    config = ExperimentConfig(
        model=LanguageModel(
            vocab_size=512,
            model_dim=32,
            parts={
                "attention": Attention(num_heads=1),
                "mlp": Mlp(dim=32, activation=SwiGLU()),
            },
            stack=StackLayout(unit=(("attention", "mlp"),)),
            embedding_multiplier=1.0,
        )
    )
    return config, init_parameters(jax.random.key(0), config.model.specs())


def check_ids(model, tokenizer, folder, text=TEXT):
    """Checks that llama.cpp gives the text this library's ids, after the start of a document."""
    words = vocabulary(tokenizer.name, tokenizer.bos_id, tokenizer.eos_id, 512)
    assert len(words["tokenizer.ggml.tokens"]) == len(words["tokenizer.ggml.token_type"]) == 512
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
    to_gguf(*model, folder / "model.gguf", words)
    with LlamaCpp(folder / "model.gguf", 512) as theirs:
        found = theirs.encode(text)
    assert found == [tokenizer.bos_id, *tokenizer.encode(text).tolist()]


def test_bytes(model, tmp_path):
    every = "".join(map(chr, [*range(1, 0x180), 0x7FF, 0x800, 0xFFFD, 0x10000, 0x10FFFF]))
    check_ids(model, open_tokenizer("byte"), tmp_path, TEXT + every)


def test_letters_of_bytes_are_those_of_gpt2():
    assert sorted(byte_letters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert byte_letters()[ord("a")] == "a" and byte_letters()[ord(" ")] == "\u0120"


def bpe(folder, found):
    """A byte-level BPE with merges that splits texts by these patterns."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    kinds = tokenizers.pre_tokenizers
    splits = {
        "digits": kinds.Digits(individual_digits=True),
        "regex": kinds.ByteLevel(add_prefix_space=False),
    }
    parts = [
        splits.get(one) or kinds.Split(tokenizers.Regex(one), "isolated", invert=False)
        for one in found
    ]
    if "regex" not in found:
        parts.append(kinds.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = kinds.Sequence(parts)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=kinds.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return open_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("found", PATTERNS, ids=PATTERNS.get)
def test_byte_level_bpe(found, model, tmp_path):
    """In gpt-4o, llama.cpp handles no combining marks and no capitals beyond ASCII."""
    text = TEXT
    if PATTERNS[found] == "gpt-4o":
        text = TEXT.replace("\u00dcn\u00efC\u00f6de", "").replace("e\u0301", "")
    check_ids(model, bpe(tmp_path, found), tmp_path, text)


def fallback(folder, normalizers=(), pre_tokenizer=None):
    """A BPE with byte fallback and few merges, after these changes to the text."""
    letters = sorted({one for one in TEXT if one.isascii() and one.isalnum()})
    merges = [("\u2581", "a"), ("l", "e"), ("le", "a"), ("lea", "r"), ("i", "n"), ("a", "r")]
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *letters,
    ]
    words += ["".join(pair) for pair in merges]
    vocab = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = tokenizers.normalizers.Replace(" ", "\u2581")
    made.normalizer = tokenizers.normalizers.Sequence([*normalizers, replace])
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    replace, fallback = (
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
    )
    made.decoder = tokenizers.decoders.Sequence([replace, fallback, tokenizers.decoders.Fuse()])
    made.add_special_tokens(words[:3])
    made.save(str(folder / "tokenizer.json"))
    return open_tokenizer(str(folder / "tokenizer.json"))


def test_byte_fallback(model, tmp_path):
    """Spaces are U+2581. Characters without a token become bytes. Merges go by rank."""
    tokenizer = fallback(tmp_path)
    assert len(tokenizer.encode(" learn")) == 3  # " ", "lear" and "n"
    check_ids(model, tokenizer, tmp_path, TEXT.replace("\u2581", ""))


def test_sentencepiece(model, tmp_path):
    path = str(tmp_path / "bpe.model")
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT.replace("\r", "")] * 9))
    corpus = open_corpus(str(tmp_path / "text.txt"))
    tokenizer = train(corpus, path, vocab_size=400, heldout_fraction=0.1)
    check_ids(model, tokenizer, tmp_path, TEXT.replace("\u2581", ""))


def metaspace(scheme):
    return tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize(
    ("kind", "space"), [("prepend", True), ("always", True), ("first", False), ("none", False)]
)
def test_a_chat_has_the_ids_of_training(model, tmp_path, kind, space, begins):
    prepend = [tokenizers.normalizers.Prepend("\u2581")] if kind == "prepend" else []
    tokenizer = fallback(
        tmp_path, prepend, metaspace(kind) if kind in ("always", "first") else None
    )
    template = tmp_path / "own.jinja"
    turn = "{{ 'learn a' + eos_token + messages[0].content }}"
    template.write_text(("{{ bos_token }}" if begins else "{{ eos_token }}") + turn)
    objective = Supervised(chat_template=str(template))
    words = words_of(tmp_path, config_of(model, tokenizer, objective), 0)
    assert words["tokenizer.ggml.add_space_prefix"] is space
    assert words["tokenizer.ggml.add_bos_token"] is begins
    raw = words_of(tmp_path, config_of(model, tokenizer, CausalLM()), 0)
    assert raw["tokenizer.ggml.add_space_prefix"] is False
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
    ids, text = objective.prompt_ids(tokenizer, "a lear"), "learn a</s>a lear"
    to_gguf(*model, tmp_path / "model.gguf", words)
    with LlamaCpp(tmp_path / "model.gguf", 512) as theirs:
        text = text if begins else "</s>" + text
        asked = {"content": text, "add_special": True, "parse_special": True}
        assert theirs.ask([asked])[0]["tokens"] == ids


def config_of(model, tokenizer, objective):
    config, _ = model
    data = dataclasses.replace(config.data, tokenizer=tokenizer.name, objective=objective)
    return dataclasses.replace(config, data=data)


@pytest.mark.parametrize(
    ("origin", "as_file"),
    [({"family": "mixtral"}, True), ({"made_by": "upcycle"}, False), (None, False)],
)
def test_an_imported_model_has_the_ids_of_its_tokenizer(model, tmp_path, origin, as_file):
    """An imported tokenizer prepends a space and no bos; models trained here saw the opposite."""
    tokenizer = fallback(tmp_path, [tokenizers.normalizers.Prepend("\u2581")])
    if origin is not None:
        (tmp_path / "imported.json").write_text(json.dumps(origin))
    config = config_of(model, tokenizer, CausalLM())

    def said(step):
        words = words_of(tmp_path, config, step)
        return [words[f"tokenizer.ggml.add_{name}"] for name in ("space_prefix", "bos_token")]

    assert said(0) == [as_file, not as_file]
    assert said(1) == [False, True]
    if as_file:
        made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_id)]
        )
        made.save(str(tmp_path / "tokenizer.json"))
        assert said(0) == [True, True]
        (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
        assert said(0) == [True, False]


def test_what_is_beside_the_tokenizer(tmp_path):
    tokenizer = bpe(tmp_path, ("regex",))

    def read():
        return vocabulary(tokenizer.name, 0, 1, 512)

    assert read()["tokenizer.ggml.add_bos_token"] is True
    assert read()["tokenizer.chat_template"] == PLAIN
    said = {"add_bos_token": False, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert read()["tokenizer.ggml.add_bos_token"] is False
    assert read()["tokenizer.chat_template"] == "{{ messages }}"
    named = [
        {"name": "tools", "template": "{{ tools }}"},
        {"name": "default", "template": "{{ 1 }}"},
    ]
    for listed, template in ((named, "{{ 1 }}"), (named[:1], PLAIN)):
        said = {"add_bos_token": None, "chat_template": listed}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        assert read()["tokenizer.chat_template"] == template
        assert read()["tokenizer.ggml.add_bos_token"] is True


def test_what_llama_cpp_cannot_split_is_named(tmp_path):
    tokenizer = bpe(tmp_path, (r"\p{L}+|\P{L}+",))
    with pytest.raises(ValueError, match=r"pre_tokenizer of .* has .*P\{L\}"):
        vocabulary(tokenizer.name, 0, 1, 512)
    with pytest.raises(ValueError, match="tiktoken"):
        vocabulary("tiktoken:a.tiktoken", 0, 1, 512)
    with pytest.raises(ValueError, match="384 ids in byte, vocab_size=300"):
        vocabulary("byte", 1, 2, 300)


def test_the_command(model, tmp_path, capsys):
    """A run with its own chat template, and a tokenizer with fewer ids than the model."""
    (workdir := tmp_path / "run").mkdir()
    tokenizer, template = bpe(tmp_path, ("regex",)), tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    config, params = model
    objective = Supervised(chat_template=str(template))
    data = dataclasses.replace(config.data, tokenizer=tokenizer.name, objective=objective)
    config = dataclasses.replace(config, data=data)
    save_imported(workdir, config, params, {}, {}, {})
    command = ["convert", f"--workdir={workdir}", f"--to-gguf={tmp_path / 'model.gguf'}"]
    assert main([*command, "--format=Q8_0"]) == 0
    file = GGUFFile(tmp_path / "model.gguf")
    assert file.settings["general.architecture"] == "llama"
    assert file.settings["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    names = [f"[PAD{i}]" for i in range(tokenizer.vocab_size, 512)]
    assert file.settings["tokenizer.ggml.tokens"][tokenizer.vocab_size :] == names
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(command)
    error = capsys.readouterr().err
    assert "model.gguf is there already" in error and error.count("\n") == 1
