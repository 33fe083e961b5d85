"""Windows: what they cut, and that they say where documents begin."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import corpora, objectives, token_files, tokenizers, windows

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


def make_windows(files, length, keep_partial):
    return windows.Windows(
        files, "train", "only", sequence_length=length, objective=objectives.causal_lm,
        pad_id=0, keep_partial=keep_partial,
    )  # fmt: skip


def test_a_window_is_cut_at_its_length_and_marks_documents(tmp_path):
    # The stream: bos a b c eos bos d eos, in windows of 3.
    source = make_windows(make_files(tmp_path, ["abc", "d"]), 3, keep_partial=False)
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
    partial = make_windows(files, 3, keep_partial=True)
    assert len(make_windows(files, 3, keep_partial=False)) == 2
    assert len(partial) == 3
    assert partial[2]["targets"].tolist() == [2, 0, 0]
    assert partial[2]["segment_ids"].tolist() == [1, 0, 0]


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    length=st.integers(2, 20),
)
def test_every_token_but_bos_is_a_weighted_target_once(tmp_path_factory, texts, length):
    files = make_files(tmp_path_factory.mktemp("corpus"), texts)
    stream = np.concatenate([TOKENIZER.encode_document(text) for text in texts])
    source = make_windows(files, length, keep_partial=True)
    targets = [
        example["targets"][example["loss_weights"] == 1]
        for example in map(source.__getitem__, range(len(source)))
    ]
    assert np.array_equal(np.concatenate(targets), stream[stream != TOKENIZER.bos_id])


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8),
    length=st.integers(2, 20),
)
def test_segments_and_positions_restart_exactly_at_bos(tmp_path_factory, texts, length):
    source = make_windows(make_files(tmp_path_factory.mktemp("corpus"), texts), length, True)
    for index in range(len(source)):
        raw = source.raw(index)
        begins = np.flatnonzero(raw.tokens[1:] == TOKENIZER.bos_id) + 1
        assert np.array_equal(np.flatnonzero(np.diff(raw.segment_ids)) + 1, begins)
        assert raw.segment_ids[0] == 1
        assert set(np.flatnonzero(raw.positions == 0)) == {0, *begins}
        assert set(np.diff(raw.segment_ids)) <= {0, 1}


def test_a_pickle_holds_paths_and_reopens_the_files(tmp_path):
    source = make_windows(make_files(tmp_path, ["a long document " * 5000]), 64, True)
    expected = source[7]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert all(np.array_equal(copy[7][name], value) for name, value in expected.items())


def test_indices_out_of_range_raise(tmp_path):
    source = make_windows(make_files(tmp_path, ["abc", "d"]), 3, keep_partial=False)
    for index in (-1, 2):
        with pytest.raises(IndexError, match="of 2"):
            source[index]


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    files = make_files(tmp_path, ["abc" * 4000])
    source = make_windows(files, 8, keep_partial=False)
    source[0]
    path = files.tokens_path("train", "only")
    path.chmod(0o644)
    os.truncate(path, 4096)
    source[100]
    with pytest.raises(OSError, match=r"only\.tokens\.npy was cut"):
        source[len(source) - 1]
