"""Tokenizers: round trips and the bytes of each token."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from moe_jax.data import corpora, tokenizers, train_tokenizer

BYTE = tokenizers.ByteTokenizer()


@given(text=st.text())
def test_bytes_round_trip_any_text(text):
    ids = BYTE.encode(text)
    assert ids.dtype == np.uint16
    assert BYTE.decode(ids) == text
    assert BYTE.token_bytes_V[ids].sum() == len(text.encode())
    assert b"".join(map(BYTE.bytes_of, ids.tolist())) == text.encode()


def test_the_byte_vocabulary_is_specials_then_bytes_then_sentinels():
    assert (BYTE.pad_id, BYTE.bos_id, BYTE.eos_id) == (0, 1, 2)
    assert BYTE.encode("\0a").tolist() == [3, 3 + ord("a")]
    assert BYTE.vocab_size == 3 + 256 + BYTE.num_sentinels == 384
    assert BYTE.token_bytes_V.dtype == np.int32
    assert BYTE.token_bytes_V.tolist() == [0] * 3 + [1] * 256 + [0] * 125


def test_a_document_begins_with_bos_and_ends_with_eos():
    ids = BYTE.encode_document("ab")
    assert ids.tolist() == [BYTE.bos_id, *BYTE.encode("ab").tolist(), BYTE.eos_id]
    assert BYTE.decode(ids) == "ab"


def test_sentinels_and_specials_decode_to_nothing():
    assert BYTE.decode([0, 1, 2, 259, 383, 3 + ord("x")]) == "x"
    assert [BYTE.bytes_of(id_) for id_ in (0, 2, 3, 258, 259)] == [b"", b"", b"\0", b"\xff", b""]


def test_a_character_cut_in_two_decodes_to_the_replacement_character():
    assert BYTE.decode(BYTE.encode("aé")[:-1]) == "a\ufffd"


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"'byte', a \.model, .*: got 'bites'"):
        tokenizers.open_tokenizer("bites")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tokenizer") / "bpe.model")
    return train_tokenizer.train(
        corpora.EmbeddedCorpus(), path, vocab_size=1000, heldout_fraction=0.03, max_bytes=300_000
    )


@given(text=st.text())
@example("\u2581 \u2581\u2581a")
@example(" leading, trailing ")
@example("<s></s><unk><0x41>")
@example("\0\r\n\t")
def test_bpe_round_trips_any_text_and_counts_its_bytes(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.uint16
    assert bpe.decode(ids) == text
    assert bpe.token_bytes_V[ids].sum() == len(text.encode())
    assert b"".join(map(bpe.bytes_of, ids.tolist())) == text.encode()


def test_bpe_specials_are_as_in_the_byte_vocabulary(bpe):
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (BYTE.pad_id, BYTE.bos_id, BYTE.eos_id)
    assert bpe.vocab_size == 1000
    assert bpe.token_bytes_V.shape == (1000,)
    assert not bpe.token_bytes_V[:4].any()
    assert bpe.decode(bpe.encode_document("ab")) == "ab"


def test_bpe_needs_fewer_tokens_than_bytes(bpe):
    text = "It is a truth universally acknowledged, that a single man in possession"
    assert len(bpe.encode(text)) < 0.7 * len(text)


def test_a_sentencepiece_name_opens_the_file_and_its_fingerprint_follows_the_model(bpe, tmp_path):
    again = tokenizers.open_tokenizer(bpe.name)
    assert again.fingerprint() == bpe.fingerprint()
    assert np.array_equal(again.encode("some text"), bpe.encode("some text"))


def test_a_missing_model_file_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"none at '.*'.*moe_jax\.data\.train_tokenizer --out="):
        tokenizers.open_tokenizer(f"sentencepiece:{tmp_path}/none.model")


def train_foreign_model(path, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text of a few words\n"] * 100), model_prefix=path,
        vocab_size=300, hard_vocab_limit=False, model_type="bpe", minloglevel=2, **options,
    )  # fmt: skip
    return f"sentencepiece:{path}.model"


def test_a_model_that_loses_bytes_is_refused(tmp_path):
    name = train_foreign_model(str(tmp_path / "lossy"), byte_fallback=True)
    with pytest.raises(ValueError, match="must keep every byte"):
        tokenizers.open_tokenizer(name)


def test_a_model_without_a_bos_is_refused(tmp_path):
    name = train_foreign_model(str(tmp_path / "no_bos"), byte_fallback=True, bos_id=-1)
    with pytest.raises(ValueError, match="bos_id=-1"):
        tokenizers.open_tokenizer(name)
