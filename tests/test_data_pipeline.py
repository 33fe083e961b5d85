"""The pipeline: determinism, resumption, hosts, domain shares, held-out pass."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig
from moe_jax.data import corpora, open_data, pipeline, token_files, tokenizers
from moe_jax.data.documents import TRAIN
from moe_jax.data.windows import DomainTokens


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return DataConfig(
        corpus="embedded", sequence_length=64, cache_dir=str(tmp_path_factory.mktemp("cache"))
    )


def train_batches(config, **how):
    return pipeline.train_batches(open_data(config), **how)


def heldout_batches(config, **how):
    return pipeline.heldout_batches(open_data(config), **how)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_batch_has_the_documented_arrays(config):
    batch = next(train_batches(config, global_batch_size=8))
    types = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert types == {
        "inputs": ((8, 64), "int32"),
        "targets": ((8, 64), "int32"),
        "segment_ids": ((8, 64), "int32"),
        "positions": ((8, 64), "int32"),
        "loss_weights": ((8, 64), "float32"),
        "domain": ((8,), "int32"),
    }


def test_the_stream_is_a_function_of_the_config(config):
    first = take(train_batches(config, global_batch_size=8), 5)
    assert_equal(first, take(train_batches(config, global_batch_size=8), 5))
    reseeded = dataclasses.replace(config, seed=1)
    other = take(train_batches(reseeded, global_batch_size=8), 5)
    assert not np.array_equal(first[0]["inputs"], other[0]["inputs"])


@settings(max_examples=10)
@given(step=st.integers(0, 40))
def test_the_stream_resumes_exactly_at_any_step(config, step):
    whole = take(train_batches(config, global_batch_size=8), step + 3)
    resumed = take(train_batches(config, global_batch_size=8, start_step=step), 3)
    assert_equal(whole[step:], resumed)


def test_the_stream_resumes_exactly_after_many_epochs(config):
    few_windows = dataclasses.replace(config, domain_weights=(("multilingual", 1.0),))
    start = 10_000  # more than a hundred epochs of 3,978 windows
    first = take(train_batches(few_windows, global_batch_size=64, start_step=start), 3)
    later = train_batches(few_windows, global_batch_size=64, start_step=start + 2)
    assert_equal(first[2:], take(later, 1))


SHARES = [
    [range(16)],
    [range(8), range(8, 16)],
    [range(0, 16, 2), range(1, 16, 2)],
    [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]],
    [[0, 1, 2, 15], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]],
    [[0, 1, 8], [8, 9], [9]],  # some rows are read twice, others by nobody
]


@pytest.mark.parametrize("hosts", SHARES)
def test_each_host_has_its_rows_of_the_global_batch(config, hosts):
    whole = take(train_batches(config, global_batch_size=16, start_step=7), 3)
    for rows in hosts:
        read = take(train_batches(config, global_batch_size=16, rows=rows, start_step=7), 3)
        of_whole = [{name: array[list(rows)] for name, array in b.items()} for b in whole]
        assert_equal(read, of_whole)


def test_domain_shares_are_exact(config):
    weighted = dataclasses.replace(
        config, domain_weights=(("python", 5.0), ("prose", 3.0), ("drama", 2.0))
    )
    names = open_data(config).domains
    batches = take(train_batches(weighted, global_batch_size=100), 10)
    for batch in batches:
        counts = np.bincount(batch["domain"], minlength=len(names))
        assert dict(zip(names, counts, strict=True)) == {
            "prose": 30, "drama": 20, "folio1623": 0, "speech": 0, "python": 50, "multilingual": 0
        }  # fmt: skip


def test_domain_shares_default_to_the_tokens(config):
    batches = take(train_batches(config, global_batch_size=500), 4)
    counts = np.bincount(np.concatenate([batch["domain"] for batch in batches]), minlength=6)
    files = token_files.prepare_token_files(
        corpora.EmbeddedCorpus(), tokenizers.ByteTokenizer(),
        heldout_fraction=config.heldout_fraction, cache_dir=config.cache_dir,
    )  # fmt: skip
    tokens = np.array([files.counts["train"][domain].tokens for domain in files.domains])
    assert np.allclose(counts, 2000 * tokens / tokens.sum(), atol=6)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    length=st.integers(1, 200),
)
def test_a_mixture_gives_each_dataset_its_share_and_its_rows_in_order(weights, length):
    mixture = pipeline.DomainMixture(tuple(weights))
    rows = [mixture[index] for index in range(length)]
    for dataset, weight in enumerate(weights):
        keys = [key for chosen, key in rows if chosen == dataset]
        assert keys == list(range(len(keys)))
        assert abs(len(keys) - length * weight / sum(weights)) <= len(weights)


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(tmp_path):
    lines = [json.dumps({"id": str(i), "text": f"{i:06d}"}) for i in range(40)]
    (tmp_path / "only.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        corpus=f"jsonl:{tmp_path}", sequence_length=8, heldout_fraction=1e-9,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    # 40 documents of 8 tokens make 39 whole windows: the last window would lack its final target.
    windows = [
        tuple(batch["inputs"][0])
        for batch in take(train_batches(config, global_batch_size=1), 2 * 39)
    ]
    assert len(set(windows[:39])) == 39
    assert set(windows[:39]) == set(windows[39:])
    assert windows[:39] != windows[39:]


@pytest.mark.parametrize("hosts", [[range(24)], [range(h, 24, 4) for h in range(4)]])
def test_every_heldout_token_counts_once(config, hosts):
    tokenizer = tokenizers.ByteTokenizer()
    expected = np.zeros(tokenizer.vocab_size, int)
    corpus = corpora.EmbeddedCorpus()
    for domain in corpus.domains():
        for split, document in corpus.documents(domain, config.heldout_fraction):
            if split == "heldout":
                ids = tokenizer.encode_document(document.text)[1:]
                expected += np.bincount(ids, minlength=tokenizer.vocab_size)
    counted = np.zeros_like(expected)
    for rows in hosts:
        for batch in heldout_batches(config, batch_size=24, rows=rows):
            assert batch["inputs"].shape == (len(rows), 64)
            targets = batch["targets"][batch["loss_weights"] == 1]
            counted += np.bincount(targets, minlength=tokenizer.vocab_size)
    assert np.array_equal(counted, expected)


def test_the_last_heldout_batch_is_filled_up_with_rows_of_no_weight(config):
    *_, last = heldout_batches(config, batch_size=1000)
    rows = (last["segment_ids"] > 0).any(axis=1)
    assert 0 < rows.sum() < 1000
    assert not last["loss_weights"][~rows].any()
    assert not last["positions"][~rows].any()


def test_the_heldout_pass_is_the_same_whatever_the_seed_and_the_weights(config):
    changed = dataclasses.replace(config, seed=9, domain_weights=(("prose", 1.0),))
    assert_equal(
        list(heldout_batches(config, batch_size=32, max_batches=4)),
        list(heldout_batches(changed, batch_size=32, max_batches=4)),
    )


def test_a_shortened_heldout_pass_samples_all_domains_in_proportion(config):
    whole = np.concatenate(
        [
            batch["domain"][batch["segment_ids"][:, 0] > 0]
            for batch in heldout_batches(config, batch_size=50)
        ]
    )
    (first,) = heldout_batches(config, batch_size=200, max_batches=1)
    shares = np.bincount(whole, minlength=6) / len(whole)
    assert np.allclose(np.bincount(first["domain"], minlength=6), 200 * shares, atol=1.01)


def test_heldout_windows_are_ordered_by_their_place_in_their_domain():
    """Ties go by domain, in float64, as when Python sorts the pairs."""
    for lengths in ([], [0], [5], [3, 0, 7, 1], [6, 3, 12, 6], [1000, 998, 7, 1]):
        pairs = sorted(
            ((source, index) for source, length in enumerate(lengths) for index in range(length)),
            key=lambda pair: ((pair[1] + 0.5) / lengths[pair[0]], pair[0]),
        )
        starts = np.cumsum([0, *lengths])
        flat = [int(starts[source]) + index for source, index in pairs]
        assert pipeline._interleave(lengths).tolist() == flat


def test_heldout_windows_never_train(config):
    # Long windows: a phrase of 64 bytes can occur twice in a language.
    config = dataclasses.replace(config, sequence_length=256)
    train = {
        bytes(row)
        for batch in take(train_batches(config, global_batch_size=100), 205)
        for row in batch["inputs"]
    }
    heldout = [
        row
        for batch in heldout_batches(config, batch_size=100)
        for row, weights in zip(batch["inputs"], batch["loss_weights"], strict=True)
        if weights.all()
    ]
    assert len(train) > 19_900
    assert len(heldout) > 400
    assert not train & {bytes(row) for row in heldout}


def test_heldout_windows_are_nowhere_in_what_trains(config):
    """They occur at no offset of any domain's train tokens, except a licence in two files."""
    data = open_data(dataclasses.replace(config, sequence_length=256))

    def text(tokens):
        return tokens.astype("<u4").tobytes().decode("utf-32-le")

    train = [DomainTokens(data.files, TRAIN, domain) for domain in data.domains]
    trained = text(np.concatenate([tokens.read(0, tokens.num_tokens) for tokens in train]))
    heldout = [
        text(row)
        for batch in pipeline.heldout_batches(data, batch_size=100)
        for row in batch["inputs"][batch["segment_ids"].all(axis=1)]
    ]
    assert len(trained) > 5_000_000 and len(heldout) > 400
    at = trained.index(text(np.array(data.tokenizer.encode("SAM RUSHING DISCLAIMS"))))
    licence = trained[at - 700 : at + 700]
    assert not [row for row in heldout if row in trained and row not in licence]


@pytest.mark.parametrize("rows", [[], [9, 10], [-1, 0], [1, 0], [1, 1]])
def test_rows_that_a_batch_does_not_have_or_not_in_this_order_are_refused(config, rows):
    message = rf"rows={re.escape(str(rows))}, batch_size=10\. Pass some of 0 to 9"
    with pytest.raises(ValueError, match=message):
        train_batches(config, global_batch_size=10, rows=rows)
    with pytest.raises(ValueError, match=message):
        heldout_batches(config, batch_size=10, rows=rows)


def test_a_batch_of_no_rows_is_refused(config):
    with pytest.raises(ValueError, match="1 row or more: batch_size=0"):
        train_batches(config, global_batch_size=0)


def test_an_unknown_domain_is_refused(config):
    wrong = dataclasses.replace(config, domain_weights=(("pros", 1.0),))
    with pytest.raises(ValueError, match=r"'prose'.*got \['pros'\]"):
        train_batches(wrong, global_batch_size=8)


def test_a_domain_too_small_for_one_window_is_refused(config):
    long = dataclasses.replace(config, sequence_length=500_000)
    with pytest.raises(ValueError, match=r"\['multilingual'\] have fewer"):
        train_batches(long, global_batch_size=8)


def test_nothing_held_out_is_refused(config):
    nothing = dataclasses.replace(config, heldout_fraction=1e-9)
    with pytest.raises(
        ValueError, match=r"heldout_fraction=1e-09\. Set config\.data\.heldout_fraction="
    ):
        heldout_batches(nothing, batch_size=8)


def test_importing_the_package_imports_nothing_that_few_runs_need():
    heavy = {"tensorflow", "tensorflow_datasets", "pyarrow", "tokenizers", "tiktoken"}
    code = f"import sys, moe_jax.data; found = {heavy} & set(sys.modules); sys.exit(len(found))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
