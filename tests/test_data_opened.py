"""The data of a run is opened once, and checked before anything uses it."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import check_data, heldout_batches, open_data, train_batches
from moe_jax.data.documents import split_of


def write(directory, word, num_documents=60):
    directory.mkdir(exist_ok=True)
    lines = (
        json.dumps({"id": f"page-{i}", "text": f"{word} {i}. " * 12}) + "\n"
        for i in range(num_documents)
    )
    (directory / "web.jsonl").write_text("".join(lines))


@pytest.fixture
def config(tmp_path):
    write(tmp_path / "corpus", "cats")
    return DataConfig(
        corpus=f"jsonl:{tmp_path}/corpus",
        sequence_length=32,
        heldout_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def all_inputs(batches):
    return np.concatenate([batch["inputs"] for batch in batches])


def test_a_corpus_that_is_edited_while_a_run_goes_changes_no_later_score(config, tmp_path):
    data = open_data(config)
    before = all_inputs(heldout_batches(data, batch_size=4))
    write(tmp_path / "corpus", "dogs and")
    np.testing.assert_array_equal(all_inputs(heldout_batches(data, batch_size=4)), before)
    assert open_data(config).fingerprints["corpus"] != data.fingerprints["corpus"]


def test_a_corpus_that_changes_between_its_checksum_and_its_reading_is_refused(config, tmp_path):
    data = open_data(config)
    write(tmp_path / "corpus", "dogs and")
    with pytest.raises(ValueError, match=r"jsonl:.*corpus' has changed since it was opened"):
        check_data(data)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_fingerprints_are_of_contents_and_not_of_paths(config, tmp_path):
    write(tmp_path / "copy", "cats")
    moved = dataclasses.replace(config, corpus=f"jsonl:{tmp_path}/copy")
    assert open_data(moved).fingerprints == open_data(config).fingerprints
    of_file = hashlib.sha256((tmp_path / "corpus/web.jsonl").read_bytes()).digest()
    expected = hashlib.sha256(b"web\0" + of_file).hexdigest()
    assert open_data(config).fingerprints["corpus"] == expected


def test_data_that_can_train_and_evaluate_passes_the_check(config):
    data = open_data(config)
    check_data(data)
    next(train_batches(data, global_batch_size=2))
    next(heldout_batches(data, batch_size=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain_weights": (("wob", 1.0),)}, r"\['web'\]: got \['wob'\]"),
        ({"sequence_length": 100_000}, r"\['web'\] have fewer"),
        ({"heldout_fraction": 1e-6}, r"No text .* is held out at heldout_fraction=1e-06"),
    ],
)
def test_data_that_cannot_is_refused_before_a_step(config, changes, message):
    data = open_data(dataclasses.replace(config, **changes))
    with pytest.raises(ValueError, match=message):
        check_data(data)


def test_a_run_that_does_not_evaluate_needs_nothing_held_out(config):
    data = open_data(dataclasses.replace(config, heldout_fraction=1e-6))
    check_data(data, evaluates=False)
    next(train_batches(data, global_batch_size=2))


@pytest.mark.parametrize("num_documents", [2, 10])
def test_the_way_to_hold_out_some_text_can_be_followed(tmp_path, num_documents):
    """There are so few documents that the default fraction holds none out."""
    write(tmp_path / "few", "chapter", num_documents)
    config = DataConfig(
        corpus=str(tmp_path / "few"),
        sequence_length=32,
        heldout_fraction=1e-4,
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(ValueError, match="is held out at") as refused:
        check_data(open_data(config))
    fraction = float(re.search(r"heldout_fraction=([0-9.]+), or", str(refused.value))[1])
    data = open_data(dataclasses.replace(config, heldout_fraction=fraction))
    check_data(data)
    assert data.files.counts["heldout"]["web"].documents == 1


def test_documents_of_one_group_can_not_be_held_out(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "text": "a" * 99}) + "\n" for _ in range(9)))
    config = DataConfig(corpus=str(path), sequence_length=32, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"held out at .*Add documents, of ids or groups that dif"):
        check_data(open_data(config))


def test_a_lone_document_whose_group_is_held_out_does_not_train(tmp_path):
    """The group is held out in `en`, so its translation is too, though `fr` has nothing else."""
    fraction = 0.5
    heldout = next(f"p{n}" for n in range(99) if split_of(f"p{n}", fraction) == "heldout")
    trains = next(f"p{n}" for n in range(99) if split_of(f"p{n}", fraction) == "train")
    english = [{"group": group, "text": f"page {group} " * 30} for group in (heldout, trains)]
    lines = {"en": english, "fr": [{"group": heldout, "text": "une page\n" * 30}]}
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = DataConfig(
        corpus=str(tmp_path),
        sequence_length=32,
        heldout_fraction=fraction,
        cache_dir=str(tmp_path / "cache"),
    )
    data = open_data(config)
    sides = {s: d.text for s, d in data.corpus.documents("fr", fraction)}
    assert sides == {"heldout": "une page\n" * 30}
    with pytest.raises(
        ValueError, match=r"\['fr'\] have fewer .*text\. Give config\.data\.domain_weights without"
    ):
        check_data(data)
    check_data(open_data(dataclasses.replace(config, domain_weights=(("en", 1.0),))))
    alone = open_data(dataclasses.replace(config, corpus=str(tmp_path / "fr.jsonl")))
    with pytest.raises(ValueError, match=r"text\. Add documents, of ids or groups that differ\."):
        check_data(alone)


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_a_document_of_a_group_is_never_cut(tmp_path, side):
    """Alone in its domain or not, it lies on the side of its group."""
    group = next(f"p{n}" for n in range(99) if split_of(f"p{n}", 0.3) == side)
    page = {"group": group, "text": "a line\n" * 30}
    for name, records in {"en": [page], "fr": [page, {"text": "une ligne"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    corpus = open_data(DataConfig(corpus=str(tmp_path), cache_dir=str(tmp_path / "c"))).corpus
    for domain in ("en", "fr"):
        found = [(s, d.text) for s, d in corpus.documents(domain, 0.3) if d.group == group]
        assert found == [(side, page["text"])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "gs://bucket/corpus"}, r"data\.corpus=gs://bucket/corpus is a URL\. Mount"),
        ({"corpus": "jsonl:s3://bucket"}, r"data\.corpus=jsonl:s3://bucket is a URL"),
        ({"tokenizer": "https://host/tokenizer.json"}, r"data\.tokenizer=https://host/.* a URL"),
        ({"cache_dir": "gs://bucket"}, r"data\.cache_dir=gs://bucket is a URL"),
        ({"corpus": "a\0b"}, r"data\.corpus must not contain a NUL byte"),
        ({"corpus": ""}, r"data\.corpus must not be empty: .*'embedded'"),
        ({"domain_weights": (("a", 1.0), ("b", 1.0), ("a", 2.0))}, "must name each domain once"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
