"""Corpora: their contents, and their held-out documents."""

import collections
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data import corpora
from moe_jax.data.documents import Document, split_of, split_tail

EMBEDDED_DOMAINS = ("prose", "drama", "folio1623", "speech", "python", "multilingual")


@pytest.fixture
def jsonl_directory(tmp_path):
    for domain in ("english", "deutsch"):
        lines = [
            json.dumps({"id": f"{domain}/{i}", "text": f"{domain} {i}", "group": f"page{i}"})
            for i in range(200)
        ]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_embedded_corpus_has_six_domains_and_219_documents():
    corpus = corpora.open_corpus("embedded")
    assert corpus.domains() == EMBEDDED_DOMAINS
    ids = {(d.domain, d.id) for name in EMBEDDED_DOMAINS for _, d in corpus.documents(name, 0.03)}
    assert len(ids) == 219


@pytest.mark.parametrize("domain", EMBEDDED_DOMAINS)
def test_every_embedded_domain_holds_out_about_the_fraction_asked_for(domain):
    sizes = collections.Counter()
    for split, document in corpora.EmbeddedCorpus().documents(domain, 0.03):
        sizes[split] += len(document.text.encode())
    assert 0.02 < sizes["heldout"] / sizes.total() < 0.035


@pytest.mark.parametrize("domain", EMBEDDED_DOMAINS)
def test_embedded_train_and_heldout_are_disjoint_and_lose_nothing(domain):
    corpus = corpora.EmbeddedCorpus()
    whole = {document.id: document.text for _, document in corpus.documents(domain, 0.0)}
    pieces = collections.defaultdict(dict)
    for split, document in corpus.documents(domain, 0.03):
        pieces[document.id][split] = document.text
    assert {i: p.get("train", "") + p.get("heldout", "") for i, p in pieces.items()} == whole


def test_the_heldout_end_of_a_play_is_heldout_in_the_other_edition():
    corpus = corpora.EmbeddedCorpus()
    for domain, last_line in (("drama", "bid the soldiers shoot"), ("folio1623", "bid the Souldi")):
        train, heldout = (
            "".join(d.text for s, d in corpus.documents(domain, 0.03) if s == split)
            for split in ("train", "heldout")
        )
        assert last_line in heldout
        assert last_line not in train


def test_nothing_is_heldout_at_fraction_zero():
    corpus = corpora.EmbeddedCorpus()
    splits = {split for name in corpus.domains() for split, _ in corpus.documents(name, 0.0)}
    assert splits == {"train"}


@given(text=st.text(min_size=1), fraction=st.floats(0, 0.99))
def test_a_tail_and_its_head_are_the_document(text, fraction):
    document = Document("domain", "id", text, "id")
    parts = list(split_tail(document, fraction))
    assert "".join(part.text for _, part in parts) == text
    assert [split for split, _ in parts] in (["train"], ["heldout"], ["train", "heldout"])


@given(group=st.text(), low=st.floats(0, 1), high=st.floats(0, 1))
def test_what_is_heldout_stays_heldout_at_a_larger_fraction(group, low, high):
    low, high = sorted((low, high))
    if split_of(group, low) == "heldout":
        assert split_of(group, high) == "heldout"


def test_translations_of_one_page_fall_on_one_side_of_the_split(jsonl_directory):
    corpus = corpora.open_corpus(f"jsonl:{jsonl_directory}")
    splits = collections.defaultdict(set)
    for domain in corpus.domains():
        for split, document in corpus.documents(domain, 0.2):
            splits[document.group].add(split)
    assert corpus.domains() == ("deutsch", "english")
    assert all(len(sides) == 1 for sides in splits.values())
    share = sum(sides == {"heldout"} for sides in splits.values()) / len(splits)
    assert 0.1 < share < 0.3


def test_the_fingerprint_follows_the_contents(jsonl_directory):
    before = corpora.open_corpus(f"jsonl:{jsonl_directory}").fingerprint()
    assert corpora.open_corpus(f"jsonl:{jsonl_directory}").fingerprint() == before
    with (jsonl_directory / "english.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "text": "more"}) + "\n")
    assert corpora.open_corpus(f"jsonl:{jsonl_directory}").fingerprint() != before


def test_an_unknown_kind_of_corpus_is_refused():
    with pytest.raises(
        ValueError,
        match="a file or folder, 'packed:DIR' or 'tfds:NAME': there is no 'embeded'",
    ):
        corpora.open_corpus("embeded")


def test_a_directory_without_jsonl_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of \.jsonl.*: none in .*or set it to 'embedded'"):
        corpora.open_corpus(f"jsonl:{tmp_path}")


@pytest.mark.parametrize("line", ["not json", '{"id": "x"}', "[1]"])
def test_a_malformed_line_is_named(tmp_path, line):
    (tmp_path / "english.jsonl").write_text('{"id": "a", "text": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"english\.jsonl line 2 (is|has) "):
        list(corpora.open_corpus(f"jsonl:{tmp_path}").documents("english", 0.1))


def test_a_jsonl_document_may_hold_out_its_tail(tmp_path):
    record = {"id": "a", "text": "line\n" * 100, "heldout": "tail"}
    (tmp_path / "english.jsonl").write_text(json.dumps(record))
    documents = list(corpora.open_corpus(f"jsonl:{tmp_path}").documents("english", 0.1))
    assert [(split, len(document.text)) for split, document in documents] == [
        ("train", 455),
        ("heldout", 45),
    ]
