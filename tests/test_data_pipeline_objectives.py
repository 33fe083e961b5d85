"""Batches of every objective: exact resumption, hosts, epochs, the held-out pass, processes."""

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.data import open_data, pipeline, tokenizers
from moe_jax.data.objectives import EncoderPrefixLM, PrefixLM, SpanCorruption

OBJECTIVES = {
    **{kind: load_kind("objective", kind)() for kind in KINDS["objective"]},
    "prefix_lm_bidirectional": PrefixLM(bidirectional=True),
    "span_corruption_packed": SpanCorruption(packed=True),
    "encoder_prefix_lm_joined": EncoderPrefixLM(packed=False),
}
# The `digest` of the first batches.
DRAWN = {
    "causal_lm": "84064859ca086d46",
    "prefix_lm": "2365c45f9168772d",
    "prefix_lm_bidirectional": "5d8f02133958cd85",
    "span_corruption": "70539fc40d601a00",
    "encoder_prefix_lm": "4f68d48fadc969fb",
    "supervised": "72fc5063cecd5281",
    "encoder_supervised": "55378d68bcf3a43a",
    "span_corruption_packed": "3177673e585fdaa7",
    "encoder_prefix_lm_joined": "5f27a155df61e7e5",
}
TOKENIZER = tokenizers.ByteTokenizer()
FIRST = 383  # the first sentinel


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """800 prompts with answers, in two domains."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, sign in (("plus", 1), ("minus", -1)):
        lines = [
            json.dumps({"prompt": f"{i} {name} {i % 7} = ", "answer": f"{i + sign * (i % 7)}"})
            for i in range(400)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(scope="module", params=OBJECTIVES)
def config(request, tmp_path_factory, pairs):
    objective = OBJECTIVES[request.param]
    corpus = {"corpus": pairs, "heldout_fraction": 0.3} if objective.reads_conversations else {}
    return DataConfig(
        sequence_length=64, objective=objective,
        cache_dir=str(tmp_path_factory.getbasetemp() / "objectives_cache"), **corpus,
    )  # fmt: skip


def train_batches(config, count, **how):
    how = {"global_batch_size": 8, **how}
    return list(itertools.islice(pipeline.train_batches(open_data(config), **how), count))


def heldout_batches(config, **how):
    return list(pipeline.heldout_batches(open_data(config), **how))


def equal(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_batches_have_the_listed_arrays(config):
    (batch,) = train_batches(config, 1)
    listed = {name: ((8, *s), t) for name, (s, t) in config.objective.arrays(64).items()}
    listed["domain"] = ((8,), np.int32)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == listed


def test_a_resumed_run_sees_the_same_examples(config):
    whole = train_batches(config, 7)
    resumed = train_batches(config, 3, start_step=4)
    assert all(map(equal, whole[4:], resumed))
    other = train_batches(dataclasses.replace(config, seed=1), 1)
    assert not equal(whole[0], other[0])


def test_two_hosts_hold_the_batch_of_one(config):
    whole = train_batches(config, 2, start_step=5)
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        read = train_batches(config, 2, start_step=5, rows=rows)
        assert all(map(equal, [{n: b[n][rows] for n in b} for b in whole], read))


def test_the_heldout_pass_is_the_same_for_every_seed_and_batch_size_on_all_hosts(config):
    whole = joined(heldout_batches(config, batch_size=12, max_batches=4))
    reseeded = dataclasses.replace(config, seed=9)
    assert equal(whole, joined(heldout_batches(reseeded, batch_size=24, max_batches=2)))
    hosts = [
        heldout_batches(config, batch_size=12, max_batches=4, rows=range(first, first + 6))
        for first in (0, 6)
    ]
    assert equal(whole, joined(list(map(joined, zip(*hosts, strict=True)))))
    assert whole["loss_weights"].any(axis=1).all()


def test_the_last_heldout_batch_is_filled_up_with_rows_of_no_weight(config):
    longer = dataclasses.replace(config, sequence_length=512)
    last = heldout_batches(longer, batch_size=300)[-1]
    rows = last["loss_weights"].any(axis=1)
    assert 0 < rows.sum() < 300
    assert not any(last[name][~rows].any() for name in last if "segment" in name)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """40 documents of six letters each, in one domain."""
    folder = tmp_path_factory.mktemp("words")
    lines = [json.dumps({"id": str(i), "text": f"{i:06d}"}) for i in range(40)]
    (folder / "only.jsonl").write_text("\n".join(lines))
    return DataConfig(
        corpus=f"jsonl:{folder}", sequence_length=8, heldout_fraction=1e-9,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip


def restored_texts(batch):
    """The bytes of every text in a span-corruption batch, and what its encoder reads."""
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            read = batch["encoder_inputs"][row][batch["encoder_segment_ids"][row] == segment]
            written = batch["targets"][row][batch["segment_ids"][row] == segment]
            spans = np.split(written, np.flatnonzero(written > 258))[1:]
            text = [spans[FIRST - t][1:] if t > 258 else [t] for t in read[:-1]]
            yield b"".join(map(TOKENIZER.bytes_of, np.concatenate(text))), read.tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_shows_every_text_once_with_spans_of_its_own(words, packed):
    # Spans have one token, because a single span of noise always ends the text.
    objective = SpanCorruption(noise_density=0.4, mean_noise_span_length=1.0, packed=packed)
    config = dataclasses.replace(words, sequence_length=16, objective=objective)
    data = open_data(config)
    (source,) = pipeline._windows(data, "train", keep_partial=False).values()
    epochs = [
        sorted(restored_texts(joined(
            train_batches(config, len(source), global_batch_size=1, start_step=n * len(source))
        )))
        for n in (0, 1)
    ]  # fmt: skip
    first, second = ([text for text, _ in epoch] for epoch in epochs)
    assert first == second and len(set(first)) == len(first)
    assert epochs[0] != epochs[1]
    if packed:
        assert first == [b"%06d" % i for i in range(40)]
        assert len(source) < 40  # texts of 6 tokens share rows


def test_a_window_of_prefix_lm_is_cut_elsewhere_in_the_next_epoch(words):
    config = dataclasses.replace(words, objective=PrefixLM(bidirectional=True))
    batch = joined(train_batches(config, 2 * 39, global_batch_size=1))
    cuts = [
        {tuple(i): tuple(p) for i, p in zip(batch["inputs"][s], batch["in_prefix"][s], strict=True)}
        for s in (slice(39), slice(39, None))
    ]
    assert cuts[0].keys() == cuts[1].keys()
    assert sum(cuts[0][window] != cuts[1][window] for window in cuts[0]) > 20


def test_no_document_meets_another_in_packed_pairs(words):
    config = dataclasses.replace(words, sequence_length=16, objective=EncoderPrefixLM())
    for batch in train_batches(config, 4):
        for row in range(8):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                read = batch["encoder_inputs"][row][batch["encoder_segment_ids"][row] == segment]
                written = batch["targets"][row][batch["segment_ids"][row] == segment]
                text = TOKENIZER.decode(np.concatenate([read, written]))
                assert 0 <= int(text) < 40 and len(text) == 6


def test_heldout_text_is_read_whole_by_joined_windows(tmp_path_factory):
    cache = str(tmp_path_factory.getbasetemp() / "objectives_cache")
    config = DataConfig(sequence_length=64, objective=SpanCorruption(), cache_dir=cache)
    data = open_data(config)
    read = dict.fromkeys(data.domains, b"")
    for batch in heldout_batches(config, batch_size=50):
        rows = batch["segment_ids"].any(axis=1)
        for domain, (text, _) in zip(batch["domain"][rows], restored_texts(batch), strict=True):
            read[data.domains[domain]] += text
    for domain in data.domains:
        documents = data.corpus.documents(domain, config.heldout_fraction)
        heldout = [document.text for split, document in documents if split == "heldout"]
        assert read[domain] == "".join(heldout).encode()


def digest(batches):
    """Hash of all bytes of some batches."""
    whole = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            whole.update(name.encode() + np.ascontiguousarray(batch[name]).tobytes())
    return whole.hexdigest()


def test_the_streams_are_those_that_another_process_drew(config):
    """A resumed run continues with the same examples in any process."""
    batches = train_batches(config, 3) + heldout_batches(config, batch_size=8, max_batches=2)
    drawn = {name for name, objective in OBJECTIVES.items() if objective == config.objective}
    assert drawn == {name for name, known in DRAWN.items() if digest(batches).startswith(known)}
