"""Tokenizers from Hugging Face and tiktoken files: exact bytes, document ends, bad files."""

import base64
import json
import logging
import pathlib
import re

import numpy as np
import pytest
import tokenizers as hugging_face
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moe_jax.config import DataConfig
from moe_jax.data import check_data, corpora, hugging_face_tokenizer, open_data, train_batches
from moe_jax.data.tokenizers import open_tokenizer

logging.getLogger("tokenizers").setLevel(logging.ERROR)
NASTY = (
    "\u2581 \u2581\u2581a", " leading, trailing ", "<s></s><unk><0x41><|endoftext|>", "\0\r\n\t",
    "e\u0301 \ufb01 \uff21 \U0001f41d\U0001f468\u200d\U0001f469", "a" * 300, "\u202e\ufeff\ufffd",
)  # fmt: skip


def texts():
    corpus = corpora.EmbeddedCorpus()
    for domain in ("prose", "multilingual"):
        for _, document in list(corpus.documents(domain, 0.03))[:8]:
            yield document.text[:20_000]


def byte_level(path, special_tokens=("<|endoftext|>",), vocab_size=600):
    """Like GPT-2 and Qwen, plus a normaliser, a template and a truncation."""
    tokenizer = hugging_face.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special_tokens[0]} $A", special_tokens=[(special_tokens[0], 0)]
        )
    tokenizer.enable_truncation(5)
    tokenizer.save(str(path))
    return str(path)


def byte_fallback(path):
    """Like Llama 2 and Mistral: spaces as U+2581, one prepended, bytes as <0x00>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ("\u2581", "t", "h", "e", "\u2581t", "he", "\u2581the"):
        vocab[piece] = len(vocab)
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    tokenizer = hugging_face.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))
    return str(path)


def ranks_of(path):
    """The ranks of a byte-level BPE, as a .tiktoken file."""
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    pieces = sorted((t for t in vocab if t != "<|endoftext|>"), key=vocab.get)
    # Bytes first, then merges in order.
    pieces.sort(key=lambda t: len(t) > 1)
    lines = [
        f"{base64.b64encode(hugging_face_tokenizer._byte_level(p)).decode()} {rank}\n"
        for rank, p in enumerate(pieces)
    ]
    target = path.with_suffix(".tiktoken")
    target.write_text("".join(lines))
    return str(target)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {"byte level": byte_level(folder / "gpt2.json")}
    found["byte fallback"] = byte_fallback(folder / "llama2.json")
    found["tiktoken"] = ranks_of(folder / "gpt2.json")
    return found


@pytest.fixture(scope="module")
def opened(files):
    return {kind: open_tokenizer(path) for kind, path in files.items()}


KINDS = ("byte level", "byte fallback", "tiktoken")


def test_added_tokens_of_spaces_are_spaces(files, tmp_path):
    """Gemma lists its runs of spaces as added tokens that are not special."""
    spec = json.loads(pathlib.Path(files["byte fallback"]).read_text())
    vocab = spec["model"]["vocab"]
    added = {}
    for token in ("\u2581\u2581", "\n"):
        added[token] = vocab[token] = len(vocab)
        spec["added_tokens"].append(
            {"id": vocab[token], "content": token, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": False}
        )  # fmt: skip
    spec["model"]["merges"].append(["\u2581", "\u2581"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "the   the\n\u2581\u2581 the"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
    assert ids.tolist().count(added["\u2581\u2581"]) == ids.tolist().count(added["\n"]) == 1


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text())
@example("".join(NASTY))
def test_any_text_survives_and_its_tokens_count_its_bytes(opened, kind, text):
    tokenizer = opened[kind]
    for part in (text, *NASTY):
        ids = tokenizer.encode(part)
        assert ids.dtype == np.uint16 and tokenizer.decode(ids) == part
        assert tokenizer.token_bytes_V[ids].sum() == len(part.encode())
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_ends_of_documents_stand_for_no_byte(opened, kind):
    tokenizer = opened[kind]
    ids = tokenizer.encode_document("the end")
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.token_bytes_V.shape == (tokenizer.vocab_size,)
    assert (tokenizer.bos_id == tokenizer.eos_id) == (kind != "byte fallback")


def test_ids_are_those_of_the_packages(files, opened):
    text = "It is a truth universally acknowledged,\n\n  that"
    theirs = hugging_face.Tokenizer.from_file(files["byte level"])
    theirs.no_truncation()
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert opened["byte level"].encode(text).tolist() == expected
    assert len(expected) < 0.7 * len(text)
    assert opened["byte fallback"].encode("the the").tolist() == [
        *opened["byte fallback"].encode("the").tolist(), 265
    ]  # fmt: skip


def test_an_added_token_that_is_no_special_one_is_text(files, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(pathlib.Path(files["byte level"]).read_bytes())
    theirs = hugging_face.Tokenizer.from_file(str(path))
    theirs.add_tokens(["[caf\u00e9]"])
    theirs.save(str(path))
    tokenizer = open_tokenizer(str(path))
    ids = tokenizer.encode("a [caf\u00e9] b")
    assert tokenizer.vocab_size - 1 in ids.tolist()
    assert tokenizer.decode(ids) == "a [caf\u00e9] b" and tokenizer.token_bytes_V[ids].sum() == 11


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_an_added_token_that_takes_spaces_is_special(files, tmp_path, side):
    """Like `</s>` of Phi-3.5, which is not declared as special."""
    theirs = hugging_face.Tokenizer.from_file(files["byte level"])
    theirs.add_tokens([hugging_face.AddedToken("</s>", **{side: True})])
    theirs.save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer(str(tmp_path / "t.json"))
    text, name = "a  </s>  b", tokenizer.vocab_size - 1
    ids = tokenizer.encode(text)
    assert name not in ids.tolist() and tokenizer.decode(ids) == text
    assert tokenizer.token_bytes_V[ids].sum() == len(text) and tokenizer.bytes_of(name) == b""
    rendered = tokenizer.encode_rendered(text).tolist()
    assert rendered == theirs.encode(text, add_special_tokens=False).ids and name in rendered
    # It marks no document boundary, despite its name.
    assert tokenizer.eos_id == tokenizer.special_tokens["<|endoftext|>"]


def test_a_tokenizer_without_special_tokens_gets_one_as_the_error_says(tmp_path):
    path = byte_level(tmp_path / "none.json", special_tokens=())
    with pytest.raises(ValueError, match=r"none\.json has no special token\. Add one") as refused:
        open_tokenizer(path)
    command = re.search(r'python -c "(.*)"\.$', str(refused.value))[1]
    exec(command, {})
    tokenizer = open_tokenizer(path)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.vocab_size - 1


def test_a_long_text_is_cut_after_lines(opened, monkeypatch):
    text = "some words\n" * 30
    whole = opened["byte level"].encode(text)
    monkeypatch.setattr(hugging_face_tokenizer, "_PIECE", 25)
    pieces = list(hugging_face_tokenizer.pieces_of(text + "x" * 60))
    assert "".join(pieces) == text + "x" * 60 and max(map(len, pieces)) <= 25
    np.testing.assert_array_equal(opened["byte level"].encode(text), whole)


def test_begin_and_end_may_be_named(tmp_path):
    path = byte_level(tmp_path / "t.json", ("[A]", "[B]"))
    with pytest.raises(ValueError, match=r"has none of .*config\.data\.bos_token.*\['\[A\]', '\[B"):
        open_tokenizer(path)
    tokenizer = open_tokenizer(path, "[B]", "[A]")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    assert open_tokenizer(path, "[A]", "[B]").fingerprint() != tokenizer.fingerprint()
    with pytest.raises(ValueError, match=r"data\.eos_token .* has no '\[C\]'"):
        open_tokenizer(path, "[A]", "[C]")
    with pytest.raises(ValueError, match="byte tokenizer has a bos and an eos of its own"):
        open_tokenizer("bytes", "[A]")


def test_names_with_a_kind_open_any_file(files, tmp_path):
    (tmp_path / "gpt2").write_bytes(pathlib.Path(files["tiktoken"]).read_bytes())
    named = open_tokenizer(f"tiktoken:{tmp_path}/gpt2")
    assert named.fingerprint() == open_tokenizer(files["tiktoken"]).fingerprint()


def lowercase(path):
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | {"normalizer": {"type": "Lowercase"}}))


def without_a_byte(path):
    spec = json.loads(path.read_text())
    del spec["model"]["vocab"]["a"]
    spec["model"]["merges"] = []
    spec["model"]["vocab"] = {
        t: i for t, i in spec["model"]["vocab"].items() if len(t) == 1 or "|" in t
    }
    path.write_text(json.dumps(spec))


def without_vocabulary(path):
    path.write_text(json.dumps({"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}))


def word_piece(path):
    hugging_face.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lowercase, r"must keep every byte .* turns 'Ab' into 'ab'"),
        (without_a_byte, r"token for every byte that text is made of: .* has none for \[b'a'\]"),
        (word_piece, r"is a WordPiece with the decoder \[\]"),
        (lambda path: path.write_text(path.read_text()[:-9]), r"json, \d+ bytes, is cut short or"),
        (without_vocabulary, "is cut short or something else"),
        (lambda path: path.write_text("[]"), "it has no model"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_serve_is_refused(files, tmp_path, change, message):
    path = tmp_path / "t.json"
    path.write_bytes(pathlib.Path(files["byte level"]).read_bytes())
    change(path)
    with pytest.raises(ValueError, match=message) as refused:
        open_tokenizer(str(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_tokenizer_may_lack_control_characters_but_no_text_loses_any(files, tmp_path):
    path = tmp_path / "t.json"
    spec = json.loads(pathlib.Path(files["byte level"]).read_text())
    del spec["model"]["vocab"]["\u0104"]  # byte 4 in byte-level BPE
    path.write_text(json.dumps(spec))
    tokenizer = open_tokenizer(str(path))
    assert tokenizer.decode(tokenizer.encode("plain\ntext")) == "plain\ntext"
    with pytest.raises(ValueError, match=r"tokens for: .* has none for \[b'\\x04'\]"):
        tokenizer.encode("end\x04")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"


@pytest.mark.parametrize("name", ["bpe.model", "tokenizer.json", "gpt2.tiktoken"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LFS, r"is a Git LFS pointer\. Run `git lfs pull`"),
        (b"", "is empty"),
        (None, "there is none at"),
        ("folder", "is a folder"),
        (b"\x0a\x0bnot at all", "cut short"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as refused:
        open_tokenizer(str(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_cut_or_misnamed_tiktoken_file_is_refused(files, tmp_path):
    data = pathlib.Path(files["tiktoken"]).read_bytes()
    path = tmp_path / "cut.tiktoken"
    path.write_bytes(data[:-6])
    with pytest.raises(ValueError, match=r"cut\.tiktoken line \d+ is '.*', so that it is cut"):
        open_tokenizer(str(path))
    path.write_bytes(b"".join(data.splitlines(keepends=True)[5:]))
    with pytest.raises(ValueError, match="lacks 5 bytes"):
        open_tokenizer(str(path))
    (tmp_path / "llama3.model").write_bytes(data)
    with pytest.raises(ValueError, match=r"tiktoken file: set config\.data\.tokenizer=tiktoken:"):
        open_tokenizer(f"{tmp_path}/llama3.model")


def test_a_vocabulary_beyond_65536_trains(tmp_path):
    """Ranks go up to 70,000, and no text needs most of them."""
    pieces = [bytes([b]) for b in range(256)]
    pieces += [f"{i:06d}".encode() for i in range(70_000 - 256)]
    lines = (f"{base64.b64encode(p).decode()} {rank}\n" for rank, p in enumerate(pieces))
    path = tmp_path / "large.tiktoken"
    path.write_text("".join(lines))
    (tmp_path / "book.txt").write_text("A line of a book.\n" * 200)
    config = DataConfig(
        corpus=f"{tmp_path}/book.txt", tokenizer=str(path), sequence_length=32,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data = open_data(config)
    check_data(data)
    assert data.files.dtype == np.uint32 and data.tokenizer.vocab_size == 70_001
    batch = next(train_batches(data, global_batch_size=4))
    assert batch["inputs"].dtype == np.int32
    assert 70_000 in next(iter(train_batches(data, global_batch_size=200)))["inputs"]
