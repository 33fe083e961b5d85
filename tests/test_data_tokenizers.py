"""Tokenizers: round trips and the bytes that tokens stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data import tokenizers

BYTE = tokenizers.ByteTokenizer()


@given(text=st.text())
def test_bytes_round_trip_any_text(text):
    ids = BYTE.encode(text)
    assert ids.dtype == np.uint16
    assert BYTE.decode(ids) == text
    assert BYTE.token_bytes_V[ids].sum() == len(text.encode())


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


def test_a_character_cut_in_two_decodes_to_the_replacement_character():
    assert BYTE.decode(BYTE.encode("aé")[:-1]) == "a\ufffd"


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="'byte' or 'sentencepiece:PATH': got 'bytes'"):
        tokenizers.open_tokenizer("bytes")
