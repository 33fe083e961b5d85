"""Windows: where they cut, and how they mark the starts of documents."""

import itertools
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import corpora, objectives, packed_windows, token_files, tokenizers, windows

TOKENIZER = tokenizers.ByteTokenizer()


def make_files(directory, texts):
    directory.mkdir(exist_ok=True)
    lines = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts)]
    (directory / "only.jsonl").write_text("\n".join(lines))
    return token_files.prepare_token_files(
        corpora.open_corpus(f"jsonl:{directory}"),
        TOKENIZER,
        heldout_fraction=0.0,
        cache_dir=str(directory / "cache"),
    )


def domain_tokens(files):
    return windows.DomainTokens(files, "train", "only")


class Examples:
    """Windows of documents as examples of `causal_lm`."""

    def __init__(self, files, length, keep_partial):
        self.length = length
        self.windows = windows.DocumentWindows(
            domain_tokens(files), window=length + 1, keep_partial=keep_partial
        )

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return objectives.causal_lm(self.windows[index], sequence_length=self.length, pad_id=0)


def test_a_window_is_cut_at_its_length_and_marks_documents(tmp_path):
    # The stream is bos a b c eos bos d eos, in windows of 3.
    source = Examples(make_files(tmp_path, ["abc", "d"]), 3, keep_partial=False)
    a, b, c, d = TOKENIZER.encode("abcd").tolist()
    assert len(source) == 2
    assert source[0]["inputs"].tolist() == [1, a, b]
    assert source[0]["targets"].tolist() == [a, b, c]
    assert source[0]["positions"].tolist() == [0, 1, 2]
    assert source[1]["inputs"].tolist() == [c, 2, 1]
    assert source[1]["targets"].tolist() == [2, 1, d]
    assert source[1]["segment_ids"].tolist() == [1, 1, 2]
    assert source[1]["positions"].tolist() == [0, 1, 0]
    assert source[1]["loss_weights"].tolist() == [1, 0, 1]


def test_the_rest_is_dropped_in_training_and_kept_in_evaluation(tmp_path):
    files = make_files(tmp_path, ["abc", "d"])
    partial = Examples(files, 3, keep_partial=True)
    assert len(Examples(files, 3, keep_partial=False)) == 2
    assert len(partial) == 3
    assert partial[2]["targets"].tolist() == [2, 0, 0]
    assert partial[2]["segment_ids"].tolist() == [1, 0, 0]


@settings(max_examples=25)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    length=st.integers(2, 20),
)
def test_every_token_but_bos_is_a_weighted_target_once(tmp_path_factory, texts, length):
    files = make_files(tmp_path_factory.mktemp("corpus"), texts)
    stream = np.concatenate([TOKENIZER.encode_document(text) for text in texts])
    source = Examples(files, length, keep_partial=True)
    targets = [
        example["targets"][example["loss_weights"] == 1]
        for example in map(source.__getitem__, range(len(source)))
    ]
    assert np.array_equal(np.concatenate(targets), stream[stream != TOKENIZER.bos_id])


@settings(max_examples=25)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    length=st.integers(2, 20),
)
def test_segments_and_positions_restart_exactly_at_bos(tmp_path_factory, texts, length):
    source = Examples(make_files(tmp_path_factory.mktemp("corpus"), texts), length, True)
    for index in range(len(source)):
        raw = source.windows[index]
        begins = np.flatnonzero(raw.tokens[1:] == TOKENIZER.bos_id) + 1
        assert np.array_equal(np.flatnonzero(np.diff(raw.segment_ids)) + 1, begins)
        assert raw.segment_ids[0] == 1
        assert set(np.flatnonzero(raw.positions == 0)) == {0, *begins}
        assert set(np.diff(raw.segment_ids)) <= {0, 1}


def test_a_pickle_holds_paths_and_reopens_the_files(tmp_path):
    source = Examples(make_files(tmp_path, ["a long document " * 5000]), 64, keep_partial=True)
    expected = source[7]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert all(np.array_equal(copy[7][name], value) for name, value in expected.items())


def test_indices_out_of_range_raise(tmp_path):
    source = Examples(make_files(tmp_path, ["abc", "d"]), 3, keep_partial=False)
    for index in (-1, 2):
        with pytest.raises(IndexError, match="of 2"):
            source[index]


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    files = make_files(tmp_path, ["abc" * 4000])
    source = Examples(files, 8, keep_partial=False)
    source[0]
    path = files.tokens_path("train", "only")
    path.chmod(0o644)
    os.truncate(path, 4096)
    source[100]
    with pytest.raises(OSError, match=r"only\.tokens\.npy was cut"):
        source[len(source) - 1]


TEXTS = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8)


def text_of(raw):
    return raw.tokens.tolist()


def test_joined_text_has_nothing_between_documents(tmp_path):
    files = make_files(tmp_path, ["abc", "d", "ef"])
    a, b, c, d, e, f = TOKENIZER.encode("abcdef").tolist()
    whole = windows.JoinedText(domain_tokens(files), window=4, keep_partial=False)
    assert [text_of(raw) for raw in map(whole.read, range(len(whole)))] == [[a, b, c, d]]
    rest = windows.JoinedText(domain_tokens(files), window=4, keep_partial=True)[1]
    assert text_of(rest) == [e, f]
    assert rest.segment_ids.tolist() == [1, 1] and rest.positions.tolist() == [0, 1]


@settings(max_examples=25)
@given(texts=TEXTS, window=st.integers(1, 20))
def test_joined_text_is_every_byte_of_every_document_once(tmp_path_factory, texts, window):
    files = make_files(tmp_path_factory.mktemp("corpus"), texts)
    source = windows.JoinedText(domain_tokens(files), window=window, keep_partial=True)
    read = np.concatenate([source[index].tokens for index in range(len(source))])
    assert np.array_equal(read, np.concatenate([TOKENIZER.encode(text) for text in texts]))


def test_short_documents_share_a_row_and_long_ones_fill_rows_of_their_own(tmp_path):
    files = make_files(tmp_path, ["abcd", "ef", "ghijk", "l", "mn"])
    source = packed_windows.PackedText(
        domain_tokens(files), window=4, limits=(6, 100), pair_lengths=lambda size: (size + 1, 1)
    )
    rows = [
        [
            TOKENIZER.decode(raw.tokens[raw.segment_ids == n])
            for n in range(1, raw.segment_ids[-1] + 1)
        ]
        for raw in map(source.read, range(len(source)))
    ]
    # "k" and "l" have one token and are left out. "ef" and "mn" take 3 + 3 of a row's 6 tokens.
    assert rows == [["abcd"], ["ghij"], ["ef", "mn"]]
    assert source[2].positions.tolist() == [0, 1, 0, 1]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), max_size=40),
)
def test_a_row_is_as_full_as_its_fuller_side_allows(sizes):
    sizes_C2 = np.array(sizes, int).reshape(-1, 2)
    firsts = packed_windows.pack_rows(sizes_C2, (5, 7))
    assert firsts[0] == 0 and firsts[-1] == len(sizes)
    for first, following in itertools.pairwise(firsts):
        used = sizes_C2[first:following].sum(axis=0)
        assert following > first and (used <= (5, 7)).all()
        if following < len(sizes):
            assert (used + sizes_C2[following] > (5, 7)).any()


def test_a_pickle_of_packed_rows_reads_the_same(tmp_path):
    files = make_files(tmp_path, ["some text", "and more", "of it"])
    source = packed_windows.PackedText(
        domain_tokens(files), window=8, limits=(16, 16), pair_lengths=lambda size: (size, size)
    )
    copy = pickle.loads(pickle.dumps(source))
    assert [text_of(copy[i]) for i in range(len(copy))] == [
        text_of(source[i]) for i in range(len(source))
    ]
